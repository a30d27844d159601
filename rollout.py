"""One product -> one group: photos encoded and prompt prefilled once, G answers sampled, rewards attached.

Nothing here invents an answer: a product that can't be rolled out becomes a RolloutFailure with its row.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from loguru import logger
from PIL import Image
from torch import Tensor

from config import TrainOptions
from ground.errors import UserError
from models.family import Prompt, PromptParts
from models.policy import Generation, Policy
from models.preparing import Preparer
from prompts import build_prompt
from reward import RewardParts, score_answer
from sheets.samples import PhotoError, Sample, load_photos


@dataclass
class Group:
    """The candidates of one product. G answers, T completion tokens."""

    sample: Sample | None
    prompt: Prompt
    features: Tensor | None  # encoded photos (photo tokens, width)
    completions: Tensor  # (G, T) ids as sampled
    action_mask: Tensor  # (G, T) bool, the stop token included
    old_log_probs: Tensor  # (G, T) at the sampling temperature
    truncated: Tensor  # (G,) bool
    answers: list[str]
    parts: list[RewardParts]

    @property
    def rewards(self) -> list[float]:
        """The reward of each answer."""
        return [part.reward for part in self.parts]

    def rewards_each(self) -> tuple[Tensor, Tensor]:
        """Each of several rewards: weights (K,) and values without them (K, G), 0 where an answer has no such part."""
        weights = {name: weight for part in self.parts for name, weight, _ in part.each} or {"": 1.0}
        values = [{name: value for name, _, value in part.each} or {"": part.reward} for part in self.parts]
        return (torch.tensor(list(weights.values())),
                torch.tensor([[own.get(name, 0.0) for own in values] for name in weights]))

    def flat(self, each: bool = False) -> bool:
        """Whether all answers earn the same, in all or by each reward, so that nothing can be learnt from them."""
        rewards = self.rewards_each()[1] if each else torch.tensor([self.rewards], dtype=torch.float64)
        return bool((rewards == rewards[:, :1]).all())


@dataclass(frozen=True)
class RolloutFailure:
    """A product that gave no group, and why."""

    sample: Sample
    reason: str

    def __str__(self) -> str:
        return f"{self.sample.sheet} row {self.sample.row} ({self.sample.product_id}): {self.reason}"


class PromptError(ValueError):
    """A product that no prompt can be made of; the text says why."""


class PromptTooLong(PromptError):
    """A product whose text alone is longer than the limit; the text says by how much."""


# What processors raise for a product they were not made for, those that come with a model's weights among them.
_PROCESSOR_ERRORS = (ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, RuntimeError,
                     OSError, MemoryError)


@dataclass(frozen=True)
class PromptMaker:
    """Make a product's prompt. Needs no model: a worker process has one with the policy's parts in its place."""

    parts: Policy | PromptParts
    language: str = "zh"
    template: str | None = None
    max_prompt_length: int | None = None
    open_photos: Callable[[Sample], list[Image.Image]] = load_photos

    def __call__(self, sample: Sample) -> Prompt:
        """Drop whole photos from the end until the prompt fits: a cut through a photo's tokens would break it."""
        photos = self.open_photos(sample)
        limit = self.max_prompt_length
        prompt = self.encode_parts(sample.text, photos)
        kept = len(photos)
        while limit and len(prompt.input_ids) > limit and kept:
            kept -= 1
            prompt = self.encode_parts(sample.text, photos[:kept])
        if limit and len(prompt.input_ids) > limit:
            raise PromptTooLong(f"the text alone makes {len(prompt.input_ids)} tokens, max_prompt_length is {limit}")
        if kept < len(photos):
            logger.warning(f"{sample.sheet} row {sample.row} ({sample.product_id}): {kept} of {len(photos)} photos "
                           f"used, for max_prompt_length {limit}")
        return replace(prompt, num_photos=kept)

    def encode_parts(self, text: str, photos: Sequence[Any]) -> Prompt:
        """Prepare a prompt from a text and opened photos; raises PromptError for what the processor raises."""
        try:
            return self.parts.encode_prompt(build_prompt(text, photos, self.language, self.template), photos)
        except UserError:
            raise
        except _PROCESSOR_ERRORS as problem:
            raise PromptError(f"the model's processor fails on it: {type(problem).__name__}: {problem}") from problem


