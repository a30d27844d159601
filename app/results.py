"""The model's answers become what a client gets: sizes in cm, confidence, and whether a person should look.

Read and weighed as everywhere else: the same parser, the same agreement between the sampled answers.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from app.metrics import Metrics
from app.waiting import Answered, Product
from evidence.measures import most_agreed
from sizes.answers import Reading, read_answer

_SMALLEST, _LARGEST = 0.1, 1_000.0  # cm; what lies outside is for a person to look at
_AXES = {"l": "length", "w": "width", "h": "height"}


def result_of(product: Product, answered: Answered, model: str, accept_at: float | None, metrics: Metrics
              ) -> dict[str, Any]:
    """Describe a product's answer: of several the one that agrees most with the others."""
    readings = [_read(answer) for answer in answered.answers]
    index, sure = most_agreed([found for _, found in readings])
    reading, sizes = readings[index][0], list(readings[index][1])
    warnings = warnings_of(product, answered, sizes, reading.reason)
    review = not sizes or outside(sizes) or accept_at is not None and sure is not None and sure < accept_at
    metrics.answered(sizes, [bool(found) for _, found in readings], sure, review)
    return {
        "sizes_cm": sizes,
        "answer": named_sides(reading) if sizes else None,
        "confidence": sure,
        "review": review,
        "readings": [{"sizes_cm": list(found), "text": answer}
                     for (_, found), answer in zip(readings, answered.answers, strict=True)],
        "photos_used": answered.photos_used,
        "warnings": warnings,
        "model": model,
        "ms": {"queue": round(answered.queue_ms, 1), "model": round(answered.model_ms, 1)},
    }


@lru_cache(maxsize=1024)  # sampled answers are often the same
def _read(answer: str) -> tuple[Reading, tuple[float, ...]]:
    """Read an answer: as it stands there, and its sizes, largest first."""
    reading = read_answer(answer)
    return reading, tuple(sorted((size for size in reading.sizes if size is not None), reverse=True))


def warnings_of(product: Product, answered: Answered, sizes: Sequence[float], reason: str) -> list[str]:
    """Say what a person should know of an answer."""
    warnings = []
    if answered.photos_used < len(product.photos):
        warnings.append(f"{answered.photos_used} of {len(product.photos)} photos used: equal ones count once, and a "
                        "prompt that is too long loses photos from its end")
    if not sizes:
        warnings.append(f"the answer can't be read: {reason}")
    elif outside(sizes):
        warnings.append(f"a side is smaller than {_SMALLEST:g} cm or larger than {_LARGEST:g} cm")
    return warnings


def outside(sizes: Sequence[float]) -> bool:
    """Tell sizes that hardly any product has."""
    return any(not _SMALLEST <= size <= _LARGEST for size in sizes)


def named_sides(reading: Reading) -> dict[str, Any]:
    """Put a reading's sizes under length, width and height: as it names them, else in the order in which it is asked.
    """
    axes = reading.axes if set(reading.axes) <= set(_AXES) and len(set(reading.axes)) == len(reading.axes) else "lwh"
    sides = dict.fromkeys(_AXES.values()) | {_AXES[axis]: size
                                             for axis, size in zip(axes, reading.sizes, strict=False)}
    return sides | {"unit": "cm"}
