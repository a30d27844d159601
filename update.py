"""One update: optimise the clipped loss over a step's buffer, over all processes at once.

Every process has experiences of its own, perhaps none. What the loss is a mean over is counted over all of them, the
gradients are averaged, and each optimizer step happens in all or in none.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from loguru import logger
from PIL import Image
from torch import Tensor, nn

from config import TrainOptions
from ground.files import disk_errors
from loss import VLM_GRPOLoss
from models.family import ModelError, Prompt
from models.memory import PassSize
from models.policy import Policy
from models.processes import Processes
from models.sharding import gathered, whole
from models.trainable import warn_without_gradient
from replay_buffer import Experience, ReplayBuffer, join_experiences


@dataclass
class Learner:
    """What an update moves, and by what."""

    policy: Policy
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    objective: VLM_GRPOLoss
    processes: Processes = field(default_factory=Processes)
    passes: PassSize = field(default_factory=lambda: PassSize(1))  # --micro_batch_size, or less
    idle: Experience | None = None  # what a process computes that has nothing of its own, where weights are sharded

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a share of the weights."""
        return self.idle is not None


def make_learner(policy: Policy, parameters: list[nn.Parameter], options: TrainOptions,
                 processes: Processes | None = None, idle: Experience | None = None) -> Learner:
    """Put together what an update needs, as the options say. processes: all of the run; None: this one alone."""
    objective = VLM_GRPOLoss(options.clip_eps, options.kl_weight, options.clip_eps_high, options.loss_type,
                             options.max_length, options.mask_truncated, ratio_level=options.ratio_level,
                             clip_ratio_c=options.clip_ratio_c, entropy_weight=options.entropy_weight)
    return Learner(policy, parameters, make_optimizer(parameters, options), objective, processes or Processes(),
                   PassSize(options.micro_batch_size or options.minibatch_size or options.batch_size), idle)


def update(learner: Learner, buffer: ReplayBuffer, options: TrainOptions, step: int) -> dict[str, float]:
    """Optimise over the buffer: one optimizer step a minibatch, `epochs` passes; returns averaged metrics.

    A minibatch with a non-finite loss or gradient changes nothing: it is skipped in all processes, logged with its
    rows, kept in output_dir for inspection and counted. optimizer_steps counts those that were made.
    """
    sums: dict[str, float] = defaultdict(float)
    first: dict[str, float] = {}  # before any weight has moved: ratio 1 and no gap, or sampling and update differ
    done = skipped = 0
    parts = learner.processes.most(buffer.parts(options.minibatch_size))  # fewer here: each is smaller, none is missing
    minibatches = list(buffer.minibatches(options.epochs, parts, f"{options.seed}/{step}"))
    if len(minibatches) > 1 and learner.policy.dtype != torch.float32:
        first = renew_old_log_probs(learner, buffer.items, options)
    for index, minibatch in enumerate(minibatches):
        learner.optimizer.zero_grad(set_to_none=True)
        metrics = backward(learner, minibatch, options, on_policy=len(minibatches) == 1)
        if not metrics:
            continue
        measured = {name: metrics.pop(name) for name in ("first_ratio", "log_prob_gap")}
        first = first or measured
        if not learner.sharded:  # sharded gradients are averages already
            learner.processes.average_gradients(learner.parameters)
        grad_norm = float(whole(nn.utils.clip_grad_norm_(learner.parameters, options.max_grad_norm)))
        if not (math.isfinite(metrics["total_loss"]) and math.isfinite(grad_norm)):
            skipped += 1
            rows = ", ".join(source for item in minibatch for source in item.sources)
            logger.warning(f"step {step + 1}: loss {metrics['total_loss']}, gradient norm {grad_norm}: "
                           f"minibatch {index} skipped, weights unchanged; its products: {rows}")
            if skipped == 1:
                keep_bad_batch(minibatch, options, step, learner.processes)
            continue
        if step == 0 and index == 0 and grad_norm > 0:
            warn_without_gradient(learner.policy)
        try:
            learner.optimizer.step()
        except torch.OutOfMemoryError as problem:
            raise ModelError("out of memory in the optimizer's step, in which some weights may have moved: go on from "
                             "the last checkpoint with --resume auto, and train less of the model (--lora_rank) or "
                             "share it out (--sharding fsdp)") from problem
        done += 1
        for name, value in (metrics | {"grad_norm": grad_norm}).items():
            sums[name] += value
    learner.optimizer.zero_grad(set_to_none=True)
    return {name: value / done for name, value in sums.items()} | first | {"optimizer_steps": done,
                                                                           "skipped_minibatches": skipped}


