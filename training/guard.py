"""Compare the fast path with the slow one on real prompts, before the first step: nothing wrong trains in silence.

Two prompts of unequal length, the longer with photos where the sheet has any, are taken together, so that one is
padded, and the longer alone. Behind the rounding of bfloat16 or TF32 most faults would hide, so there the policy is
compared in float32 first, where that fits; then everything as it trains, within what the slow path itself rounds.

Weights that are split are gathered a layer at a time, also while answers are written, and their layers checkpointed, so
that less memory is needed than in training.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from loguru import logger
from torch import Tensor, nn

from config import TrainOptions
from models.family import ModelError, Prompt
from models.policy import Generation, Policy
from models.processes import ALONE, Processes
from models.sharding import differentiating, gathering_in_float32, give_back, is_split, numbers_at_once
from rollout import PromptEncoder, PromptError, RolloutFailure, draw_uniforms
from sheets.samples import PhotoError, Sample

GROUP, TOKENS = 2, 16  # answers to each prompt, and tokens of an answer at most: more only take longer
TOKENS_SPLIT = 6  # for each of them every layer is gathered
PROBED = 2 ** 18  # numbers of a layer whose gradient is looked at, or those of one weight: they are kept for each way
PHOTOS = 2  # of the product at most, for the same reason
BATCHES = {"two prompts together": [0, 1], "one prompt alone": [1]}


@dataclass(frozen=True)
class Gap:
    """How far two ways of computing lie apart: log-probs in nats, a gradient as a share of its length."""

    mean: float
    most: float
    gradient: float = 0.0


EXACT = Gap(1e-4, 1e-3, 1e-2)  # what may lie between the paths in float32
ROUNDED = Gap(0.05, 0.5, 0.3)  # in bfloat16, or NOISE times what lies between the slow path and float32
NOISE = 4


@dataclass(frozen=True)
class Trial:
    """What is computed in every way: prompts, the shorter first, and GROUP answers to each."""

    prompts: list[Prompt]
    features: list[Tensor | None]  # encoded photos, one a prompt
    uniforms: Tensor  # (prompts * GROUP, TOKENS or fewer)
    completions: Tensor  # (prompts * GROUP, T)
    action_mask: Tensor  # (prompts * GROUP, T)
    temperature: float

    def part(self, places: Sequence[int]) -> "Trial":
        """Some of the prompts with their answers."""
        rows = [place * GROUP + row for place in places for row in range(GROUP)]
        return Trial([self.prompts[place] for place in places], [self.features[place] for place in places],
                     self.uniforms[rows], self.completions[rows], self.action_mask[rows], self.temperature)


@dataclass(frozen=True)
class Outcome:
    """What a policy makes of answers."""

    log_probs: Tensor  # (answers, T)
    gradient: Tensor  # of their sum at some weights, one vector; one 0 without any

    def gap(self, other: "Outcome", mask: Tensor) -> Gap:
        """How far another way of computing lies from this one, over the tokens of mask (answers, T)."""
        apart = (other.log_probs - self.log_probs)[mask].abs()
        gradient = (other.gradient - self.gradient).norm() / self.gradient.norm().clamp(min=1e-30)
        return Gap(float(apart.mean()), float(apart.max()), float(gradient))


def check_fast_path(policy: Policy, reference: Policy | None, shares_vision: bool, encoder: PromptEncoder,
                    products: Sequence[Sample], options: TrainOptions, processes: Processes = ALONE) -> None:
    """Compare log-probs of sampling, update and reference, and the policy's gradient, on a product of the sheet.

    All processes call this together, for the same products: what is split is looked at as it is. Raises ModelError
    naming what differs and in which batch. The slow path takes one answer at a time, so it needs no more memory than
    training does.
    """
    begin = time.perf_counter()
    if is_split(policy):
        policy = copy.copy(policy)
        policy.gradient_checkpointing = True
    prompts = choose_prompts(encoder, products)
    if not all(processes.gather(bool(prompts))):  # what is split computes in all processes or in none
        logger.warning("the fast path is not checked: not every process can open a product")
        return
    trial = make_trial(policy, prompts, options)
    theirs = trial
    if reference is not None and not shares_vision:
        with torch.no_grad():
            theirs = replace(trial, features=reference.photo_features(prompts))
    if not policy.rounds:
        said = compare(policy, reference, trial, theirs, slow_path(policy, trial), EXACT, processes)
    else:
        said = compare_rounded(policy, reference, trial, theirs, processes)
    for each in filter(None, (policy, reference)):
        give_back(each)
    lengths = " and ".join(str(len(prompt.input_ids)) for prompt in prompts)
    logger.info(f"fast path against one answer at a time: {said}; prompts of {lengths} tokens, "
                f"{time.perf_counter() - begin:.1f} s")


def choose_prompts(encoder: PromptEncoder, products: Sequence[Sample]) -> list[Prompt]:
    """The prompt of a product and that of its text without photos, or of a longer text; the shorter first.

    The product is the first with photos that can be encoded, or else the first; nothing if none can.
    """
    for product in sorted(products, key=lambda sample: not sample.photos):
        try:
            prompt = encoder.encode(replace(product, photos=product.photos[:PHOTOS]))
            text = product.text if prompt.photos else f"{product.text} 1 2 3 4 5"
            other = encoder.encode(replace(product, text=text, photos=()))
        except (PhotoError, PromptError) as problem:
            logger.warning(f"the fast path can't be checked on this product: {RolloutFailure(product, str(problem))}")
            continue
        return sorted([prompt, other], key=lambda each: len(each.input_ids))
    return []


def make_trial(policy: Policy, prompts: list[Prompt], options: TrainOptions) -> Trial:
    """Encode the photos, once for all that follows, and sample the answers."""
    with torch.no_grad():
        features = policy.photo_features(prompts)
    columns = min(options.max_length, TOKENS_SPLIT if is_split(policy) else TOKENS)
    uniforms = torch.cat([draw_uniforms(f"guard/{place}", GROUP, columns) for place in range(len(prompts))])
    answers = sample(policy, prompts, features, uniforms, options.temperature)
    return Trial(prompts, features, uniforms, answers.completions, answers.action_mask, options.temperature)


def sample(policy: Policy, prompts: Sequence[Prompt], features: Sequence[Tensor | None], uniforms: Tensor,
           temperature: float) -> Generation:
    """Sample answers; where weights are split, no token stops one: all processes gather the layers equally often."""
    if is_split(policy):
        policy = copy.copy(policy)
        policy.stop_ids = policy.stop_ids[:0]
    return policy.sample(prompts, features, uniforms, temperature)


def compare_rounded(policy: Policy, reference: Policy | None, trial: Trial, theirs: Trial, processes: Processes) -> str:
    """Compare the policy in float32 where that fits, and all as it trains; returns the largest gaps in words."""
    exact = compare_in_float32(policy, trial, processes)
    slow = slow_path(policy, trial)
    if exact is None:
        return compare(policy, reference, trial, theirs, slow, ROUNDED, processes)
    said, noise = exact[0], exact[1].gap(joined(slow), trial.action_mask)
    limits = Gap(*(max(NOISE * getattr(noise, name), least) for name, least in vars(ROUNDED).items()))
    rounded = "TF32" if policy.dtype == torch.float32 else "bfloat16"
    return f"{said} in float32; {compare(policy, reference, trial, theirs, slow, limits, processes)} in {rounded}"


def compare_in_float32(policy: Policy, trial: Trial, processes: Processes) -> tuple[str, Outcome] | None:
    """Compare the policy's paths, which are the reference's as well, in float32.

    Returns the largest gaps in words and what the slow path gave, None where there is no room for that.
    """
    four_bits = getattr(policy.model, "is_loaded_in_4bit", False)
    try:
        if not four_bits and all(processes.gather(has_room(policy))):
            with in_float32(policy) as wide:
                slow = slow_path(wide, trial)
                return compare(wide, None, trial, trial, slow, EXACT, processes), joined(slow)
    except torch.OutOfMemoryError:
        pass
    finally:
        if policy.device.type == "cuda":  # the pre-flight pass is to see what training takes
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(policy.device)
    logger.warning("the fast path is not compared in float32: "
                   + ("weights in 4 bits can't be widened" if four_bits else "there is no memory for it")
                   + "; faults that are smaller than bfloat16's rounding would pass")
    return None


def has_room(policy: Policy) -> bool:
    """Whether the GPU has room for what a split policy gathers, in float32: no process alone could back out of that."""
    if not is_split(policy) or policy.device.type != "cuda":
        return True
    return torch.cuda.mem_get_info(policy.device)[0] > 1.2 * 4 * numbers_at_once(policy)


@contextmanager
def in_float32(policy: Policy) -> Iterator[Policy]:
    """The same policy computing in full float32: what its language model holds in bfloat16 is widened for the time."""
    wide, precision = copy.copy(policy), torch.get_float32_matmul_precision()
    wide.dtype = torch.float32
    held = {parameter for part in (policy.family.language_model(policy.model), policy.family.head(policy.model))
            for parameter in part.parameters() if parameter.dtype == torch.bfloat16 and not is_split(policy)}
    try:
        torch.set_float32_matmul_precision("highest")
        for parameter in held:
            parameter.data = parameter.data.float()
        with gathering_in_float32(policy):
            yield wide
    finally:
        for parameter in held:
            parameter.data = parameter.data.bfloat16()  # to the bit what it was
        torch.set_float32_matmul_precision(precision)


def compare(policy: Policy, reference: Policy | None, trial: Trial, theirs: Trial, slow: Sequence[Outcome], limits: Gap,
            processes: Processes) -> str:
    """Hold the fast path, in every batch, against the slow one; returns the largest gaps in words.

    theirs: the trial with photos as the reference sees them. slow: what the slow path gave, one a prompt.
    """
    gaps: dict[str, list[Gap]] = defaultdict(list)

    def judge(name: str, batch: str, gap: Gap) -> None:
        wrong = "the fast path is wrong for this model: "
        if not (gap.mean < limits.mean and gap.most < limits.most):  # so that NaN is caught as well
            raise ModelError(f"{wrong}{name} log-probs are {gap.mean:.2g} away on average and {gap.most:.2g} at most "
                             f"from those of one answer at a time, {batch}. Take --exact_path")
        if not gap.gradient < limits.gradient:
            raise ModelError(f"{wrong}its gradient is {gap.gradient:.0%} of its length away from that of one answer at "
                             f"a time, {batch}. Take --exact_path")
        gaps[name].append(gap)

    for batch, places in BATCHES.items():
        part = trial.part(places)
        fast = outcome_of(policy, part, choose_probes(policy))
        judge("updated", batch, joined(slow, places).gap(fast, part.action_mask))
        answers = sample(policy, part.prompts, part.features, part.uniforms, part.temperature)
        others = not torch.equal(answers.completions, part.completions)  # than those above
        if any(processes.gather(others)) if is_split(policy) else others:
            part = replace(part, completions=answers.completions, action_mask=answers.action_mask)
            fast = outcome_of(policy, part, [])
        judge("sampled", batch, fast.gap(replace(fast, log_probs=answers.old_log_probs), part.action_mask))
    if reference is not None:
        slow_reference = slow_path(reference, theirs, trains=False)
        for batch, places in BATCHES.items():
            part = theirs.part(places)
            fast = outcome_of(reference, part, [])
            judge("reference", batch, joined(slow_reference, places).gap(fast, part.action_mask))
    said = ", ".join(f"{name} {max(gap.most for gap in found):.1e}" for name, found in gaps.items())
    return f"{said}, gradient {max(gap.gradient for gap in gaps['updated']):.1e}"


def choose_probes(policy: Policy) -> list[nn.Parameter]:
    """The smallest trainable weights of the first and the last decoder layer: gradients reach the first through all
    others."""
    layers, chosen = policy.family.language_model(policy.model).layers, []
    for layer in (layers[0], layers[-1]):
        trainable = sorted((each for each in layer.parameters() if each.requires_grad), key=nn.Parameter.numel)
        count = sum(so_far <= PROBED for so_far in accumulate(each.numel() for each in trainable))
        chosen += trainable[:max(1, count)]
    return chosen


def slow_path(policy: Policy, trial: Trial, trains: bool = True) -> list[Outcome]:
    """Take one answer at a time; returns one Outcome a prompt. trains False leaves the gradient out."""
    probes = choose_probes(policy) if trains else []
    return [outcome_of(policy, trial.part([place]), probes, exact_path=True) for place in range(len(trial.prompts))]


def outcome_of(policy: Policy, trial: Trial, probes: Sequence[nn.Parameter], exact_path: bool = False) -> Outcome:
    """Log-probs of a trial's answers, all in one pass or one at a time, and the gradient of their sum at the probes."""
    parts = [slice(row, row + 1) for row in range(len(trial.completions))] if exact_path else [slice(None)]
    log_probs, gradient = [], torch.zeros((), device=policy.device)
    for part in parts:
        with torch.set_grad_enabled(bool(probes)), differentiating(policy, probes) as gradients:
            found, _ = policy.log_probs(trial.prompts, trial.completions[part], trial.action_mask[part],
                                        trial.temperature, trial.features, exact_path, with_entropy=False)
            if probes:
                gradient = gradient + torch.cat([each.float().flatten() for each in gradients(found.sum())])
        log_probs.append(found.detach())
    return Outcome(torch.cat(log_probs), gradient)


def joined(outcomes: Sequence[Outcome], places: Sequence[int] = (0, 1)) -> Outcome:
    """What some prompts' answers give together."""
    chosen = [outcomes[place] for place in places]
    return Outcome(torch.cat([each.log_probs for each in chosen]),
                   torch.stack([each.gradient for each in chosen]).sum(0))
