"""CPU seconds and peak memory by phase.

Memory is the kernel's own high-water mark of resident memory (VmHWM), reset at each phase: no sampling, no peak
missed. It tells live tensors apart from what the allocator keeps only when freed memory goes back at once: see
return_memory. Time is measured with the opposite setting, keep_memory, so that neither side pays for page faults.
"""

import ctypes
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h


def keep_memory() -> None:
    """Let glibc keep freed memory for the next tensor."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)


def return_memory() -> None:
    """Let glibc give every freed block of 64 KiB and more back to the kernel at once."""
    ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 64 * 1024)


def trim() -> None:
    """Free what nobody holds, and give it back to the kernel."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident() -> float:
    """Resident memory now, MiB."""
    return _status("VmRSS")


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}: memory can only be measured on Linux")


def processor_name() -> str:
    """What the kernel calls the processor; empty where it doesn't say."""
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]
    return names[0] if names else ""


class Meter:
    """Charge seconds, and memory peaks if asked for, to the innermost open phase; outside all of them, "train".

    clock: what tells the seconds, CPU seconds by default.
    """

    def __init__(self, memory: bool = False, clock: Callable[[], float] = time.process_time):
        self.memory, self.clock = memory, clock
        self._open = ["train"]
        self.restart()

    def restart(self) -> None:
        """Forget what was charged so far."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.peaks: dict[str, float] = defaultdict(float)
        self._begin()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge a block to a phase; blocks may nest."""
        self.charge()
        self._open.append(name)
        try:
            yield
        finally:
            self.charge()
            self._open.pop()

    def charge(self) -> None:
        """Charge what has run up to the open phase."""
        name = self._open[-1]
        self.seconds[name] += self.clock() - self._since
        if self.memory:
            self.peaks[name] = max(self.peaks[name], _status("VmHWM"))
        self._begin()

    def _begin(self) -> None:
        if self.memory:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident
        self._since = self.clock()
