"""A training step on a GPU, at real sizes with random weights, beside TRL's: one command, ten minutes, no download.

    python bench/gpu.py                                 # a table, and gpu.json; what time did not allow is named
    python bench/gpu.py --minutes 30 --only Qwen2.5-VL-3B
    torchrun --nproc_per_node 8 bench/gpu.py --no_trl   # all GPUs of a machine: full fine-tuning with fsdp, by NCCL
    python bench/gpu.py --device cpu --quick            # tiny models: to see that it runs

Cases come in the order of interest. A step is --products products with five photos each, G answers of --answer_tokens
tokens, scoring, reference and update: wall seconds, medians, behind a step that is not counted. Photos are prepared
beside it, as in training. TRL (bench/requirements.txt) gets the same model with an adapter, bfloat16, photos and
answers; with vLLM too, where that is installed, which has never been tried.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the program's own files

from config import WORKERS, option
from ground.files import write_json


@dataclass
class GpuOptions:
    """What to measure"""

    minutes: float = option(10.0, "no case begins that would end later, going by the longest so far", within="(0, inf)")
    only: str = option("", "cases whose name contains this")
    products: int = option(8, "products a step, on each GPU", within="(0, inf)")
    answer_tokens: int = option(64, "tokens of an answer", within="(3, inf)")
    steps: int = option(2, "steps that are counted", within="(0, inf)")
    micro_batch_size: int = option(4, "products a pass; halved where memory runs out", within="(0, inf)")
    trl_micro_batch: int = option(8, "answers that TRL scores together: a divisor of the group", within="(0, inf)")
    no_trl: bool = option(False, "measure our side only")
    peak_tflops: float | None = option(
        None, "bfloat16 peak of the GPU, 10^12 operations a second, without sparsity; default: the GPU's own where it "
              "is known", within="(0, inf)")
    workers: int | None = option(None, WORKERS, within="[0, inf)")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute")
    quick: bool = option(False, "tiny models, two cases")
    json: str = option("gpu.json", "where everything is written, after each case")


if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from ground.commands import start

    start(GpuOptions, "A training step on a GPU, at real sizes with random weights, beside TRL's.")

import torch

from gpu_models import GpuCase, cases_named, write_folder
from gpu_run import free, measure, measure_trl
from models.family import ModelError
from models.loading import choose_device
from models.processes import Processes, join, leave

PHASES = ("prepare", "generate", "reference", "train")


def attempt(work: Callable[[], dict[str, Any]], alone: bool) -> dict[str, Any]:
    """Measure; what can't be for want of memory says so. Of several processes none could go on by itself."""
    try:
        return work()
    except (torch.OutOfMemoryError, ModelError) as problem:
        if not alone:
            raise
        return {"failed": str(problem).splitlines()[0]}
    finally:
        free()


def measure_case(case: GpuCase, options: GpuOptions, processes: Processes) -> dict[str, Any]:
    """Measure all sides of a case."""
    alone = processes.world == 1
    result: dict[str, Any] = {"case": asdict(case) | {"name": case.name}}
    with tempfile.TemporaryDirectory() as name:
        folder = write_folder(case.model, Path(name))
        result["ours"] = attempt(lambda: measure(case, options, folder, processes), alone)
        if case.trl and alone and not options.no_trl:
            for side, package in (("trl", "trl"), ("trl_vllm", "vllm")):
                if find_spec("trl") and find_spec(package):
                    result[side] = attempt(lambda side=side: measure_trl(case, options, folder, side == "trl_vllm"),
                                           alone)
    return result


def table(results: Sequence[dict[str, Any]]) -> str:
    """Lay the results out as Markdown."""
    columns = ["model, what trains, prompt tokens, G", " / ".join(PHASES) + " / step, s", "tokens sampled a second",
               "of peak", "peak, GiB (counted)", "launches a token", "GPU idle", "TRL, s", "ratio", "TRL with vLLM, s",
               "ratio"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for result in results:
        ours = result["ours"]
        cells = [result["case"]["name"], ours.get("failed", "")] + [""] * 5
        if "failed" not in ours:
            phases = [statistics.median(repeat.get(name, 0.0) for repeat in ours["repeats"]) for name in PHASES]
            cells = [f"{result['case']['name']} ({ours['prompt_tokens']})",
                     " / ".join(f"{value:.2f}" for value in (*phases, ours["seconds"])),
                     f"{ours['tokens_a_second']:,.0f}", said(ours["share_of_peak"], "{:.0%}"),
                     f"{ours['peak_gib']:.1f} ({said(ours['counted_gib'], '{:.1f}')})",
                     f"{ours['launches_a_token']:.0f}", said(ours["idle_share"], "{:.0%}")]
        for side in (result.get("trl", {}), result.get("trl_vllm", {})):
            seconds, mine = side.get("seconds"), ours.get("seconds")
            cells += [side.get("failed", said(seconds, "{:.2f}")), said(seconds and mine and seconds / mine, "{:.1f}")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def said(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else form.format(value)


def surroundings(options: GpuOptions, processes: Processes) -> dict[str, Any]:
    """Date, versions, device, options."""
    device = choose_device(options.device)
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "python": sys.version.split()[0],
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl", "vllm")
                         if find_spec(name)}, "processes": processes.world,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "options": asdict(options)}


def main(options: GpuOptions) -> None:
    """Measure cases until the time is up, print the table, write the JSON after each case."""
    if options.quick:
        options = replace(options, products=2, answer_tokens=6, steps=1, micro_batch_size=2, trl_micro_batch=4)
    cases, begin = cases_named(options.only, options.quick), time.monotonic()
    processes = join(options.device)
    results, longest = [], 0.0
    for number, case in enumerate(cases):
        now = time.monotonic() - begin
        if processes.once(lambda now=now, longest=longest: now + longest > 60 * options.minutes):
            break
        results.append(measure_case(case, options, processes))
        longest = max(longest, time.monotonic() - begin - now)
        left = [other.name for other in cases[number + 1:]]
        if processes.main:
            write_json(Path(options.json), surroundings(options, processes) | {"cases": results, "left": left})
            print(table(results).splitlines()[-1], flush=True)
    if processes.main:
        print("", table(results), "", sep="\n")
        left = [case.name for case in cases[len(results):]]
        if left:
            print(f"left out, for they would have ended behind --minutes {options.minutes:g}: {'; '.join(left)}")
    leave()
