"""Before the first step: run the largest product of the sheet through a step's passes and say what that takes.

On a GPU that is a rollout, the reference and an update, with room kept for Adam's moments, which come with the first
step, so that a run that can't fit ends before it begins. On a CPU it is an update.
"""

import copy
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from loguru import logger

from config import TrainOptions
from models.family import ModelError, Prompt
from models.memory import Copies, PassSize
from models.policy import Generation, Policy
from models.processes import Processes
from models.sharding import gathered
from replay_buffer import Experience
from rollout import PromptEncoder, PromptError, draw_uniforms
from sheets.photos import PhotoError
from sheets.samples import Sample
from update import Learner, answers_a_product, backward, log_probs_under, pretend

_LOOKED_AT = 8  # products of the most photos, and as many of the longest texts: opening all would take too long
_KEPT_FREE = 0.1  # of a GPU's memory: what other libraries take, and what lies in pieces too small
GIB = 2 ** 30
ADVICE = ("Train less of the model (--lora_rank), share it out (--sharding fsdp), leave it with the host (--sharding "
          "fsdp --offload), hold the moments in 8 bits (--optimizer adamw_8bit), keep less for the backward pass "
          "(--gradient_checkpointing) or do without the reference policy (--kl_weight 0), or lower --max_pixels, "
          "--max_slice_nums, --max_prompt_length, --max_length or --group_size")


class Card:
    """A GPU's memory, in bytes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.total = torch.cuda.get_device_properties(device).total_memory

    def held(self) -> int:
        """What tensors take now."""
        return torch.cuda.memory_allocated(self.device)

    def peak_of(self, work: Callable[[], None]) -> int:
        """What tensors take at most while something is done."""
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        return torch.cuda.max_memory_allocated(self.device)

    def reserve(self, size: int) -> torch.Tensor:
        """Take so much; raises torch.OutOfMemoryError."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)


def card_of(device: torch.device) -> Card | None:
    """The GPU that is computed on; None on a CPU."""
    return Card(device) if device.type == "cuda" else None


def preflight(learner: Learner, reference: Policy | None, shares_vision: bool, encoder: PromptEncoder,
              products: Sequence[Sample], options: TrainOptions) -> None:
    """Run the largest product through a step's passes with a group of the longest answers; log what memory it took.

    No weight moves. On a GPU the sizes that options leave open are set to what fits. Raises ModelError when not even
    one product does. All processes call this together, one without a product too.
    """
    begin = time.perf_counter()
    sample, prompt = largest_product(encoder, products)
    if sample is None:
        logger.warning("pre-flight: none of the products that look largest could be opened; nothing was tried")
    card, moments = card_of(learner.policy.device), moments_to_come(learner)
    if card is None:
        try_update(learner, prompt, learner.passes.products or 1, options)
        learner.optimizer.zero_grad(set_to_none=True)
        taken = [f"{learner.passes.products or 1} products a pass: {peak_memory() / GIB:.2f} GiB resident"]
    else:
        with room_for_moments(card, moments, learner.processes):
            taken = list(try_step(card, learner, reference, shares_vision, prompt, options))
    if sample is not None and prompt is not None:
        logger.info(f"pre-flight: {sample.sheet} row {sample.row}, {len(prompt.input_ids)} prompt tokens, "
                    f"{answers_a_product(options)} answers of {options.max_length}, {'; '.join(taken)} at most, "
                    f"{moments / GIB:.2f} {'more' if card is None else 'of it'} for Adam's moments; "
                    f"{time.perf_counter() - begin:.1f} s")


@contextmanager
def room_for_moments(card: Card, moments: int, processes: Processes) -> Iterator[None]:
    """Keep room for Adam's moments for the time of the block; raises ModelError, in all processes, without it."""
    held, room = card.held(), None
    try:
        room = card.reserve(moments)
    except torch.OutOfMemoryError:
        pass
    if not all(processes.gather(room is not None)):
        raise ModelError(f"Adam's moments come with the first step and take {moments / GIB:.1f} GiB; the GPU has "
                         f"{card.total / GIB:.1f}, of which weights and what else is there already take "
                         f"{held / GIB:.1f}. {ADVICE}")
    yield


def try_step(card: Card, learner: Learner, reference: Policy | None, shares_vision: bool, prompt: Prompt | None,
             options: TrainOptions) -> Iterator[str]:
    """Try the longest chunk of a step's rollout, reference and update; yields in words what each took."""
    policy, processes = learner.policy, learner.processes
    most = options.minibatch_size or options.batch_size

    def sample(count: int) -> None:
        with gathered(policy):
            try_rollout(policy, prompt, count, options)

    def score(count: int) -> None:
        items = pretended(policy, prompt, count, options)
        log_probs_under(reference, items, learner.passes, options.temperature, shares_vision)

    if options.sft_steps < options.max_steps:
        yield "sampling " + try_passes(card, processes, policy.sampled_together, options.rollout_batch_size,
                                       options.batch_size, sample, None if policy.exact_path else policy.copies)
    learner.passes.products = learner.passes.products if options.micro_batch_size else 1
    try_update(learner, prompt, 1, options)  # leaves the gradients that lie there while later passes are taken
    yield "updating " + try_passes(card, processes, learner.passes, options.micro_batch_size, most,
                                   lambda count: try_update(learner, prompt, count, options))
    learner.optimizer.zero_grad(set_to_none=True)
    if reference is not None:
        yield "the reference " + try_passes(card, processes, learner.passes, learner.passes.products or 1, most, score)


