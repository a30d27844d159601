"""The queue: products wait here until a worker process or an engine takes them, several at a time.

It has an end: who finds it full, or would wait too long, is told so at once and not left hanging.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.metrics import Metrics
from app.refusals import Refusal
from config import LimitOptions, MissingPhotos

_PHOTO_WEIGHT = 300  # characters that a photo's tokens are worth, roughly: prompts of like length go together
_KEPT_PACE = 0.8  # of the running mean of seconds a product


@dataclass(frozen=True)
class Product:
    """What is asked: a text, photo files, how many answers, sampled or greedy.

    missing_photos: what a photo that can't be used means; for a request it means no answer. key: a hash of its text and
    photos, as test_model.py draws its random numbers by.
    """

    text: str
    photos: tuple[Path, ...] = ()
    samples: int = 4
    greedy: bool = False
    alone: bool = False  # not together with others, since it may be what a worker was lost by
    missing_photos: MissingPhotos = "drop_row"
    key: str = ""

    @property
    def for_log(self) -> str:
        """What a log may hold of it: a hash and sizes."""
        return f", product {self.key[:16]}, {len(self.text)} characters, {len(self.photos)} photos"


@dataclass(frozen=True)
class Answered:
    """What came of it: the model's answers, how many photos it saw, milliseconds in the queue and at the model."""

    answers: list[str]
    photos_used: int
    truncated: list[bool]
    queue_ms: float = 0.0
    model_ms: float = 0.0


@dataclass(eq=False)
class Job:
    """A product in the queue."""

    product: Product
    future: "asyncio.Future[Answered]"
    came: float = field(default_factory=time.monotonic)
    taken: float = 0.0
    line: "deque[Job] | None" = None  # where it waits, or waited
    tries: int = 0

    @property
    def kind(self) -> tuple[int, bool, int]:
        """What products that are answered together have in common."""
        return self.product.samples, self.product.greedy, id(self) if self.product.alone else 0

    @property
    def weight(self) -> int:
        """About how long its prompt is."""
        return len(self.product.text) + _PHOTO_WEIGHT * len(self.product.photos)

    def succeed(self, answers: list[str], photos_used: int, truncated: list[bool]) -> None:
        """Hand the answers to who waits for them, if anybody still does."""
        if not self.future.done():
            now = time.monotonic()
            self.future.set_result(Answered(answers, photos_used, truncated, 1000 * (self.taken - self.came),
                                            1000 * (now - self.taken)))

    def fail(self, refusal: Refusal) -> None:
        """Tell who waits for it that there will be no answer."""
        if not self.future.done():
            self.future.set_exception(refusal)


