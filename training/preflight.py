"""Before the first step: run the largest product of the sheet through an update's passes and say what that takes."""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from loguru import logger

from config import TrainOptions
from models.family import ModelError, Prompt
from models.policy import Policy
from models.processes import Processes
from models.sharding import gathered
from replay_buffer import Experience
from rollout import PromptEncoder, PromptError
from sheets.photos import PhotoError
from sheets.samples import Sample
from update import Learner, answers_a_product, backward, pretend

_LOOKED_AT = 8  # products of the most photos, and as many of the longest texts: opening all would take too long
_KEPT_FREE = 0.1  # of a GPU's memory: what other libraries take, and what lies in pieces too small
GIB = 2 ** 30


def preflight(learner: Learner, encoder: PromptEncoder, products: Sequence[Sample], options: TrainOptions) -> None:
    """Run the largest product forward and backward with a group of the longest answers; log what memory it took.

    No weight moves. With --micro_batch_size 0 the number of products a pass is set to what fits a GPU. Raises
    ModelError when not even one does.
    """
    begin = time.perf_counter()
    sample, prompt = largest_product(encoder, products)
    if sample is None:
        logger.warning("pre-flight: none of the products that look largest could be opened; nothing was tried")
    policy = learner.policy
    finds_out = options.micro_batch_size == 0 and policy.device.type == "cuda"
    if finds_out:
        learner.passes.products = 1
    held = torch.cuda.memory_allocated(policy.device) if policy.device.type == "cuda" else 0
    with torch.no_grad(), gathered(policy):  # in all processes, also in one that found no product
        items = [] if prompt is None else [longest_answers(policy, prompt, options)] * (learner.passes.products or 1)
    backward(learner, items, options, on_policy=False)
    learner.optimizer.zero_grad(set_to_none=True)
    peak, moments = peak_memory(policy.device), moments_to_come(learner)
    if policy.device.type == "cuda":
        total = torch.cuda.get_device_properties(policy.device).total_memory
        fits = least(learner.processes, products_that_fit(total, held, peak, moments,
                                                          options.minibatch_size or options.batch_size))
        refuse_too_large(fits, total, peak, moments)
        if finds_out:
            learner.passes.products = fits
            logger.info(f"--micro_batch_size 0: {fits} products a pass to start with")
    if sample is not None and prompt is not None:
        logger.info(f"pre-flight: {sample.sheet} row {sample.row}, {len(prompt.input_ids)} prompt tokens, "
                    f"{answers_a_product(options)} answers of {options.max_length}, {len(items)} products a pass: "
                    f"{peak / GIB:.2f} GiB {'of the GPU' if policy.device.type == 'cuda' else 'resident'} at most, "
                    f"{moments / GIB:.2f} more for Adam's moments; {time.perf_counter() - begin:.1f} s")


def longest_answers(policy: Policy, prompt: Prompt, options: TrainOptions) -> Experience:
    """A group of the longest answers to a product, as an update would meet it."""
    features = None if options.train_vision else policy.photo_features([prompt])
    item = pretend(policy, prompt, answers_a_product(options), options.max_length, features)
    return item if options.kl_weight else replace(item, ref_log_probs=None)


def largest_product(encoder: PromptEncoder, products: Sequence[Sample]) -> tuple[Sample | None, Prompt | None]:
    """The product with the longest prompt among those with the most photos and those with the longest texts."""
    by_photos = sorted(products, key=lambda sample: (len(sample.photos), len(sample.text)), reverse=True)
    by_text = sorted(products, key=lambda sample: len(sample.text), reverse=True)
    best: tuple[Sample | None, Prompt | None] = (None, None)
    for sample in by_photos[:_LOOKED_AT] + by_text[:_LOOKED_AT]:
        try:
            prompt = encoder.encode(sample)
        except (PhotoError, PromptError):  # said when its turn comes
            continue
        if best[1] is None or len(prompt.input_ids) > len(best[1].input_ids):
            best = sample, prompt
    return best


def refuse_too_large(fits: int, total: int, peak: int, moments: int) -> None:
    """Raise ModelError when Adam's moments, which come with the first step, leave no room for a single product."""
    if not fits:
        raise ModelError(f"the largest product takes {peak / GIB:.1f} GiB and Adam's moments {moments / GIB:.1f} more; "
                         f"the GPU has {total / GIB:.1f}, a tenth of which is kept free. Train less of the model "
                         "(--lora_rank) or share it out (--sharding fsdp), or lower --max_pixels, --max_slice_nums, "
                         "--max_prompt_length or --group_size")


def products_that_fit(total: int, held: int, peak: int, moments: int, most: int) -> int:
    """How many products a pass can take, 0 to most, after one took memory from held up to peak, all in bytes."""
    room = (1 - _KEPT_FREE) * total - held - moments
    return int(max(0, min(most, room // max(peak - held, 1))))


def moments_to_come(learner: Learner) -> int:
    """The bytes that Adam takes at its first step: two moments for each number that trains in this process."""
    if learner.optimizer.state:
        return 0
    return sum(2 * parameter.element_size() * local_numel(parameter) for parameter in learner.parameters)


def local_numel(parameter: torch.Tensor) -> int:
    """The numbers of a parameter that this process holds."""
    return parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()


def peak_memory(device: torch.device) -> int:
    """The most bytes taken so far: of the GPU by tensors, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def least(processes: Processes, number: int) -> int:
    """The smallest of all processes' numbers."""
    return min(processes.gather(number))
