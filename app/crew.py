"""The worker processes: started, watched, started again when they die or hang.

The web process holds no model. Whatever happens to a worker, the requests it had at work are told at once.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from loguru import logger

from app.metrics import Metrics
from app.refusals import Refusal
from app.waiting import Job, Waiting
from config import ServiceOptions

ROOT = Path(__file__).resolve().parent.parent
COMMAND = (sys.executable, "-c", "from app.worker import main; main()")
LONGEST_LINE = 2 ** 24  # bytes
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds between starts
_STEADY = 60.0  # seconds after which a worker counts as well
_FOR_THE_END = 2.0  # seconds that a worker gets to end by itself


class Lost(Exception):
    """A worker that died, hangs or can't load its model; the text says which."""


class Worker:
    """One worker process and what is known of it; keep() keeps it up."""

    def __init__(self, device: str, options: ServiceOptions, waiting: Waiting, metrics: Metrics,
                 command: tuple[str, ...] = COMMAND):
        self.device, self.command = device, command
        self._options, self._waiting, self._metrics = options, waiting, metrics
        self.state, self.problem, self.restarts = "loading", "", 0
        self.about: dict[str, Any] = {}  # what it said of its model
        self.hopeless = False  # its model can't be opened, and never was
        self._batch: list[Job] = []

    async def keep(self) -> None:
        """Keep the process up until cancelled: after each loss start it again, with growing pauses."""
        pause = _FIRST_PAUSE
        while True:
            began = time.monotonic()
            try:
                await self._one_life()
            except (Lost, OSError) as lost:
                self.state, self.problem = "restarting", str(lost)
            if time.monotonic() - began > _STEADY:
                pause = _FIRST_PAUSE
            self.restarts += 1
            self._metrics.restarts.labels(self.device).inc()
            logger.error(f"worker {self.device}: {self.problem}; started again in {pause:g} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _one_life(self) -> None:
        process = await asyncio.create_subprocess_exec(
            *self.command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LONGEST_LINE,
            env=self._environment(), start_new_session=True)  # so that Ctrl-C drains instead of killing it
        messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        reading = asyncio.create_task(self._read(process, messages))
        try:
            await self._say(process, self._settings(), reading)
            message = await _unless_lost(messages.get(), reading)
            if "broken" in message:
                self.hopeless = not self.about
                raise Lost(message["broken"])
            self.about, self.state, self.problem = message["ready"], "ready", ""
            self._waiting.takers += 1
            logger.info(f"worker {self.device}: ready with {self.about['model']}")
            try:
                while True:
                    self._batch = await _unless_lost(self._waiting.take(self._options.batch_size), reading)
                    await self._answer(process, messages, reading)
            finally:
                self._waiting.takers -= 1
        except Lost as lost:
            self.state, self.problem = "restarting", str(lost)
            _kill(process)
            raise
        finally:
            refusal = Refusal(503, "worker_lost", "the model's process was lost, try again", retry_after=5)
            for job in self._batch:
                job.fail(refusal)
            self._batch = []
            if not self._waiting.takers:
                self._waiting.refuse_all(refusal)
            reading.cancel()
            await _end(process)

    async def _answer(self, process: asyncio.subprocess.Process, messages: asyncio.Queue,
                      reading: asyncio.Task) -> None:
        began = time.monotonic()
        products = [{"text": job.product.text, "photos": [str(path) for path in job.product.photos],
                     "missing_photos": job.product.missing_photos} for job in self._batch]
        samples, greedy, _ = self._batch[0].kind
        await self._say(process, {"products": products, "samples": samples, "greedy": greedy}, reading)
        try:
            async with asyncio.timeout(self._options.hang_seconds):
                message = await _unless_lost(messages.get(), reading)
        except TimeoutError:
            raise Lost(f"no answer after {self._options.hang_seconds:g} s with one batch (--hang_seconds)") from None
        self._waiting.done(len(self._batch), time.monotonic() - began)
        for job, line in zip(self._batch, message["lines"], strict=True):
            if "answers" in line:
                job.succeed(line["answers"], line["photos_used"], line["truncated"])
            else:
                refusal = refusal_of(line["failure"])
                if refusal.code == "bad_photo":
                    self._metrics.photo_failures.labels(refusal.code).inc()
                job.fail(refusal)
        self._batch = []

    async def _say(self, process: asyncio.subprocess.Process, message: dict[str, Any], reading: asyncio.Task) -> None:
        process.stdin.write(json.dumps(message).encode() + b"\n")
        with contextlib.suppress(ConnectionError):  # who is lost is found by reading
            await _unless_lost(process.stdin.drain(), reading)

    async def _read(self, process: asyncio.subprocess.Process, messages: asyncio.Queue) -> None:
        """Pass messages on; raises Lost when the process says nothing any more."""
        name = "hang_seconds"  # one that starts is silent while its modules come from a slow disk
        while True:
            limit = getattr(self._options, name)
            try:
                async with asyncio.timeout(limit):
                    line = await process.stdout.readline()
            except TimeoutError:
                raise Lost(f"no sign of life for {limit:g} s (--{name})") from None
            if not line:
                raise Lost(f"its process ended ({await process.wait()})")
            message = json.loads(line)
            if "ready" in message:
                name = "silent_seconds"
            if "alive" not in message:
                await messages.put(message)

    def _settings(self) -> dict[str, Any]:
        options = self._options
        answer = {name: getattr(options, name) for name in ("model_path", "checkpoint_path", "trust_remote_code",
                                                            "prompt_language", "prompt_file", "seed", "num_threads")}
        answer |= {"device": "cuda" if self.device.isdecimal() else self.device, "eval_batch_size": options.batch_size}
        return {"answer": answer, "decode_at_once": options.decode_at_once}

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT),
                                                                                 os.environ.get("PYTHONPATH"))))}
        return environment | ({"CUDA_VISIBLE_DEVICES": self.device} if self.device.isdecimal() else {})

    def report(self) -> dict[str, Any]:
        """What /health says of it."""
        return {"device": self.device, "state": self.state, "restarts": self.restarts, "problem": self.problem}


def refusal_of(failure: str) -> Refusal:
    """Say no to a product that the model could not answer."""
    if failure.startswith("photos["):
        field, _, reason = failure.partition(": ")
        return Refusal(422, "bad_photo", reason, field)
    if failure.startswith(("out of memory", "the policy's")):
        return Refusal(503, "model_failed", failure.partition(" while ")[0], retry_after=5)
    return Refusal(422, "not_answered", failure)


async def _unless_lost(wanted: Coroutine[Any, Any, Any], reading: asyncio.Task) -> Any:
    """Await something, or raise what ends the reading."""
    task = asyncio.ensure_future(wanted)
    try:
        await asyncio.wait({task, reading}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return reading.result()
    finally:
        task.cancel()


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a process and what it started: by itself, if it can."""
    process.stdin.close()
    if process.returncode is None:
        try:
            async with asyncio.timeout(_FOR_THE_END):
                await process.wait()
        except TimeoutError:
            logger.warning(f"process {process.pid} did not end by itself and is killed")
    _kill(process)
    await process.wait()


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