class PromptEncoder:
    """Turn samples into prompts, keeping recent ones: least recently used go first beyond cache_mb.

    prefetch() prepares those to come while the model computes, on a thread or in worker processes (preparing.py); they
    count towards cache_mb, too. Ask from one thread only.
    """

    def __init__(self, policy: Policy, language: str = "zh", template: str | None = None, cache_mb: int = 512,
                 max_prompt_length: int | None = None,
                 open_photos: Callable[[Sample], list[Image.Image]] = load_photos, workers: int = 0):
        self.policy = policy
        self.template = template
        self._make = PromptMaker(policy, language, template, max_prompt_length, open_photos)
        self._preparer = Preparer(self._make, policy.prompt_parts, workers, pinned=policy.device.type == "cuda")
        self._limit = cache_mb * 2 ** 20
        self._held: OrderedDict[Sample, Prompt] = OrderedDict()
        self._bytes = 0  # of what is held
        self._wanted: dict[Sample, None] = {}  # to be prepared ahead, in this order, when there is room
        self._coming: dict[Sample, Future[Prompt]] = {}
        self._largest = 0  # bytes of a prompt so far

    def prefetch(self, samples: Sequence[Sample]) -> None:
        """Begin to prepare the prompts of samples that encode() will be asked for; what fails is raised there."""
        for sample in samples:
            if sample in self._held:
                self._held.move_to_end(sample)
            elif sample not in self._coming:
                self._wanted[sample] = None
        self._prepare_wanted()

    def encode(self, sample: Sample) -> Prompt:
        """Prepare one product's prompt.

        Raises PhotoError naming the row when a photo can't be read, PromptError when no prompt can be made of the
        product: the model's processor raises, or dropping photos does not make it short enough.
        """
        if sample in self._held:
            self._held.move_to_end(sample)
            return self._held[sample]
        self._wanted.pop(sample, None)
        coming = self._coming.pop(sample, None) or self._preparer.submit(sample)
        prompt = coming.result()
        self._largest = max(self._largest, prompt.num_bytes)
        self._held[sample] = prompt
        self._bytes += prompt.num_bytes
        self._prepare_wanted()
        return prompt

    def forget(self, samples: Sequence[Sample]) -> None:
        """Keep the prompts of these samples no longer."""
        for sample in samples:
            prompt = self._held.pop(sample, None)
            self._bytes -= prompt.num_bytes if prompt else 0

    def _prepare_wanted(self) -> None:
        """Begin to prepare what is wanted and has room; what is held makes way for it."""
        while self._wanted and self._has_room():
            sample = next(iter(self._wanted))
            del self._wanted[sample]
            self._coming[sample] = self._preparer.submit(sample)
        while self._held and self._bytes + self._bytes_coming() > self._limit:
            self.forget([next(iter(self._held))])

    def _has_room(self) -> bool:
        if not self._largest:  # the first says how large they are
            return self._limit > 0 and not self._coming
        return self._bytes_coming() + self._largest <= self._limit

    def _bytes_coming(self) -> int:
        """Bytes of the prompts prepared ahead; one that is not done yet counts as the largest so far."""
        return sum(_bytes_of(coming) if coming.done() else self._largest for coming in self._coming.values())

    def encode_parts(self, text: str, photos: Sequence[Any]) -> Prompt:
        """Prepare a prompt from a text and opened photos; raises PromptError for what the processor raises."""
        return self._make.encode_parts(text, photos)


def _bytes_of(prepared: Future[Prompt]) -> int:
    return 0 if prepared.exception() else prepared.result().num_bytes


def rollout(model: Any, tokenizer: Any, image_processor: Any, text: str, images: Sequence[Any], ground_truth: Any,
            num_rollouts: int = 12, temperature: float = 0.7, max_length: int = 64, seed: int = 0,
            language: str = "zh") -> Group:
    """Sample a group of answers to one product and score them against its label.

    images: zero to five PIL images. ground_truth: a label as in the sheet, or sizes in cm.
    """
    policy = Policy(model, tokenizer, image_processor)
    prompt = PromptEncoder(policy, language).encode_parts(text, images)
    uniforms = draw_uniforms(f"{seed}", num_rollouts, max_length)
    with torch.no_grad():
        features = policy.photo_features([prompt])
    generation = policy.sample([prompt], features, uniforms, temperature)
    return _cut_groups(policy, [None], [prompt], features, generation, [ground_truth])[0]


def products_together(options: TrainOptions, policy: Policy) -> int:
    """How many products a run samples together at most; what does not fit is halved."""
    return options.rollout_batch_size or (4 if policy.device.type == "cpu" else options.batch_size)


