"""Answers of several models to the same products -> one report: a plain dictionary that JSON holds and page, sheet and
console are written from, so that they all say the same."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Literal

from evidence.evaluation import Record, summarise
from evidence.measures import (
    Acceptance,
    accept_at,
    accept_threshold,
    bootstrap_interval,
    paired_p_value,
    risk_coverage,
    stated_size,
    wilson_interval,
)
from sheets.samples import Sample

SAME_WITHIN = 0.01  # a product whose mean reward moved by less counts as unchanged
WRONG_ABOVE = 0.1  # an answer whose sides are off by more on average is wrong: with the built-in reward, one below 0.9
BINS = 20  # of the reward's distribution
MOST_GROUPS = 30  # categories shown, the largest


@dataclass(frozen=True)
class Answers:
    """What one model answered: `sampled` several times a product, `greedy` once; either may be empty."""

    name: str
    kind: Literal["before", "after", "also", "ablation"]
    path: str
    sampled: list[Record]
    greedy: list[Record]
    notes: tuple[str, ...] = ()

    @property
    def records(self) -> list[Record]:
        """Those that are compared: the sampled ones where there are any."""
        return self.sampled or self.greedy


def build_report(answers: Sequence[Answers], settings: Mapping[str, Any], promise: float) -> dict[str, Any]:
    """Compare models on the products that all of them answered; the first is the one compared with.

    An ablation may have answered fewer of them: it is compared with the model after on its own.
    promise: the share of wrong products at most among those accepted without review.
    """
    answers, unpaired = _pair(answers)
    models = [one for one in answers if one.kind != "ablation"]
    ablations = {one.name: {record.key: record for record in one.records} for one in answers if one.kind == "ablation"}
    after = answers[1]
    return {
        "settings": dict(settings),
        "models": [{"name": one.name, "kind": one.kind, "path": one.path, "notes": list(one.notes)} for one in answers],
        "unpaired": unpaired,
        "summary": {one.name: _with_interval(one.records) for one in answers},
        "greedy": {one.name: summarise(one.greedy) for one in models if one.greedy},
        "change": {one.name: change(answers[0].records, one.records) for one in answers[1:] if one.kind != "ablation"},
        "ablation": {name: change([record for record in after.records if record.key in records], [*records.values()])
                     for name, records in ablations.items()},
        "rewards": {one.name: histogram([reward for record in one.records for reward in record.rewards])
                    for one in answers},
        "samples": {one.name: head_room(one.sampled) for one in models if one.sampled},
        "confidence": {one.name: confidence(one.sampled, promise) for one in models
                       if one.sampled and len(one.sampled[0].answers) > 1},
        "groups": [line for title, key in _GROUPS.items() for line in group_lines(title, key, models)],
        "products": [_product(place, models, ablations) for place in range(len(answers[0].records))],
    }


def _pair(answers: Sequence[Answers]) -> tuple[list[Answers], list[str]]:
    """Keep the products that every model answered; name the others, which would tilt the comparison."""
    keys = [{record.key for record in side} for one in answers if one.kind != "ablation"
            for side in (one.sampled, one.greedy) if side]
    common = set.intersection(*keys)
    left_out = sorted(set.union(*keys) - common)

    def kept(records: Sequence[Record]) -> list[Record]:
        return sorted((record for record in records if record.key in common), key=lambda record: record.key)

    return ([replace(one, sampled=kept(one.sampled), greedy=kept(one.greedy)) for one in answers],
            [f"{sheet} row {row}" for sheet, row in left_out])


def _with_interval(records: Sequence[Record]) -> dict[str, Any]:
    return summarise(records) | {"interval": bootstrap_interval([record.reward for record in records])}


def change(before: Sequence[Record], after: Sequence[Record]) -> dict[str, Any]:
    """How the mean reward moved, product by product: 95 % interval, p-value, and how many moved which way."""
    moves = [two.reward - one.reward for one, two in zip(before, after, strict=True)]
    outcomes = [outcome(move) for move in moves]
    interval, p_value = bootstrap_interval(moves), paired_p_value(moves)
    sure = p_value < 0.05 and not interval[0] <= 0 <= interval[1]  # of few products the interval alone says too much
    return {"mean": fmean(moves), "interval": interval, "p_value": p_value,
            "verdict": ("up" if interval[0] > 0 else "down") if sure else "unclear",
            **{name: outcomes.count(name) for name in ("better", "worse", "same")}}


def outcome(move: float) -> str:
    """Name what became of a product whose mean reward moved so."""
    return "better" if move > SAME_WITHIN else "worse" if move < -SAME_WITHIN else "same"


def histogram(rewards: Sequence[float]) -> list[int]:
    """Count rewards in BINS equal bins from 0 to 1; what lies outside counts at the ends."""
    counts = [0] * BINS
    for reward in rewards:
        counts[min(BINS - 1, max(0, int(reward * BINS + 1e-9)))] += 1
    return counts


def head_room(records: Sequence[Record]) -> dict[str, float]:
    """What n answers a product earn: on average, the one that agrees most with the others, the best one."""
    return {"answers": len(records[0].answers), "mean": fmean(record.reward for record in records),
            "agreed": fmean(record.parts[record.agreed()[0]].reward for record in records),
            "best": fmean(max(record.rewards) for record in records)}


def is_wrong(record: Record, index: int) -> bool:
    """Tell whether an answer's sides are off by more than WRONG_ABOVE on average."""
    return fmean(record.parts[index].errors) > WRONG_ABOVE + 1e-9


