"""Run a command and say how many CPU seconds it took, also as a multiple of a fixed piece of work timed beside it.

    python bench/cpu_seconds.py python demo.py

Seconds say little without the processor. The piece of work is 100 products of 512 x 512 matrices, float32, one thread:
who divides by its time can compare two machines, or a busy and an idle one, as far as both do the same arithmetic.
"""

import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

PRODUCTS, SIDE = 100, 512


def seconds_of_products() -> float:
    """CPU seconds of the fixed piece of work."""
    torch.set_num_threads(1)
    left, right = torch.rand(2, SIDE, SIDE)
    start = time.process_time()
    for _ in range(PRODUCTS):
        left @ right
    return time.process_time() - start


def seconds_of_children() -> float:
    """CPU seconds of the processes started here that have ended, and of those they started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def processor() -> str:
    """The processor's name, where Linux gives one, and the instructions that torch uses of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'a processor of unknown name'}, {torch.backends.cpu.get_cpu_capability()}"


def main(command: list[str]) -> int:
    """Run it between two timings of the piece of work, print what both took; returns its exit status."""
    seconds_of_products()  # the first call fills caches
    products, others = seconds_of_products(), seconds_of_children()
    status = subprocess.run(command).returncode
    seconds = seconds_of_children() - others
    products = (products + seconds_of_products()) / 2  # a busy machine slows both
    print(f"{seconds:.0f} CPU seconds on {processor()}: {seconds / products:.0f} times the {products:.3f} that "
          f"{PRODUCTS} products of {SIDE} x {SIDE} matrices take")
    return status


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] == "--help":
        sys.exit("usage: python bench/cpu_seconds.py COMMAND [ARGUMENT ...]")
    sys.exit(main(sys.argv[1:]))
