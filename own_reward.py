"""A reward of the user's own: --reward file.py:function, alone or several with weights, the same wherever answers
are scored. No torch.

    def short(answer, label, sample):       # answer: text; label: sizes in cm; sample: see Sample in data.py
        return {"brief": len(answer) < 60}  # a number, or named parts that are added up
"""

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

from ground.errors import OptionError
from ground.options import split_reward
from prompts import write_answer
from reward import RewardParts, score_answer
from sheets.samples import Sample


class RewardError(OptionError):
    """A reward function that can't be used; the text names it, the product and what went wrong."""


class Scorer:
    """Score answers by the functions of --reward; by the built-in size reward when there are none.

    Sizes, errors and readability are the built-in reading's in any case.
    """

    def __init__(self, specs: Sequence[str] = ()):
        self._functions = [_load(spec) for spec in specs]
        self._specs = list(specs)

    def __call__(self, answer: str, sample: Sample) -> RewardParts:
        """Score one answer; raises RewardError naming the row when a function fails or gives no number."""
        parts = score_answer(answer, sample.label)
        if not self._functions or not sample.label:
            return parts
        named: list[tuple[str, float]] = []
        for spec, (name, weight, function) in zip(self._specs, self._functions, strict=True):
            given = parts.reward if function is None else _call(function, answer, sample, spec)
            values = given if isinstance(given, Mapping) else {name: given}
            for part, value in values.items():
                if not isinstance(value, Real) or not math.isfinite(value):
                    raise RewardError(f"reward {spec}: {value!r} as {part!r} for {_where(answer, sample)}: it must "
                                      "give a finite number, or a dictionary of them")
                named.append((str(part), weight * float(value)))
        return replace(parts, reward=sum(value for _, value in named), named=tuple(named))

    def rescore(self, groups: Iterable[Any]) -> None:
        """Put these rewards in place of a rollout's built-in ones."""
        if self._functions:
            for group in groups:
                group.parts = [self(answer, group.sample) for answer in group.answers]

    def check(self, sample: Sample) -> str:
        """Try one product's own label and an empty answer, before anything costs time; returns what they earn."""
        earned, empty = self(write_answer(sample.label), sample), self("", sample)
        parts = ", ".join(f"{name} {value:.3f}" for name, value in earned.named)
        return (f"reward {' + '.join(self._specs) or 'size'} on {sample.sheet} row {sample.row}: the true size earns "
                f"{earned.reward:.3f}{f' ({parts})' if parts else ''}, an empty answer {empty.reward:.3f}")


def _load(spec: str) -> tuple[str, float, Callable | None]:
    file, name, weight = split_reward(spec)
    if not file:
        return name, weight, None
    module_spec = importlib.util.spec_from_file_location(f"own_reward_of_{name}", file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as problem:  # somebody else's code: whatever it raises, the user wants to read it
        raise RewardError(f"reward {spec}: {file} can't be run: {type(problem).__name__}: {problem}") from problem
    function = getattr(module, name, None)
    if not callable(function):
        raise RewardError(f"reward {spec}: {file} has no function {name!r}")
    return name, weight, function


def _call(function: Callable, answer: str, sample: Sample, spec: str) -> Any:
    try:
        return function(answer, sample.label, sample)
    except Exception as problem:  # as above
        raise RewardError(f"reward {spec}: {type(problem).__name__}: {problem}, for {_where(answer, sample)}"
                          ) from problem


def _where(answer: str, sample: Sample) -> str:
    return f"{sample.sheet} row {sample.row} ({sample.product_id}), answer {answer[:80]!r}"
