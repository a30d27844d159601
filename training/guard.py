"""Compare the fast path with the slow one on real prompts, before the first step: nothing wrong trains in silence.

Two prompts of unequal length, the longer with photos where the sheet has any, are answered and scored together, so that
one is padded, and the longer alone. Behind bfloat16's rounding all but the worst faults would hide, so there everything
is compared in float32 first, where that fits; then as it trains, where they may differ by what the slow one rounds.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from loguru import logger
from torch import Tensor, nn

from config import TrainOptions
from models.family import ModelError, Prompt
from models.policy import Policy
from models.processes import ALONE, Processes
from models.sharding import differentiating, gathered, gathering_in_float32, is_split
from rollout import PromptEncoder, PromptError, RolloutFailure, draw_uniforms
from sheets.samples import PhotoError, Sample

GROUP = 2  # answers to each prompt
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
    uniforms: Tensor  # (prompts * GROUP, T)
    completions: Tensor  # (prompts * GROUP, T)
    action_mask: Tensor  # (prompts * GROUP, T)
    temperature: float

    def part(self, places: Sequence[int]) -> "Trial":
        """Some of the prompts with their answers."""
        rows = [place * GROUP + row for place in places for row in range(GROUP)]
        return Trial([self.prompts[place] for place in places], [self.features[place] for place in places],
                     self.uniforms[rows], self.completions[rows], self.action_mask[rows], self.temperature)


@dataclass(frozen=True)
class Scored:
    """What a policy makes of answers."""

    log_probs: Tensor  # (answers, T)
    gradient: Tensor  # of their sum at some weights, one vector; one 0 without any

    def gap(self, other: "Scored", mask: Tensor) -> Gap:
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
    prompts = choose_prompts(encoder, products)
    if not all(processes.gather(bool(prompts))):  # what is split computes in all processes or in none
        logger.warning("the fast path is not checked: not every process can open a product")
        return
    trial = make_trial(policy, prompts, options)
    theirs = trial
    if reference is not None and not shares_vision:
        with torch.no_grad():
            theirs = replace(trial, features=reference.photo_features(prompts))
    if policy.dtype == torch.float32:
        said = compare(policy, reference, trial, theirs, slow_path(policy, trial), EXACT)
    else:
        said = compare_rounded(policy, reference, trial, theirs, processes)
    lengths = " and ".join(str(len(prompt.input_ids)) for prompt in prompts)
    logger.info(f"fast path against one answer at a time: {said}; prompts of {lengths} tokens, "
                f"{time.perf_counter() - begin:.1f} s")


def choose_prompts(encoder: PromptEncoder, products: Sequence[Sample]) -> list[Prompt]:
    """The prompt of a product and that of its text without photos, or of a longer text; the shorter first.

    The product is the first with photos that can be encoded, or else the first; nothing if none can.
    """
    for product in sorted(products, key=lambda sample: not sample.photos):
        try:
            prompt = encoder.encode(product)
        except (PhotoError, PromptError) as problem:
            logger.warning(f"the fast path can't be checked on this product: {RolloutFailure(product, str(problem))}")
            continue
        text = product.text if prompt.photos else f"{product.text} 1 2 3 4 5"
        return sorted([prompt, encoder.encode_parts(text, [])], key=lambda each: len(each.input_ids))
    return []


def make_trial(policy: Policy, prompts: list[Prompt], options: TrainOptions) -> Trial:
    """Encode the photos, once for all that follows, and sample the answers."""
    with torch.no_grad():
        features = policy.photo_features(prompts)
    uniforms = torch.cat([draw_uniforms(f"guard/{place}", GROUP, options.max_length) for place in range(len(prompts))])
    with gathered(policy):
        answers = policy.sample(prompts, features, uniforms, options.temperature)
    return Trial(prompts, features, uniforms, answers.completions, answers.action_mask, options.temperature)


def compare_rounded(policy: Policy, reference: Policy | None, trial: Trial, theirs: Trial, processes: Processes) -> str:
    """Compare in float32 where that fits, and as it trains; returns the largest gaps in words."""
    exact = compare_in_float32(policy, reference, trial, theirs, processes)
    slow = slow_path(policy, trial)
    if exact is None:
        return compare(policy, reference, trial, theirs, slow, ROUNDED)
    said, noise = exact[0], exact[1].gap(joined(slow), trial.action_mask)
    limits = Gap(*(max(NOISE * getattr(noise, name), least) for name, least in vars(ROUNDED).items()))
    return f"{said} in float32; {compare(policy, reference, trial, theirs, slow, limits)} in bfloat16"


def compare_in_float32(policy: Policy, reference: Policy | None, trial: Trial, theirs: Trial, processes: Processes
                       ) -> tuple[str, Scored] | None:
    """Compare in float32; returns the largest gaps in words and what the slow path gave, None where it does not fit."""
    four_bits = getattr(policy.model, "is_loaded_in_4bit", False)
    try:
        if not four_bits and all(processes.gather(has_room(policy))):
            with in_float32(policy) as wide, in_float32(reference) as wide_reference:
                slow = slow_path(wide, trial)
                return compare(wide, wide_reference, trial, theirs, slow, EXACT), joined(slow)
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
    """Whether the GPU holds all weights of a split policy in float32 too: no process alone could back out of that."""
    if not is_split(policy) or policy.device.type != "cuda":
        return True
    wanted = 4 * sum(parameter.numel() for parameter in policy.model.parameters())
    return torch.cuda.mem_get_info(policy.device)[0] > 1.2 * wanted


@contextmanager
def in_float32(policy: Policy | None) -> Iterator[Policy | None]:
    """The same policy computing in float32: what its language model holds in bfloat16 is widened for the time."""
    if policy is None:
        yield None
        return
    wide = copy.copy(policy)
    wide.dtype = torch.float32
    held = {parameter for part in (policy.family.language_model(policy.model), policy.family.head(policy.model))
            for parameter in part.parameters() if parameter.dtype == torch.bfloat16 and not is_split(policy)}
    try:
        for parameter in held:
            parameter.data = parameter.data.float()
        with gathering_in_float32(policy):
            yield wide
    finally:
        for parameter in held:
            parameter.data = parameter.data.bfloat16()  # to the bit what it was


def compare(policy: Policy, reference: Policy | None, trial: Trial, theirs: Trial, slow: Sequence[Scored], limits: Gap
            ) -> str:
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
        fast = score(policy, part, choose_probes(policy))
        judge("updated", batch, joined(slow, places).gap(fast, part.action_mask))
        with gathered(policy):
            answers = policy.sample(part.prompts, part.features, part.uniforms, part.temperature)
            if not torch.equal(answers.completions, part.completions):  # others than those just scored
                part = replace(part, completions=answers.completions, action_mask=answers.action_mask)
                fast = score(policy, part, [])
        judge("sampled", batch, fast.gap(replace(fast, log_probs=answers.old_log_probs), part.action_mask))
    if reference is not None:
        slow_reference = slow_path(reference, theirs, trains=False)
        for batch, places in BATCHES.items():
            part = theirs.part(places)
            judge("reference", batch, joined(slow_reference, places).gap(score(reference, part, []), part.action_mask))
    said = ", ".join(f"{name} {max(gap.most for gap in found):.1e}" for name, found in gaps.items())
    return f"{said}, gradient {max(gap.gradient for gap in gaps['updated']):.1e}"


def choose_probes(policy: Policy) -> list[nn.Parameter]:
    """Small trainable weights of the first and the last decoder layer: gradients reach the first through all others."""
    layers = policy.family.language_model(policy.model).layers
    return [parameter for layer in (layers[0], layers[-1]) for parameter in layer.parameters()
            if parameter.requires_grad and parameter.numel() <= 2 ** 20]


def slow_path(policy: Policy, trial: Trial, trains: bool = True) -> list[Scored]:
    """Score one answer at a time; returns one Scored a prompt. trains False leaves the gradient out."""
    probes = choose_probes(policy) if trains else []
    return [score(policy, trial.part([place]), probes, exact_path=True) for place in range(len(trial.prompts))]


def score(policy: Policy, trial: Trial, probes: Sequence[nn.Parameter], exact_path: bool = False) -> Scored:
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
    return Scored(torch.cat(log_probs), gradient)


def joined(scored: Sequence[Scored], places: Sequence[int] = (0, 1)) -> Scored:
    """What some prompts' answers give together."""
    return Scored(torch.cat([scored[place].log_probs for place in places]),
                  sum((scored[place].gradient for place in places), torch.zeros((), device=scored[0].gradient.device)))
