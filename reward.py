"""The reward of an answer: read the sizes in it, compare them with the label's. Pure functions, no torch.

    reward = max(0, 1 - (1/N) * sum_i |pred_i - true_i| / true_i),  N = label dimensions

Three sizes: both sides sorted, largest first. One or two that name their axes are compared by those axes; others are
sorted, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from sizes.answers import Reading, read_answer
from sizes.labels import Label, LabelError, parse_label

SUCCESS_REWARD = 0.9


@dataclass(frozen=True)
class RewardParts:
    """A reward and what it is made of: sizes in cm, descending; one error per label dimension, largest first.

    named: the parts of a reward of the user's own, weighted; their sum is then the reward. each: the same parts, as
    (name that no other has, weight, value without it). compared: what each label dimension was compared with, None
    where the answer lacks it.
    """

    reward: float
    sizes: tuple[float, ...]
    errors: tuple[float, ...]
    valid: bool
    reason: str
    named: tuple[tuple[str, float], ...] = ()
    compared: tuple[float | None, ...] = ()
    each: tuple[tuple[str, float, float], ...] = ()


def calculate_reward(answer: str, sample_label: str | Sequence[float]) -> float:
    """Score an answer in [0, 1] against a label: a label string, or numbers in cm. Never raises."""
    return score_answer(answer, sample_label).reward


def score_answer(answer: str, label: str | Sequence[float]) -> RewardParts:
    """Score an answer and keep the parts. An unreadable label scores 0.0, not valid, and is the reason."""
    reading = read_answer(answer)
    sizes = tuple(sorted((size for size in reading.sizes if size is not None), reverse=True))
    try:
        true = parse_label(label)
    except LabelError as error:
        return RewardParts(0.0, sizes, (), False, reading.reason or str(error))
    if len(true) < 3 and true.axes:
        pairs = sorted(zip(true, by_axis(reading, true), strict=True), key=lambda pair: -pair[0])
    else:
        pairs = list(zip(sorted(true, reverse=True), [*sizes, None, None, None][:len(true)], strict=True))
    # No credit for what the answer lacks.
    errors = tuple(1.0 if size is None else abs(size - wanted) / wanted for wanted, size in pairs)
    reward = max(0.0, 1 - sum(errors) / len(errors))
    return RewardParts(reward, sizes, errors, reading.valid, reading.reason, compared=tuple(size for _, size in pairs))


def by_axis(reading: Reading, label: Label) -> list[float | None]:
    """Pick an answer's size for each axis that a label names; an answer that names none gives them as it is asked.

    A diameter stands for the two sides that are most alike, a thickness for the smallest, a depth for the side on the
    floor that the label does not name, where the answer has no such axis.
    """
    named = any(reading.axes)
    sides = {axis: size for axis, size in zip(reading.axes if named else "lwh", reading.sizes, strict=False)
             if size is not None and axis}
    sizes = [size for size in reading.sizes if size is not None]
    if label.axes[0] == "round":
        pairs = sorted(combinations(sorted(sizes, reverse=True), 2), key=lambda pair: pair[0] - pair[1])
        return [*(pairs[0] if pairs else sizes), None, None][:2]
    return [_side(axis, sides, sizes, size, label.axes) for axis, size in zip(label.axes, label, strict=True)]


def _side(axis: str, sides: dict[str, float], sizes: Sequence[float], wanted: float, others: Sequence[str]
          ) -> float | None:
    if axis in sides:
        return sides[axis]
    if axis == "t":
        return min(sizes, default=None) if len(sizes) == 3 else None
    if axis == "d":
        free = [sides[name] for name in "lw" if name in sides and name not in others]
        return min(free, key=lambda size: abs(size - wanted), default=None)
    return sides.get("d") if axis in "lw" and "d" not in others else None
