"""The processes of a run, one a GPU: start them, tell each its rank and device, reduce over all, stop when told to.

torchrun starts them, by hand or for --gpu_ids; the process group is torch's (NCCL on GPUs, gloo on CPUs). Every
function here that talks to the others is called by all of them, whatever happened to the work of one.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor, nn

from ground.errors import OptionError
from models.family import ModelError
from models.loading import choose_device

T = TypeVar("T")
Number = TypeVar("Number", int, float)
SILENCE = timedelta(minutes=30)  # the main process may write a checkpoint for long; a dead one is noticed by torchrun
_BUCKET = 2 ** 25  # numbers of a gradient reduced at once


@dataclass(frozen=True)
class Processes:
    """This process among all: rank 0 is the main one, which writes."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def most(self, number: Number) -> Number:
        """The largest of all processes' numbers."""
        return max(self.gather(number))

    def gather(self, thing: T) -> list[T]:
        """Every process's thing, in order of rank."""
        if self.world == 1:
            return [thing]
        things: list[Any] = [None] * self.world
        dist.all_gather_object(things, thing)
        return things

    def once(self, work: Callable[[], T], *problems: type[Exception]) -> T:
        """Let the main process work and give all what came of it; one of the problems is raised by all."""
        if self.world == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = work()
            except problems as problem:
                outcome[1] = problem
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def total(self, values: Tensor) -> Tensor:
        """The sum of all processes' values."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its mean over all processes; one that only some have counts as 0 in the others."""
        if self.world == 1:
            return
        held = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.float32,
                            device=parameters[0].device)
        wanted = [parameter for parameter, count in zip(parameters, self.total(held).tolist(), strict=True) if count]
        for bucket in _buckets(wanted):
            flat = torch.cat([torch.zeros_like(parameter).flatten() if parameter.grad is None else
                              parameter.grad.flatten() for parameter in bucket])
            mean = self.total(flat) / self.world
            for parameter, grad in zip(bucket, mean.split([each.numel() for each in bucket]), strict=True):
                parameter.grad = grad.view_as(parameter).clone()


ALONE = Processes()


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if not buckets or parameter.numel() > room:
            buckets.append([])
            room = _BUCKET
        buckets[-1].append(parameter)
        room -= parameter.numel()
    return buckets


def started_by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ


def launch(gpu_ids: Sequence[int], script: str, arguments: Sequence[str]) -> NoReturn:
    """Become torchrun with a process a GPU, so that signals meet it; raises OptionError for absent GPUs."""
    there = torch.cuda.device_count()
    absent = [index for index in gpu_ids if not 0 <= index < there]
    if absent:
        found = ", ".join(f"{index} ({torch.cuda.get_device_name(index)})" for index in range(there)) or "none"
        raise OptionError(f"--gpu_ids: no GPU {', '.join(map(str, absent))} here; there are: {found}")
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = shown.split(",") if shown else [str(index) for index in range(there)]
    os.execve(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                               str(len(gpu_ids)), script, *arguments],
              os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(names[index] for index in gpu_ids)})


def join(device: str) -> Processes:
    """Join the process group that torchrun prepared; alone without torchrun. Raises ModelError without a GPU each."""
    if not started_by_torchrun():
        return Processes()
    on_gpu = choose_device(device).type == "cuda"
    local = int(os.environ["LOCAL_RANK"])
    if on_gpu and local >= torch.cuda.device_count():
        raise ModelError(f"process {local} of this machine has no GPU: torchrun --nproc_per_node must be at most "
                         f"{torch.cuda.device_count()} here")
    if on_gpu:
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=SILENCE)
    return Processes(dist.get_rank(), dist.get_world_size())


def join_alone(device: str) -> None:
    """Make a process group of this process alone, which --offload wants; nothing where there is one already."""
    if not dist.is_initialized():
        on_gpu = choose_device(device).type == "cuda"
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0,
                                world_size=1)


def leave() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Interruption:
    """A signal that asked the run to stop."""

    signal = 0


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Note SIGTERM and SIGINT instead of dying of them, so that the step ends and is saved; a second one kills."""
    asked = Interruption()

    def note(number: int, _: Any) -> None:
        if asked.signal:
            os._exit(128 + number)
        asked.signal = number
        logger.warning(f"{signal.Signals(number).name}: the run stops after this step and saves; once more to stop now")

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