def keep_bad_batch(minibatch: Sequence[Experience], options: TrainOptions, step: int, processes: Processes) -> None:
    """Write a process's share of a step's first skipped minibatch to output_dir/bad_batch_step_N.pt, to look at.

    ReplayBuffer().load_state_dict(torch.load(path)) reads it back.
    """
    share = "" if processes.world == 1 else f"_process_{processes.rank}"
    path = Path(options.output_dir) / f"bad_batch_step_{step + 1:06d}{share}.pt"
    try:
        with disk_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(ReplayBuffer(items=list(minibatch)).state_dict(), path)
    except OSError as problem:
        path.unlink(missing_ok=True)
        logger.warning(f"{path}: not written: {problem}")


def renew_old_log_probs(learner: Learner, items: Sequence[Experience], options: TrainOptions) -> dict[str, float]:
    """Replace old_log_probs, before any weight has moved, by those that the update's passes compute.

    In bfloat16 those of sampling differ from them by rounding: from the second optimizer step on it would enter ratio
    and clipping. Returns first_ratio and log_prob_gap of all processes: how far apart they lay.
    """
    objective, processes = learner.objective, learner.processes
    tokens = processes.total(torch.tensor(sum(int(objective.mask(item).sum()) for item in items),
                                          device=learner.policy.device))
    ratio, gap = torch.zeros(2, device=learner.policy.device)
    for item, log_probs in log_probs_under(learner.policy, items, learner.passes, options.temperature):
        ratio += objective.mean_ratio(log_probs, item) * (objective.mask(item).sum() / tokens.clamp(min=1))
        gap = torch.maximum(gap, (log_probs - item.old_log_probs).abs().max())
        item.old_log_probs = log_probs
    found = {"first_ratio": float(processes.total(ratio)), "log_prob_gap": processes.most(float(gap))}
    return found if tokens else {}


def log_probs_under(policy: Policy, items: Sequence[Experience], passes: PassSize, temperature: float,
                    features: bool = True) -> list[tuple[Experience, Tensor]]:
    """Take each experience's log-probs (G, T) under a policy, without gradient; features False encodes photos anew.

    Raises ModelError where there is no memory for one alone.
    """
    def score(together: Sequence[Experience]) -> Tensor:
        batch = join_experiences(together)
        return policy.log_probs(batch.prompts, batch.completions, batch.action_mask, temperature,
                                batch.features if features else None, with_entropy=False)[0]

    found = []
    with torch.no_grad(), gathered(policy):
        for together, log_probs in passes.passes(by_length(items), score, "taking log-probs"):
            if log_probs is None:
                raise no_memory(together[0].sources)
            rows = log_probs.split([len(item.rewards) for item in together])
            found += [(item, own[:, :item.action_mask.shape[1]]) for item, own in zip(together, rows, strict=True)]
    return found


def no_memory(sources: Sequence[str]) -> ModelError:
    """The error of a run that has no memory for one product."""
    return ModelError(f"out of memory with one product a pass, {', '.join(sources) or 'the largest'}: lower "
                      "--max_pixels, --max_slice_nums, --max_prompt_length or --group_size, or try "
                      "--gradient_checkpointing, --lora_rank or --sharding fsdp; then go on with --resume auto")


def backward(learner: Learner, minibatch: Sequence[Experience], options: TrainOptions, on_policy: bool
             ) -> dict[str, float]:
    """Accumulate the minibatch's gradient over micro-batches; returns the metrics of the whole minibatch, over all
    processes; none when no process has a token to learn from.

    on_policy: this is the only minibatch since sampling. In bfloat16 the log-probs of sampling and of this pass differ
    by rounding, so the ratio is then taken against those of this pass. first_ratio and log_prob_gap are against those
    of the buffer.
    Where memory runs out, all of it is done again with passes of half as many products, each process by itself.
    """
    policy, objective, processes = learner.policy, learner.objective, learner.processes
    counted = torch.tensor([sum(int(objective.size(item)) for item in minibatch),
                            sum(int(objective.mask(item).sum()) for item in minibatch)], device=policy.device)
    size, tokens = processes.total(counted)
    if not size:
        return {}
    while True:
        try:
            sums, gap = accumulate(learner, minibatch, options, on_policy, size, tokens)
            break
        except torch.OutOfMemoryError as error:
            problem, sources = str(error), getattr(error, "__notes__", [])
        # Outside of the except block: the error holds on to what the pass had computed.
        learner.optimizer.zero_grad(set_to_none=True)
        taken = min(learner.passes.products or 1, len(minibatch))
        if learner.sharded and taken > 1:  # other processes wait inside of this pass, which can't be taken up again
            raise ModelError(f"out of memory with {taken} products a pass: go on with --resume auto --micro_batch_size "
                             f"{taken // 2} ({problem.splitlines()[0]})")
        if not learner.passes.halve(taken, "updating", problem):
            raise no_memory(sources)
    totals = processes.total(torch.stack(list(sums.values()))).tolist()
    return dict(zip(sums, totals, strict=True)) | {"log_prob_gap": processes.most(float(gap))}


