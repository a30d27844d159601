"""The reward of an answer: read the sizes in it, compare them with the label's. Pure functions, no torch.

    sort both sides descending;  reward = max(0, 1 - (1/N) * sum_i |pred_i - true_i| / true_i),  N = label dimensions
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sizes.answers import read_answer
from sizes.labels import LabelError, parse_label

SUCCESS_REWARD = 0.9


@dataclass(frozen=True)
class RewardParts:
    """A reward and what it is made of: sizes in cm, descending; one error per label dimension, largest first.

    named: the parts of a reward of the user's own, weighted; their sum is then the reward.
    """

    reward: float
    sizes: tuple[float, ...]
    errors: tuple[float, ...]
    valid: bool
    reason: str
    named: tuple[tuple[str, float], ...] = ()


def calculate_reward(answer: str, sample_label: str | Sequence[float]) -> float:
    """Score an answer in [0, 1] against a label: a label string, or numbers in cm. Never raises."""
    return score_answer(answer, sample_label).reward


def score_answer(answer: str, label: str | Sequence[float]) -> RewardParts:
    """Score an answer and keep the parts. An unreadable label scores 0.0, not valid, and is the reason."""
    reading = read_answer(answer)
    sizes = tuple(sorted((size for size in reading.sizes if size is not None), reverse=True))
    try:
        true_sizes = sorted(parse_label(label), reverse=True)
    except LabelError as error:
        return RewardParts(0.0, sizes, (), False, reading.reason or str(error))
    errors = [abs(size - true) / true for size, true in zip(sizes, true_sizes, strict=False)]
    errors += [1.0] * (len(true_sizes) - len(sizes))  # no credit for what the answer lacks
    reward = max(0.0, 1 - sum(errors) / len(true_sizes))
    return RewardParts(reward, sizes, tuple(errors), reading.valid, reading.reason)
