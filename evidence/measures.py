"""What the figures of a comparison are made of: size errors, unit slips, agreement, intervals. Numbers only, no torch.

Errors are relative: 0.1 is ten per cent of the true size. A side or a volume that an answer lacks counts as error 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean

import numpy as np

from sizes.texts import sizes_in_text

TRIED = 5  # thresholds
_DRAWS = 10_000
SLIP_FACTORS = (10.0, 100.0, 2.54, 25.4, 12.0, 30.48)  # cm for mm or m, inch for cm or mm, foot for inch or cm
_SLIP_TOLERANCE = 0.05
_TOLERANCE = 1e-9  # 10 % off is within 10 %, whatever the binary fraction says


def within(errors: Sequence[float], tolerance: float) -> bool:
    """Tell whether every side is within the tolerance."""
    return bool(errors) and max(errors) <= tolerance + _TOLERANCE


def side_error(errors: Sequence[float], side: str) -> float | None:
    """Pick the error of the largest, middle or smallest side; None where the label has no such side."""
    place = {"largest": 0, "middle": 1 if len(errors) == 3 else None, "smallest": -1 if len(errors) > 1 else None}[side]
    return errors[place] if errors and place is not None else None


def volume_error(sizes: Sequence[float], label: Sequence[float]) -> float | None:
    """The relative error of length x width x height; None where the label has fewer than three sizes."""
    if len(label) < 3:
        return None
    return abs(math.prod(sizes) / math.prod(label) - 1) if len(sizes) == 3 else 1.0


def unit_slip(sizes: Sequence[float], label: Sequence[float]) -> float | None:
    """The factor by which every side is off, where it is one that comes of a wrong unit, as 10 or 1 / 25.4."""
    if not sizes or len(sizes) != len(label) or min(sizes) <= 0:
        return None
    ratios = [size / true for size, true in zip(sorted(sizes), sorted(label), strict=True)]
    for factor in (factor for one in SLIP_FACTORS for factor in (one, 1 / one)):
        if all(abs(ratio / factor - 1) <= _SLIP_TOLERANCE for ratio in ratios):
            return factor
    return None


def stated_size(text: str, label: Sequence[float]) -> str:
    """Say what sizes a product's text names: "the true size", "other sizes" (numbers with a unit), or "no size".

    The true size is named when each of the label's sizes stands in the text, within 2 %.
    """
    found = sizes_in_text(text)
    if label and all(any(abs(number - size) <= 0.02 * size for number in found) for size in label):
        return "the true size"
    return "other sizes" if found else "no size"


def agreement(one: Sequence[float], other: Sequence[float]) -> float:
    """How far two answers' sizes agree, 0 to 1: 1 - mean of |a - b| / max(a, b). Nothing agrees with no sizes."""
    if not one or len(one) != len(other):
        return 0.0
    return 1 - fmean(abs(a - b) / max(a, b) if max(a, b) > 0 else 0.0
                     for a, b in zip(sorted(one), sorted(other), strict=True))


def most_agreed(answers: Sequence[Sequence[float]]) -> tuple[int, float | None]:
    """Pick the answer that agrees most with the others; its mean agreement with them is the confidence.

    answers: the sizes read in each. One answer alone has no confidence: None.
    """
    if len(answers) < 2:
        return 0, None
    means = [fmean(agreement(one, other) for place, other in enumerate(answers) if place != index)
              for index, one in enumerate(answers)]
    best = max(range(len(means)), key=means.__getitem__)
    return best, means[best]


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % percentile interval of the mean: resample the values (one a product) with replacement."""
    from scipy.stats import bootstrap  # here, since importing it takes a second

    if len(values) == 1:
        return float(values[0]), float(values[0])
    found = bootstrap((np.asarray(values, dtype=float),), np.mean, n_resamples=_DRAWS, batch=100, method="percentile",
                      rng=np.random.default_rng(0)).confidence_interval
    return float(found.low), float(found.high)


def paired_p_value(changes: Sequence[float]) -> float:
    """Two-sided p-value of "nothing changed": how often random signs give a mean change at least as large.

    Exact for up to 13 products, whose 2 ** 13 patterns of signs are fewer than the draws.
    """
    from scipy.stats import permutation_test

    if len(changes) == 1:
        return 1.0
    batch = min(1000, 1 + 3_000_000 // len(changes))  # bounds the memory
    # Both sides in one: scipy would double the smaller. Rounded, so that patterns alike but for binary fractions count
    # as alike.
    return float(permutation_test((np.asarray(changes, dtype=float),),
                                  lambda signed, axis: np.abs(signed.mean(axis)).round(9), permutation_type="samples",
                                  alternative="greater", n_resamples=_DRAWS, batch=batch,
                                  rng=np.random.default_rng(0)).pvalue)


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share: hits of count."""
    from scipy.stats import binomtest

    found = binomtest(hits, count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


@dataclass(frozen=True)
class Acceptance:
    """Products accepted without review: those whose confidence is at least the threshold."""

    threshold: float
    accepted: int
    wrong: int
    products: int

    @property
    def coverage(self) -> float:
        return self.accepted / self.products

    @property
    def risk(self) -> float:
        return self.wrong / self.accepted

    @property
    def at_most(self) -> float:
        """The upper end of the 95 % interval of the share of wrong ones, corrected for TRIED thresholds."""
        from scipy.stats import binomtest

        one_sided = binomtest(self.wrong, self.accepted, alternative="less")
        return float(one_sided.proportion_ci(1 - 0.05 / TRIED, method="wilson").high)


def risk_coverage(confidences: Sequence[float], wrong: Sequence[bool]) -> list[Acceptance]:
    """One line for each threshold, from the strictest: how many products it accepts, and how many of them are wrong."""
    lines, accepted, bad = [], 0, 0
    ordered = sorted(zip(confidences, wrong, strict=True), reverse=True)
    for threshold, same in groupby(ordered, key=lambda pair: pair[0]):
        outcomes = [is_wrong for _, is_wrong in same]
        accepted, bad = accepted + len(outcomes), bad + sum(outcomes)
        lines.append(Acceptance(threshold, accepted, bad, len(ordered)))
    return lines


def accept_threshold(confidences: Sequence[float], wrong: Sequence[bool], promise: float) -> Acceptance | None:
    """The lowest threshold that keeps the share of wrong products under the promise, with 95 % confidence.

    Five thresholds are tried, which accept a fifth of the products, two fifths and so on, and each must keep it with
    99 %: the luckiest of many would break the promise elsewhere. None when none keeps it.
    """
    lines = risk_coverage(confidences, wrong)
    tried = [next(line for line in lines if line.coverage >= share / TRIED) for share in range(1, TRIED + 1)]
    kept = [line for line in tried if line.at_most <= promise + _TOLERANCE]
    return kept[-1] if kept else None


def accept_at(threshold: float, confidences: Sequence[float], wrong: Sequence[bool]) -> Acceptance | None:
    """What a threshold found elsewhere accepts here; None when it accepts nothing."""
    lines = [line for line in risk_coverage(confidences, wrong) if line.threshold >= threshold]
    return lines[-1] if lines else None
