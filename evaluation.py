"""Policy + products -> records: what was answered, how it was read, what it was worth. Training, run.py and
test_model.py all answer through here, so that prompt, sampling and parser are the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from PIL import Image

from data import Sample, load_photos
from reward import SUCCESS_REWARD, RewardParts
from rollout import PromptEncoder, RolloutFailure, rollout_groups

FAILURE_REWARD = 0.3  # answers below it count as plainly wrong


@dataclass(frozen=True)
class Record:
    """One product's answers."""

    sample: Sample
    answers: list[str]
    parts: list[RewardParts]

    @property
    def key(self) -> tuple[str, int]:
        """Which product this is: sheet and row."""
        return self.sample.sheet, self.sample.row

    @property
    def rewards(self) -> list[float]:
        """The reward of each answer."""
        return [part.reward for part in self.parts]

    @property
    def reward(self) -> float:
        """The mean reward of the product's answers."""
        return fmean(self.rewards)


def evaluate(encoder: PromptEncoder, samples: Sequence[Sample], num_samples: int, temperature: float | None,
             max_length: int, seed: int, batch_size: int) -> tuple[list[Record], list[RolloutFailure]]:
    """Answer each product num_samples times (once if greedy: temperature None) and score the answers."""
    groups, failures = rollout_groups(encoder, samples, 1 if temperature is None else num_samples, temperature,
                                      max_length, f"evaluate/{seed}", batch_size)
    return [Record(group.sample, group.answers, group.rewards) for group in groups], failures


def summarise(records: Sequence[Record]) -> dict[str, float]:
    """Reduce records to the figures that are compared; shares are of answers, 0 to 1."""
    parts = [part for record in records for part in record.parts]
    if not parts:
        return {}
    return {
        "mean_reward": fmean(part.reward for part in parts),
        "success_rate": fmean(part.reward >= SUCCESS_REWARD for part in parts),
        "failure_rate": fmean(part.reward < FAILURE_REWARD for part in parts),
        "zero_rate": fmean(part.reward == 0 for part in parts),
        "valid_rate": fmean(part.valid for part in parts),
        "products": len(records),
        "answers": len(parts),
    }


def blank_photos(sample: Sample) -> list[Image.Image]:
    """Open a product's photos as plain grey pictures of the same sizes."""
    return [Image.new("RGB", photo.size, (128, 128, 128)) for photo in load_photos(sample)]


def with_other_photos(samples: Sequence[Sample]) -> list[Sample]:
    """Give every product the photos of the next one that has as many, in a ring; the label stays its own."""
    by_count: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        by_count.setdefault(len(sample.photos), []).append(index)
    swapped = list(samples)
    for ring in by_count.values():
        for position, index in enumerate(ring):
            swapped[index] = replace(samples[index], photos=samples[ring[position - 1]].photos)
    return swapped


def ablations(samples: Sequence[Sample], make_encoder: Callable[..., PromptEncoder]
              ) -> dict[str, tuple[PromptEncoder, list[Sample]]]:
    """Pair each photo ablation with the encoder and the products that carry it out."""
    return {"photos blanked": (make_encoder(open_photos=blank_photos), list(samples)),
            "other products' photos": (make_encoder(), with_other_photos(samples))}
