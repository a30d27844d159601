"""The optimizer of a run: made as the options say, its memory taken before the first step, its rate over the steps."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from config import TrainOptions
from models.family import ModelError
from models.processes import Processes


def make_optimizer(parameters: Sequence[Tensor], options: TrainOptions) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
    vectors = [parameter for parameter in parameters if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    settings = dict(lr=options.lr, betas=options.adam_betas, eps=options.adam_eps)
    if options.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **settings)
    # One kernel, quick on a host too; torch's own choice on a GPU takes as much memory again as the weights.
    fused = True if options.offload or parameters and parameters[0].device.type == "cuda" else None
    return torch.optim.AdamW(groups, **settings, fused=fused)


def allocate_state(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], processes: Processes) -> None:
    """Let the optimizer allocate what it keeps, by a step that moves nothing: a later one then finds all that it needs.

    All processes call this, before the first step. Raises ModelError in all of them where one has no room for it.
    """
    problem = None
    rates = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate(optimizer, 0.0)
    try:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    except torch.OutOfMemoryError as error:
        problem = str(error).partition("\n")[0]
    optimizer.zero_grad(set_to_none=True)
    problems = list(filter(None, processes.gather(problem)))
    if problems:
        raise ModelError(f"no memory for gradients and Adam's moments ({problems[0]}); nothing has been trained yet: "
                         "train less of the model (--lora_rank) or share it out (--sharding fsdp)")
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        state["step"] = 0 * state["step"]  # a tensor, or a number with 8 bits


def learning_rate(step: int, options: TrainOptions) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then constant, linear or cosine down to min_lr_ratio * lr.

    Supervised steps have sft_lr in place of lr.
    """
    peak = options.sft_lr if options.sft_lr and step < options.sft_steps else options.lr
    if step < options.warmup_steps:
        return peak * (step + 1) / options.warmup_steps
    if options.lr_scheduler == "constant":
        return peak
    progress = (step - options.warmup_steps) / max(options.max_steps - options.warmup_steps, 1)
    left = 1 - progress if options.lr_scheduler == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (options.min_lr_ratio + (1 - options.min_lr_ratio) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