def try_passes(card: Card, processes: Processes, size: PassSize, wanted: int, most: int, work: Callable[[int], None],
               copies: Copies | None = None) -> str:
    """Try a pass of so many products as are wanted, 0: as fit, at most `most`; returns in words what it took.

    Halves the size until enough stays free, as work() does where memory runs out, and in the end goes without copies of
    weights, where it makes some. Raises ModelError, in all processes, when there is no room for one.
    """
    held, begin = card.held(), size.products
    count = first = min(wanted or 1, size.products or most, most)
    while True:
        peak = card.peak_of(lambda count=count: work(count))
        count = least(processes, min(count, size.products or count))
        once = copies.taken if copies else 0  # however many products
        dropped = copies is not None and not all(processes.gather(copies.wanted))  # by work(), in some process
        fits = 0 if dropped else least(processes, products_that_fit(card.total, held + once, peak, 0, most))
        if fits or (count == 1 and copies is None):
            break
        taken = f"{peak / GIB:.1f} of {card.total / GIB:.1f} GiB taken: going on"
        if count > 1 and not dropped:
            size.products = count = count // 2
            logger.warning(f"{taken} with {count} products a pass")
        else:
            copies.wanted, copies, size.products, count = False, None, begin, first
            logger.warning(f"{taken} without copies of weights while answers are written, which is slower")
    refuse_too_large(fits, card.total, processes.most(peak))
    if wanted:
        return f"{count} products: {peak / GIB:.2f} GiB"
    size.products = fits
    if fits > 1:  # counted so far; where memory lies in pieces fewer fit
        peak = card.peak_of(lambda: work(fits))
        size.products = least(processes, min(fits, size.products))
    return f"{size.products} products, as many as fit: {peak / GIB:.2f} GiB"


def try_rollout(policy: Policy, prompt: Prompt | None, count: int, options: TrainOptions) -> None:
    """Sample the longest answers to so many products; raises ModelError where there is no memory for one of them."""
    def sample(prompts: Sequence[Prompt]) -> Generation:
        unstopped = copy.copy(policy)
        unstopped.stop_ids = policy.stop_ids[:0]
        with torch.no_grad():
            features = policy.photo_features(prompts)
        uniforms = draw_uniforms("pre-flight", len(prompts) * options.group_size, options.max_length)
        return unstopped.sample(prompts, features, uniforms, options.temperature)

    prompts = [] if prompt is None else [prompt] * count
    for some, done in policy.sampled_together.passes(prompts, sample, "sampling", count):
        if done is None:
            raise ModelError(f"out of memory while sampling answers to one product of {len(some[0].input_ids)} prompt "
                             f"tokens. {ADVICE}")


def try_update(learner: Learner, prompt: Prompt | None, count: int, options: TrainOptions) -> None:
    """Add the gradient of so many products to what is there."""
    backward(learner, pretended(learner.policy, prompt, count, options), options, on_policy=False)


def pretended(policy: Policy, prompt: Prompt | None, count: int, options: TrainOptions) -> list[Experience]:
    """So many products with a group of the longest answers; none without a prompt."""
    with torch.no_grad(), gathered(policy):  # in all processes, also in one that found no product
        return [] if prompt is None else [longest_answers(policy, prompt, options)] * count


def longest_answers(policy: Policy, prompt: Prompt, options: TrainOptions) -> Experience:
    """A group of the longest answers to a product, as an update would meet it."""
    features = None if options.train_vision else policy.photo_features([prompt])
    item = pretend(policy, prompt, answers_a_product(options), options.max_length, features)
    item = item if options.kl_weight else replace(item, ref_log_probs=None)
    return replace(item, blind=item) if options.look_weight and prompt.photos else item


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


def refuse_too_large(fits: int, total: int, peak: int) -> None:
    """Raise ModelError when a pass of the largest product leaves less free than has to stay free."""
    if not fits:
        raise ModelError(f"a pass of the largest product takes {peak / GIB:.1f} GiB, with weights and with room for "
                         f"Adam's moments; the GPU has {total / GIB:.1f}, a tenth of which is kept free. {ADVICE}")


def products_that_fit(total: int, held: int, peak: int, moments: int, most: int) -> int:
    """How many products a pass can take, 0 to most, after one took memory from held up to peak, all in bytes."""
    room = (1 - _KEPT_FREE) * total - held - moments
    return int(max(0, min(most, room // max(peak - held, 1))))


def moments_to_come(learner: Learner) -> int:
    """The bytes that Adam takes at its first step, where the policy computes: two moments for each number that trains
    in this process."""
    if learner.optimizer.state:
        return 0
    in_8_bits, device = not isinstance(learner.optimizer, torch.optim.AdamW), learner.policy.device.type
    return sum(moments_of(local_numel(parameter), in_8_bits) for parameter in learner.parameters
               if parameter.device.type == device)  # with --offload they are on the host


def moments_of(numbers: int, in_8_bits: bool) -> int:
    """The bytes of the moments of a tensor; bitsandbytes leaves small ones in float32, others have a scale for 256."""
    return 2 * (numbers + 4 * -(-numbers // 256)) if in_8_bits and numbers >= 4096 else 8 * numbers


def local_numel(parameter: torch.Tensor) -> int:
    """The numbers of a parameter that this process holds."""
    return parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()


def peak_memory() -> int:
    """The most bytes that were resident in this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def least(processes: Processes, number: int) -> int:
    """The smallest of all processes' numbers."""
    return min(processes.gather(number))
