"""Prompts prepared beside the model: on one thread of this process, or in worker processes that hold no model.

Processes come from a server that is started for it (multiprocessing's forkserver): nothing of this process, its model
and its GPU least of all, is in them. A prompt comes back in shared memory, /dev/shm, as torch's DataLoader has it too.
"""

import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import connection, forkserver, parent_process
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, multiprocessing

from ground.errors import UserError
from models.family import Family, Prompt, PromptParts
from models.lending import Lender, NoSharedMemory
from sheets.photos import PhotoError
from sheets.samples import Sample

_MOST = 8  # workers by default
_BY_VALUE = 2 ** 15  # bytes of a tensor that goes through the pipe itself: no more, so that it is written in one go
_WITHOUT_GPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
_KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}  # for the next product: a fifth of its time
_here: dict[str, Callable[[Sample], Prompt]] = {}  # in a worker process: how to make a prompt
_lender = Lender()  # in a worker process

Make = Callable[[Sample], Prompt]


@dataclass(frozen=True)
class Prepared:
    """What a worker process sends back: a prompt, or the problem of its row, and what was logged meanwhile."""

    tensors: dict[str, Any]  # the prompt's, by name; small ones as arrays
    num_photos: int
    problem: Exception | None
    said: list[tuple[str, str]]  # level and message