def accumulate(learner: Learner, minibatch: Sequence[Experience], options: TrainOptions, on_policy: bool, size: Tensor,
               tokens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Run every micro-batch forward and backward; returns this process's share of the metrics, and its largest gap.

    size, tokens: what the loss and the metrics are means over, in all processes.
    """
    policy, objective, processes = learner.policy, learner.objective, learner.processes
    names = ("ratio", "clip_fraction", "entropy", *(["kl_divergence"] if options.kl_weight else []))
    sums = {name: torch.zeros((), device=policy.device) for name in ("total_loss", "first_ratio", *names)}
    gap = torch.zeros((), device=policy.device)
    batches = list(micro_batches(minibatch, learner.passes.products or 1))
    passes = processes.most(len(batches)) if learner.sharded else len(batches)
    for index in range(passes):
        items = batches[index] if index < len(batches) else []
        with named(items):
            batch, log_probs, entropy = log_probs_of(learner, items, options)
            if batch is None:
                (0.0 * log_probs.sum()).backward()
                continue
            gap = torch.maximum(gap, (log_probs.detach() - batch.old_log_probs).abs().max())
            share = objective.mask(batch).sum() / tokens
            sums["first_ratio"] += objective.mean_ratio(log_probs.detach(), batch) * share
            if on_policy and policy.dtype != torch.float32:
                batch.old_log_probs = log_probs.detach()
            terms = objective.terms(log_probs, batch, entropy)
            loss = terms.total_loss * (objective.size(batch) / size)
            (loss * processes.world).backward()  # gradients are averaged over the processes, the loss is summed
            sums["total_loss"] += loss.detach()
            for name in names:
                sums[name] += getattr(terms, name).detach() * share
    return sums, gap


@contextmanager
def named(items: Sequence[Experience]) -> Iterator[None]:
    """Let an error for want of memory name the products that it befell."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.__notes__ = [source for item in items for source in item.sources]
        raise


def log_probs_of(learner: Learner, items: Sequence[Experience], options: TrainOptions
                 ) -> tuple[Experience | None, Tensor, Tensor]:
    """Join experiences: (batch, its log_probs (N, T) under the policy, entropy (N, T)); batch None without any.

    Where weights are sharded, every pass gathers every layer in all processes: one without products, or without photos
    while the vision trains, computes the idle product as well, with no part in the loss.
    """
    needs_idle = learner.sharded and (
        not items or (options.train_vision and not any(prompt.photos for item in items for prompt in item.prompts)))
    joined = join_experiences([*items, learner.idle] if needs_idle else items)
    log_probs, entropy = learner.policy.log_probs(joined.prompts, joined.completions, joined.action_mask,
                                                  options.temperature, joined.features)
    if not needs_idle:
        return joined, log_probs, entropy
    if not items:
        return None, log_probs, entropy
    batch = join_experiences(items)
    rows, columns = batch.action_mask.shape
    # The idle rows take part in the backward pass, too, or their layers would not.
    return batch, log_probs[:rows, :columns] + 0.0 * log_probs[rows:].sum(), entropy[:rows, :columns]


def make_idle(policy: Policy, group_size: int, train_vision: bool) -> Experience:
    """Make a product that no sheet holds, for a process without one: a grey photo while the vision trains."""
    prompt = policy.encode_prompt("-", [Image.new("RGB", (64, 64), "grey")] if train_vision else [])
    return pretend(policy, prompt, group_size, 1, None if train_vision else (None,))


def pretend(policy: Policy, prompt: Prompt, group_size: int, length: int, features: Sequence[Tensor | None] | None
            ) -> Experience:
    """Make a group of answers of one length that nobody gave; they are worth nothing."""
    completions = policy.stop_ids[:1].expand(group_size, length)
    zeros = torch.zeros(group_size, length, device=policy.device)
    return Experience(completions, torch.ones_like(completions, dtype=torch.bool), zeros, zeros, zeros[:, 0],
                      zeros[:, 0], torch.zeros(group_size, dtype=torch.bool, device=policy.device), (prompt,),
                      None if features is None else tuple(features))


def micro_batches(items: Sequence[Experience], size: int) -> Iterator[list[Experience]]:
    """Cut experiences into batches of at most `size` products, similar prompt lengths together."""
    ordered = by_length(items)
    for start in range(0, len(ordered), size):
        yield ordered[start:start + size]


def by_length(items: Sequence[Experience]) -> list[Experience]:
    """Put experiences in the order in which every pass takes them: together little is padded, and alike everywhere."""
    return sorted(items, key=lambda item: len(item.prompts[0].input_ids))


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


def learning_rate(step: int, options: TrainOptions) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then constant, linear or cosine down to min_lr_ratio * lr."""
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    if options.lr_scheduler == "constant":
        return options.lr
    progress = (step - options.warmup_steps) / max(options.max_steps - options.warmup_steps, 1)
    left = 1 - progress if options.lr_scheduler == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return options.lr * (options.min_lr_ratio + (1 - options.min_lr_ratio) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
