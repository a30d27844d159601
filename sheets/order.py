"""Which products are held out, and which are rolled out in which step: pure functions of ids and seeds."""

import hashlib
import random
from collections.abc import Sequence

from sheets.samples import Sample


def split_held_out(samples: Sequence[Sample], fraction: float) -> tuple[list[Sample], list[Sample]]:
    """Split samples by product into (train, held out), each in the given order.

    fraction: expected share of the products held out, 0 to 1. A hash of its id alone decides a product's side, so
    neither reordering nor adding rows moves a product, and all rows of one product are on one side.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"the fraction of held-out products is {fraction}; it must be from 0 to 1")
    train: list[Sample] = []
    held_out: list[Sample] = []
    for sample in samples:
        (held_out if _unit_hash(sample.product_id) < fraction else train).append(sample)
    return train, held_out


def _unit_hash(text: str) -> float:
    """Hash a text to a number in [0, 1). 53 bits, since more would round up to 1."""
    return (int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") >> 11) / 2**53


def products_of_step(samples_count: int, batch_size: int, step: int, seed: int, rank: int = 0,
                     world_size: int = 1) -> list[int]:
    """List the indices of the `batch_size` products that one rank rolls out in one step, the first step being 0.

    A pure function, so a resumed run goes on where it stopped. The products stand in one endless line, pass after
    pass over the sheet, each pass in a seeded order of its own. A step takes the next batch_size * world_size of the
    line, and rank r takes every world_size-th of those from the r-th on. Over a pass each product comes exactly once;
    one batch holds a product twice only where it runs on into another pass.
    """
    if samples_count < 1:
        raise ValueError("there are no products to take a batch from")
    first = step * batch_size * world_size + rank
    orders: dict[int, list[int]] = {}
    indices = []
    for position in range(first, first + batch_size * world_size, world_size):
        number, place = divmod(position, samples_count)
        if number not in orders:
            orders[number] = list(range(samples_count))
            random.Random(f"{seed}/{number}").shuffle(orders[number])
        indices.append(orders[number][place])
    return indices
