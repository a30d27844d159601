"""How many products one pass takes: fewer from then on, where memory runs out; and what a rollout copies."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from loguru import logger

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Copies:
    """Copies of weights for the time of a rollout."""

    wanted: bool = True
    taken: int = 0  # bytes, of those last made
    said: bool = False


@dataclass
class PassSize:
    """The products that a pass takes at most; None: as many as are wanted, until memory runs out once."""

    products: int | None = None

    def halve(self, taken: int, doing: str, problem: str) -> bool:
        """Halve after a pass of so many products ran out of memory, and say so; False where it took only one."""
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if taken <= 1:
            return False
        self.products = min(taken // 2, self.products or taken)
        logger.warning(f"out of memory with {taken} products a pass while {doing}: going on with {self.products} "
                       f"({problem.splitlines()[0] if problem else 'no more is known'})")
        return True

    def passes(self, items: Sequence[Item], compute: Callable[[Sequence[Item]], Result], doing: str,
               wanted: int | None = None) -> Iterator[tuple[Sequence[Item], Result | None]]:
        """Compute over items, a pass after the other, and again in halves where memory runs out.

        wanted: items a pass at most. Yields the items of each pass and what was computed, None where there was no
        memory for a single one.
        """
        start = 0
        while start < len(items):
            some = items[start:start + min(size for size in (wanted, self.products, len(items)) if size)]
            result, problem = None, None
            try:
                result = compute(some)
            except torch.OutOfMemoryError as error:
                problem = str(error)
            # Outside of the except block: the error holds on to what the pass had computed.
            if problem is None or not self.halve(len(some), doing, problem):
                yield some, result
                start += len(some)
