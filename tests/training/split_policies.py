"""Sharded policies against whole ones, on the same products, in each of two processes. Used by training_worker.py."""

import torch
import torch.distributed as dist

import demo
from models.policy import Policy
from models.processes import Processes
from models.sharding import gathered, is_split, own_part, splitter
from models.trainable import set_trainable
from tiny import adapted, parts_of, sample, three_prompts

CASES = (("dense", "language", False), ("hybrid", "adapter", False), ("v47", "language", True),
         ("qwen2_5_vl", "language and vision", True), ("idefics3", "language and vision", True))


def make(kind, trains, checkpointing, split):
    """The same policy in every process, whole or split."""
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    processor = MiniCPMV4_6ImageProcessorPil(max_slice_nums=4, scale_resolution=64, patch_size=16,
                                             downsample_mode="4x", use_image_id=True)
    model, *parts = parts_of(kind, demo.make_tokenizer(seed=0), processor)
    root = splitter(torch.float32)(model) if split else None
    policy = Policy(model, *parts, gradient_checkpointing=checkpointing, root=root)
    if trains == "adapter":
        adapted(policy)
    set_trainable(policy, trains == "language and vision")
    policy.root.double()
    return policy


def scored(policy, prompts, generation):
    """Log-probs and the whole gradients of their sum; of a policy that is split, their means over all processes."""
    log_probs, _ = policy.log_probs(prompts, generation.completions, generation.action_mask, 0.7)
    log_probs.sum().backward()
    if is_split(policy):
        trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
        Processes(dist.get_rank(), dist.get_world_size()).average_gradients(trained)
    gradients = {}
    for name, parameter in policy.model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            gradients[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return log_probs.detach(), gradients


def compare(kind, trains, checkpointing):
    """Sample, score, differentiate; an assertion that fails ends the process with its traceback."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole, split = (make(kind, trains, checkpointing, in_shares) for in_shares in (False, True))
    everything = sum(parameter.numel() for parameter in split.model.parameters())
    held = sum(own_part(parameter).numel() for parameter in split.model.parameters())
    assert held < 0.6 * everything, (held, everything)

    prompts = three_prompts(whole)[rank:2]  # the second process has fewer products, and shorter answers
    wanted = sample(whole, prompts, columns=12 - 4 * rank, seed=f"rank {rank}")
    with gathered(split):
        found = sample(split, prompts, columns=12 - 4 * rank, seed=f"rank {rank}")
    assert torch.equal(found.completions, wanted.completions)
    assert split.copies.taken == whole.copies.taken > 0  # both wrote them by models/lean.py

    log_probs, gradients = scored(split, prompts, wanted)
    alone, own = scored(whole, prompts, wanted)
    assert (log_probs - alone).abs().max() < 1e-10
    assert gradients.keys() == own.keys()
    for name, grad in own.items():
        dist.all_reduce(grad)
        grad /= world
        assert (gradients[name] - grad).abs().max() <= 1e-10 * max(1.0, float(grad.abs().max())), name
    print(f"{kind}, {trains}: equal", flush=True)