def confidence(records: Sequence[Record], promise: float) -> dict[str, Any]:
    """Which products could be accepted without review: the threshold on all, and how it does on products unseen.

    The check takes the threshold from every other product and counts the wrong ones among the rest.
    """
    agreed = [record.agreed() for record in records]
    confidences = [float(value) for _, value in agreed]
    wrong = [is_wrong(record, index) for record, (index, _) in zip(records, agreed, strict=True)]
    half = accept_threshold(confidences[::2], wrong[::2], promise)
    seen = half and accept_at(half.threshold, confidences[1::2], wrong[1::2])
    return {"promise": promise, "accept": _acceptance(accept_threshold(confidences, wrong, promise)),
            "check": _acceptance(seen),
            "curve": [[line.threshold, line.coverage, line.risk] for line in risk_coverage(confidences, wrong)]}


def _acceptance(found: Acceptance | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return asdict(found) | {"at_most": found.at_most, "coverage": found.coverage, "risk": found.risk,
                            "interval": wilson_interval(found.wrong, found.accepted)}


_GROUPS: dict[str, Callable[[Sample], str]] = {
    "category": lambda sample: sample.category,
    "photos": lambda sample: str(len(sample.photos)),
    "the text names": lambda sample: stated_size(sample.text, sample.label),
}


def group_lines(title: str, key: Callable[[Sample], str], models: Sequence[Answers]) -> list[dict[str, Any]]:
    """One line a group of products: mean reward by model, and the change between the first two with its interval.

    No line where all products are alike, no interval for one or two products.
    """
    places: dict[str, list[int]] = {}
    for place, record in enumerate(models[0].records):
        places.setdefault(key(record.sample) or "(none)", []).append(place)
    if len(places) < 2:
        return []
    largest = sorted(places, key=lambda value: -len(places[value]))[:MOST_GROUPS]
    lines = []
    for value in sorted(largest):
        means = {one.name: [one.records[place].reward for place in places[value]] for one in models}
        moves = [two - one for one, two in zip(*list(means.values())[:2], strict=True)]
        lines.append({"by": title, "value": value, "products": len(moves),
                      "rewards": {name: fmean(rewards) for name, rewards in means.items()},
                      "change": fmean(moves), "interval": bootstrap_interval(moves) if len(moves) > 2 else None})
    return lines


def _product(place: int, models: Sequence[Answers], ablations: Mapping[str, Mapping[Any, Record]]) -> dict[str, Any]:
    before, after = (one.records[place] for one in models[:2])
    sample = before.sample
    return {"row": sample.row, "product_id": sample.product_id, "category": sample.category, "text": sample.text,
            "photos": [str(path) for path in sample.photos], "label": sorted(sample.label, reverse=True),
            "change": after.reward - before.reward,
            "models": {one.name: _answers(one.records[place]) for one in models},
            "greedy": {one.name: _answers(one.greedy[place]) for one in models if one.greedy},
            "ablations": {name: _answers(records[before.key]) for name, records in ablations.items()
                          if before.key in records}}


def _answers(record: Record) -> dict[str, Any]:
    index, sure = record.agreed()
    return {"reward": record.reward, "agreed": index, "confidence": sure,
            "answers": [{"answer": answer, "reward": parts.reward, "sizes": list(parts.sizes),
                         "errors": list(parts.errors), "reason": parts.reason, "parts": dict(parts.named)}
                        for answer, parts in zip(record.answers, record.parts, strict=True)]}