class Waiting:
    """Products that wait, first come first served, and those of sheets behind them."""

    def __init__(self, limits: LimitOptions, metrics: Metrics):
        self._limits, self._metrics = limits, metrics
        self._asked: deque[Job] = deque()
        self._of_sheets: deque[Job] = deque()
        self._taken: set[Job] = set()
        self._more = asyncio.Event()
        self._admitted = 0
        self._pace = 0.0  # seconds a product
        self.takers = 0  # workers and engines that are ready
        self.ending = 0.0  # since when the service ends

    def __len__(self) -> int:
        return len(self._asked)

    @contextmanager
    def admission(self) -> Iterator[None]:
        """Hold a place for a request, from its first byte on; raises Refusal when there is none."""
        if self.ending:
            raise Refusal(503, "ending", "the service is ending", retry_after=10)
        self._refuse_without_takers()
        room = self._limits.queue_size + self.takers * self._limits.batch_size
        wait = self._expected_wait()
        if self._admitted >= room or len(self._asked) >= self._limits.queue_size or wait > self._limits.max_wait:
            raise Refusal(429, "busy", "too many requests wait already, try again later", retry_after=wait)
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    def _refuse_without_takers(self) -> None:
        if not self.takers:
            raise Refusal(503, "not_ready", "the model is not ready, try again soon", retry_after=5)

    def _expected_wait(self) -> float:
        return len(self._asked) * self._pace / max(1, self.takers)

    async def ask(self, product: Product) -> Answered:
        """Wait for a request's answer; raises Refusal. Cancelled, it is not computed unless it was taken already."""
        self._refuse_without_takers()  # the last may have been lost while the request was read
        if len(self._asked) >= self._limits.queue_size:
            raise Refusal(429, "busy", "too many requests wait already, try again later", retry_after=self._pace)
        try:
            async with asyncio.timeout(self._limits.deadline):
                return await self._queued(product, self._asked)
        except TimeoutError:
            raise Refusal(504, "too_slow", f"no answer after {self._limits.deadline:g} seconds", retry_after=30
                          ) from None

    async def ask_for_sheet(self, product: Product) -> Answered:
        """Wait for the answer to a sheet's product, which lets every request go first."""
        return await self._queued(product, self._of_sheets)

    async def _queued(self, product: Product, line: deque[Job]) -> Answered:
        job = Job(product, asyncio.get_running_loop().create_future(), line=line)
        line.append(job)
        self._note_length()
        try:
            return await job.future
        finally:
            self._taken.discard(job)
            if job in line:
                line.remove(job)
                self._note_length()

    def _note_length(self) -> None:
        self._metrics.queue_length.set(len(self._asked))
        if self._asked or self._of_sheets:
            self._more.set()
        else:
            self._more.clear()

    async def take(self, most: int, linger: float | None = None) -> list[Job]:
        """Take products to answer together as soon as there are any: those asked for as many answers as the first,
        the nearest to it in length. Cancelled, it has taken none.

        linger: seconds to wait before; default: batch_wait_ms, where there are not enough for a batch.
        """
        await self._more.wait()
        if linger is None:
            enough = len(self._asked) + len(self._of_sheets) >= most
            linger = 0 if enough else self._limits.batch_wait_ms / 1000
        await asyncio.sleep(linger)
        while not (self._asked or self._of_sheets):  # who waited may have left, or gone with another taker
            await self._more.wait()
        taken = _like_the_first(self._asked, most)
        first = (taken or self._of_sheets)[0]
        alike = [job for job in self._of_sheets if job.kind == first.kind]
        taken += alike[:most - len(taken)]
        now = time.monotonic()
        for job in taken:
            job.line.remove(job)
            job.taken = now
            self._taken.add(job)
            self._metrics.queue_seconds.observe(now - job.came)
        self._metrics.batch_size.observe(len(taken))
        self._note_length()
        return taken

    def give_back(self, job: Job, most_tries: int) -> None:
        """Put a product that could not be answered back in front, for another to take; without one it fails."""
        self._taken.discard(job)
        if job.future.done():
            return
        if job.tries >= most_tries or self.takers < 2:  # the one that gives it back is still counted
            job.fail(Refusal(503, "engine_failed", "no engine answered it, try again", retry_after=5))
        else:
            job.line.appendleft(job)
            self._note_length()

    def done(self, count: int, seconds: float) -> None:
        """Learn how fast products are answered."""
        self._metrics.model_seconds.observe(seconds)
        self._pace = _KEPT_PACE * (self._pace or seconds / count) + (1 - _KEPT_PACE) * seconds / count

    def refuse_all(self, refusal: Refusal) -> None:
        """Send every request away; products of sheets wait on."""
        for job in list(self._asked):
            job.fail(refusal)

    def give_up(self) -> None:
        """Tell everybody whose request waits, or is computed, that the service ends before it is answered."""
        for job in [*self._asked, *self._of_sheets, *self._taken]:
            job.fail(Refusal(503, "ending", "the service is ending", retry_after=10))

    def state(self) -> dict[str, Any]:
        """How long the queue is, for /health."""
        return {"waiting": len(self._asked), "of_sheets": len(self._of_sheets),
                "seconds_a_product": round(self._pace, 4)}


def _like_the_first(line: deque[Job], most: int) -> list[Job]:
    if not line:
        return []
    first = line[0]
    alike = [job for job in line if job.kind == first.kind]
    return sorted(alike, key=lambda job: abs(job.weight - first.weight))[:most]