def worker_count(asked: int | None, device: torch.device) -> int:
    """Resolve --workers: None is 0 beside a model on the CPU, whose cores they would take, and a few beside a GPU."""
    if asked is not None or device.type == "cpu":
        return asked or 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(_MOST, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


class Preparer:
    """Prepare prompts in the order in which they are asked for, `workers` at a time; 0: one thread of this process.

    A process that dies is replaced, and what was at work then is done again, each product in a process of its own: one
    that ends that one, too, is the failure of its row. Where no process can be started, or shared memory is short,
    the thread does the work, and it is said. pinned: prompts are put where a GPU copies them from without waiting.
    """

    def __init__(self, make: Make, parts: Callable[[], PromptParts], workers: int = 0, pinned: bool = False):
        self.workers, self._pinned = workers, pinned
        self._make, self._parts = make, parts  # workers get what makes prompts with these parts instead of a policy
        self._thread = ThreadPoolExecutor(1, "prompts")  # the code of an image processor may bear no second one
        self._pool: ProcessPoolExecutor | None = None  # started for the first product
        self._alone: ProcessPoolExecutor | None = None  # of one process, for what was at work when another died
        self._packed = b""

    def submit(self, sample: Sample) -> Future[Prompt]:
        """Begin to prepare a product's prompt."""
        return self._thread.submit(self._finish, sample, self._begin(sample))

    def _begin(self, sample: Sample) -> Future[Prepared] | None:
        """Hand a product to the workers; None where there are none."""
        if self.workers and not self._packed:
            try:
                self._packed = pickle.dumps(replace(self._make, parts=self._parts()))
            except (pickle.PicklingError, AttributeError, TypeError) as problem:
                self._do_without(f"its image processor can't be sent to them ({problem})")
        if not self.workers:
            return None
        try:
            self._pool = self._pool or self._start(self.workers)
            return self._pool.submit(_prepare, sample)
        except BrokenProcessPool:
            self._pool = self._start(self.workers)
            return self._pool.submit(_prepare, sample)

    def _start(self, workers: int) -> ProcessPoolExecutor:
        parts = self._parts()
        imported = ["rollout", *{type(part).__module__ for part in (parts.tokenizer, parts.image_processor)}]
        return ProcessPoolExecutor(workers, _context(imported), _set_up, (self._packed, parts.family))

    def _finish(self, sample: Sample, begun: Future[Prepared] | None) -> Prompt:
        """Take up what a worker has prepared, or prepare it here."""
        try:
            prepared = begun and begun.result()
            self._alone = None
        except BrokenProcessPool:
            prepared = self._prepare_alone(sample)
        except NoSharedMemory as problem:
            self._do_without(f"shared memory is short ({problem}); give more of it (docker: shm-size 8g)")
            prepared = None
        if prepared is None:
            return self._landed(self._make(sample))
        for level, message in prepared.said:
            _say_once(level, message)
        if prepared.problem:
            raise prepared.problem
        tensors = {name: tensor if isinstance(tensor, Tensor) else torch.from_numpy(tensor)
                   for name, tensor in prepared.tensors.items()}
        return self._landed(Prompt(tensors.pop("input_ids"), tensors, prepared.num_photos))

    def _prepare_alone(self, sample: Sample) -> Prepared | None:
        """Prepare a product again whose process died, or one beside it; None where none can be started.

        Raises PhotoError when this one dies as well.
        """
        logger.warning(f"{sample.sheet} row {sample.row} ({sample.product_id}): the process that prepared it, or one "
                       "beside it, was killed; doing it again in another")
        alone, self._alone = self._alone, None
        if alone is None:
            alone = self._start(1)
            try:
                alone.submit(os.getpid).result()
            except BrokenProcessPool:
                self._do_without("none can be started, see above")
                return None
        try:
            prepared = alone.submit(_prepare, sample).result()
        except BrokenProcessPool:
            raise PhotoError("the process that prepared its photos was killed, and again when it did nothing else: for "
                             "want of memory perhaps; smaller photos take less") from None
        self._alone = alone
        return prepared

    def _do_without(self, why: str) -> None:
        if self.workers:
            logger.warning(f"photos are prepared in this process, not in {self.workers} worker processes: {why}")
        self.workers = 0

    def _landed(self, prompt: Prompt) -> Prompt:
        """Put a prompt where a GPU copies it from without waiting, if there is one."""
        if not self._pinned:
            return prompt
        return Prompt(prompt.input_ids.pin_memory(), {name: tensor.pin_memory() for name, tensor in
                                                      prompt.photos.items()}, prompt.num_photos)


def _context(imported: Sequence[str]) -> Any:
    """Where processes come from: a server, started once, that has imported what they need, and sees no GPU."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "rollout").stem
    # Each process runs the head of the script that runs here: not all of its imports anew, then.
    imported = [name for name in imported if not name.startswith("transformers_modules")]  # not before family.importing
    context.set_forkserver_preload([script, *imported])
    with _environment({**_WITHOUT_GPU, **_KEEPS_MEMORY, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}):
        forkserver.ensure_running()
    return context


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@lru_cache(maxsize=10_000)
def _say_once(level: str, message: str) -> None:
    logger.log(level, message)  # every worker that meets a photo says what is wrong with it


def _set_up(packed: bytes, family: Family) -> None:
    """Begin a worker process: without GPU, with one thread, deaf to Ctrl-C, and gone when who started it is."""
    os.environ.update(_WITHOUT_GPU)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with family.importing():
        _here["make"] = pickle.loads(packed)


def _end_with_parent() -> None:
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _prepare(sample: Sample) -> Prepared:
    """Prepare a product's prompt in a worker process."""
    said: list[tuple[str, str]] = []
    logger.remove()
    logger.add(lambda line: said.append((line.record["level"].name, line.record["message"])), format="{message}")
    try:
        prompt = _here["make"](sample)
    except (UserError, ValueError) as problem:
        return Prepared({}, 0, problem, said)
    tensors = {name: _sent(tensor) for name, tensor in {"input_ids": prompt.input_ids, **prompt.photos}.items()}
    return Prepared(tensors, prompt.num_photos, None, said)


def _sent(tensor: Tensor) -> Any:
    """Make of a tensor what goes to the other process: a small one becomes an array, which goes by value."""
    return tensor.numpy() if tensor.untyped_storage().nbytes() <= _BY_VALUE else _lender.lend(tensor)