def rollout_groups(encoder: PromptEncoder, samples: Sequence[Sample], group_size: int, temperature: float | None,
                   max_length: int, seed: str, rollout_batch_size: int) -> tuple[list[Group], list[RolloutFailure]]:
    """Sample one group for each product, rollout_batch_size products at a time, in the order of `samples`.

    temperature None answers greedily. seed: with the sample's key it decides every token, whatever products are
    sampled together, but for rounding (Policy.sample). Where memory runs out, fewer are sampled together, from then on.
    Products whose photos can't be read, for which alone there is no memory or whose log-probs are not finite come back
    as failures.
    """
    failures, prompts = [], {}
    for index, sample in enumerate(samples):
        try:
            prompts[index] = encoder.encode(sample)
        except (PhotoError, PromptError) as problem:
            failures.append(RolloutFailure(sample, str(problem)))
    groups: dict[int, Group] = {}
    by_length = sorted(prompts, key=lambda index: len(prompts[index].input_ids))  # little padding, few masks

    def sample_some(chunk: Sequence[int]) -> list[Group]:
        return _sample_groups(encoder.policy, [samples[index] for index in chunk], [prompts[index] for index in chunk],
                              group_size, temperature, max_length, seed)

    for chunk, sampled in encoder.policy.sampled_together.passes(by_length, sample_some, "sampling",
                                                                 rollout_batch_size):
        if sampled is None:
            tokens = len(prompts[chunk[0]].input_ids)
            failures.append(RolloutFailure(samples[chunk[0]], f"out of memory while sampling it alone, {tokens} prompt "
                                           f"tokens and {group_size} answers; smaller photos, a shorter text or fewer "
                                           "answers take less"))
            continue
        for index, group in zip(chunk, sampled, strict=True):
            if bool(torch.isfinite(group.old_log_probs).all()):
                groups[index] = group
            else:
                failures.append(RolloutFailure(samples[index], "the policy's log-probs are not finite"))
    return [groups[index] for index in sorted(groups)], failures


def sample_flat_again(groups: Sequence[Group], times: int,
                      sample: Callable[[list[Sample], int], tuple[list[Group], list[RolloutFailure]]],
                      each: bool = False) -> tuple[list[Group], list[RolloutFailure]]:
    """Sample flat groups again, at most so many times, and leave out those that stay flat; 0 times leaves all in.

    sample(products, number): how to, for the number-th time. each: see Group.flat. Also returns what failed. Dynamic
    sampling, arXiv 2503.14476, section 3.2, with the same products instead of others.
    """
    kept, failures = list(groups), []
    for number in range(1, times + 1):
        flat = [group.sample for group in kept if group.flat(each)]
        if not flat:
            break
        sampled, failed = sample(flat, number)
        again = {(group.sample.sheet, group.sample.row): group for group in sampled}
        kept = [again.get((group.sample.sheet, group.sample.row), group) if group.flat(each) else group
                for group in kept]
        failures += failed
    return [group for group in kept if not (times and group.flat(each))], failures


def _sample_groups(policy: Policy, samples: Sequence[Sample], prompts: Sequence[Prompt], group_size: int,
                   temperature: float | None, max_length: int, seed: str) -> list[Group]:
    with torch.no_grad():
        features = policy.photo_features(prompts)
    uniforms = torch.cat([draw_uniforms(f"{seed}/{sample.key}", group_size, max_length)
                          for sample in samples])  # (B * G, T)
    generation = policy.sample(prompts, features, uniforms, temperature)
    return _cut_groups(policy, samples, prompts, features, generation, [sample.label for sample in samples])


def _cut_groups(policy: Policy, samples: Sequence[Sample | None], prompts: Sequence[Prompt],
                features: Sequence[Tensor | None], generation: Generation, labels: Sequence[Any]) -> list[Group]:
    """Cut a batch of answers into groups, each as wide as its longest answer, and score the answers."""
    answers = policy.answers(generation.completions, generation.action_mask)
    group_size = len(answers) // len(prompts)
    groups = []
    for index, (sample, prompt, label) in enumerate(zip(samples, prompts, labels, strict=True)):
        rows = slice(index * group_size, (index + 1) * group_size)
        mask = generation.action_mask[rows]
        columns = int(mask.sum(1).max())
        groups.append(Group(sample, prompt, features[index], generation.completions[rows, :columns],
                            mask[:, :columns], generation.old_log_probs[rows, :columns], generation.truncated[rows],
                            answers[rows], [score_answer(answer, label) for answer in answers[rows]]))
    return groups


def draw_uniforms(seed: str, rows: int, columns: int) -> Tensor:
    """Draw the random numbers of one group, (rows, columns) float64 in [0, 1): a pure function of the seed string."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1
    return torch.rand(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
