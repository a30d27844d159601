"""A process with workers that waits to be killed: python idle_workers.py prints its workers' ids."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]

import torch

from models.family import Family, Prompt, PromptParts
from models.preparing import Preparer
from sheets.samples import Sample


@dataclass(frozen=True)
class SmallPrompt:
    """Makes prompts of one token."""

    parts: PromptParts = field(default_factory=lambda: PromptParts(Family(), None, None))

    def __call__(self, sample):
        return Prompt(torch.ones(1, dtype=torch.long))


if __name__ == "__main__":
    from idle_workers import SmallPrompt  # under a name that its workers know

    preparer = Preparer(SmallPrompt(), lambda: SmallPrompt().parts, workers=2)
    sample = Sample(row=2, product_id="p2", text="box", label=(), photos=(), sheet="sheet.xlsx")
    preparer.submit(sample).result()
    print(*preparer._pool._processes, flush=True)
    time.sleep(100)
