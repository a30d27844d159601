"""Size errors, slips, agreement, intervals and the paired test against numbers worked by hand."""

import numpy as np
import pytest

from evidence.measures import (
    accept_at,
    accept_threshold,
    agreement,
    bootstrap_interval,
    most_agreed,
    paired_p_value,
    risk_coverage,
    side_error,
    stated_size,
    unit_slip,
    volume_error,
    wilson_interval,
    within,
)


def test_within_counts_every_side_and_the_edge():
    assert within((0.1, 0.05, 0.0), 0.1) and not within((0.1, 0.05, 0.11), 0.1) and not within((), 0.2)
    assert within(((0.3 - 0.1) / 2,), 0.1)  # binary fractions do not push the edge out


def test_sides_of_a_label():
    assert [side_error((0.3, 0.2, 0.1), side) for side in ("largest", "middle", "smallest")] == [0.3, 0.2, 0.1]
    assert [side_error((0.3, 0.1), side) for side in ("largest", "middle", "smallest")] == [0.3, None, 0.1]
    assert [side_error((0.3,), side) for side in ("largest", "middle", "smallest")] == [0.3, None, None]
    assert side_error((), "largest") is None


def test_volume():
    assert volume_error((20, 10, 5), (10, 10, 5)) == pytest.approx(1.0)
    assert volume_error((9, 10, 5), (10, 10, 5)) == pytest.approx(0.1)
    assert volume_error((10, 10), (10, 10, 5)) == 1 and volume_error((10, 10), (10, 10)) is None


@pytest.mark.parametrize(("sizes", "label", "factor"), [
    ((150, 120, 80), (15, 12, 8), 10), ((1.5, 1.2, 0.8), (15, 12, 8), 0.1), ((381, 304.8, 203.2), (15, 12, 8), 25.4),
    ((5.9, 4.72, 3.15), (15, 12, 8), 1 / 2.54), ((15, 12, 8), (15, 12, 8), None), ((150, 12, 8), (15, 12, 8), None),
    ((150, 120), (15, 12, 8), None), ((), (15,), None), ((160, 120, 80), (15, 12, 8), None), ((0.0,), (15,), None),
])
def test_unit_slips(sizes, label, factor):
    assert unit_slip(sizes, label) == (factor and pytest.approx(factor))


@pytest.mark.parametrize(("text", "said"), [
    ("mug 12 x 8 x 15 cm", "the true size"), ("mug 120x80x150mm", "the true size"),
    ("mug, 15cm high, 8 wide, 12 deep", "other sizes"), ("grid 5 cm", "other sizes"), ("pack of 12, 8, 15", "no size"),
    ("mug", "no size"), ('4.72" x 3.15" x 5.9"', "the true size"), ("长12厘米 宽8厘米 高15厘米", "the true size"),
])
def test_what_a_text_says_of_the_size(text, said):
    assert stated_size(text, (12, 8, 15)) == said


def test_agreement_and_the_answer_most_agreed_on():
    assert agreement((10, 20), (20, 10)) == 1
    assert agreement((10, 20), (10, 40)) == pytest.approx(0.75)
    assert agreement((), ()) == 0 and agreement((10,), (10, 20)) == 0 and agreement((0.0,), (0.0,)) == 1
    index, confidence = most_agreed([(10, 40), (10, 20), (10, 20), ()])
    assert index == 1 and confidence == pytest.approx((0.75 + 1 + 0) / 3)
    assert most_agreed([(10,)]) == (0, None)


@pytest.mark.parametrize("count", [1, 2, 3, 96, 1000])
def test_the_bootstrap_draws_from_the_values(count):
    values, rng = np.random.default_rng(count).normal(0.05, 0.3, count), np.random.default_rng(0)
    means = np.concatenate([values[rng.integers(0, count, (100, count))].mean(1) for _ in range(100)])
    assert bootstrap_interval(values) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=1e-12)


def test_bootstrap_intervals_by_hand():
    assert bootstrap_interval([0.5] * 7) == (0.5, 0.5) and bootstrap_interval([0.3]) == (0.3, 0.3)
    low, high = bootstrap_interval([0, 1] * 50)
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02) and high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)


@pytest.mark.parametrize(("changes", "p_value"), [
    ([0.7], 1), ([0.1, 0.1], 2 / 4), ([0.1, -0.1], 1), ([0.1, 0.2, 0.3], 2 / 8),  # all of one sign: + + + and - - -
    ([0.3, 0.2, -0.1], 4 / 8),  # sums of 0.4 or more, either way: 0.6, 0.4, -0.4, -0.6
    ([0.2] * 13, 2 / 2 ** 13), ([0.2] * 30, 1 / 10_001), ([0.0] * 9, 1), ([1e-17] * 9, 1),
])
def test_paired_p_values_by_hand(changes, p_value):
    assert paired_p_value(changes) == pytest.approx(p_value)


def test_the_paired_test_of_many_is_near_the_normal_one():
    changes = np.tile([0.5, -0.4], 100)  # random signs: mean 0, deviation sqrt((0.25 + 0.16) / 2 / 200) = 0.032016
    assert paired_p_value(changes) == pytest.approx(0.1184, abs=0.01)  # 0.05 is 1.5617 deviations


def test_wilson_intervals_by_hand():
    square = 1.959964 ** 2
    assert wilson_interval(0, 16) == pytest.approx((0, square / (16 + square)))
    assert wilson_interval(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    assert wilson_interval(40, 40) == pytest.approx((40 / (40 + square), 1))


def test_risk_and_coverage():
    lines = risk_coverage([0.9, 0.8, 0.8, 0.5], [False, True, False, True])
    assert [(line.threshold, line.accepted, line.wrong) for line in lines] == [(0.9, 1, 0), (0.8, 3, 1), (0.5, 4, 2)]
    assert lines[1].coverage == 0.75 and lines[1].risk == pytest.approx(1 / 3)
    assert accept_at(0.7, [0.9, 0.8, 0.8, 0.5], [False, True, False, True]) == lines[1]
    assert accept_at(0.95, [0.9], [False]) is None


def test_the_threshold_keeps_its_promise():
    confidences = [1 - index / 1000 for index in range(100)]
    wrong = [index >= 60 for index in range(100)]
    found = accept_threshold(confidences, wrong, 0.1)
    assert (found.accepted, found.wrong) == (60, 0) and found.threshold == confidences[59]
    assert found.at_most == pytest.approx(2.326348 ** 2 / (60 + 2.326348 ** 2))  # Wilson's upper end without a hit
    assert accept_threshold(confidences, [True] * 100, 0.1) is None
    assert accept_threshold(confidences[:40], [False] * 40, 0.1) is None  # too few to promise that much
    assert accept_threshold(confidences[:40], [False] * 40, 0.2).accepted == 40
    assert accept_threshold([0.5] * 100, [False] * 100, 0.1).accepted == 100  # one confidence for all


def test_the_promise_holds_on_products_never_seen():
    rng, broken, promised = np.random.default_rng(0), 0, 0
    for _ in range(200):
        confidences = rng.uniform(size=600)
        wrong = rng.uniform(size=600) < 0.4 * (1 - confidences) ** 2  # from t on: 0.4 / 3 * (1 - t) ** 2
        found = accept_threshold(confidences, wrong, 0.1)
        if found:
            promised += 1
            broken += 0.4 / 3 * (1 - found.threshold) ** 2 > 0.1
    assert promised > 150 and broken / 200 <= 0.05
