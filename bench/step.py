"""One training step, ours against TRL's GRPOTrainer: CPU seconds and peak memory, by phase.

    pip install -r bench/requirements.txt
    python bench/step.py                                # the whole grid, 40 minutes of one core
    python bench/step.py --cases 1000x12 --micro_batches 4
    python bench/step.py --cases 1000x12 --no_trl       # ours only

Both sides run the same small random Qwen2.5-VL in fp32 on one thread, with the same photos, prompt ids and number of
new tokens, the same group size, rewards and frozen reference, turn by turn in one process. A step is everything from
the photo files to the moved weights for one product. Times are medians of CPU seconds; memory is measured in
processes of its own. See trl_side.py for what is done in TRL's favour.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the program's own files

from config import option
from ground.errors import OptionError


@dataclass
class StepOptions:
    """What to measure"""

    cases: str = option("300x12,1000x12,3000x12,1000x32,1000x12frozen,1000x4,3000x4",
                        "prompt tokens x group size, with frozen behind it for frozen vision")
    repeats: int = option(3, "steps of each side; the table gives their medians", within="(0, inf)")
    micro_batches: str = option("1,2,4,6,8,12,16", "answers that TRL scores together: those that divide the group are "
                                                   "tried for a step each and the fastest is measured")
    most_tokens: int = option(20000, "micro-batches of more tokens are not tried, for their memory")
    quick: bool = option(False, "one small case, once: to see that it runs")
    no_trl: bool = option(False, "measure our side only")
    json: str = option("step.json", "where every repeat is written")
    memory_of: Literal["", "ours", "trl", "trl_checkpointed"] = option(
        "", "measure one side's memory in this process and print it: what the script calls itself with")



if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from ground.commands import start

    start(StepOptions, "One training step, ours against TRL's.")

import torch

from cases import ANSWER_TOKENS, QUICK, Case, cases_named, make_sample, write_model
from meter import Meter, keep_memory, processor_name, resident, return_memory, trim
from ours import make_run, measured_step, reference_log_probs, step_options
from rollout import Group
from sheets.samples import Sample, load_photos
from training.upkeep import Run

PHASES = ("prepare", "generate", "reference", "train")
MEMORY_MICRO_BATCH = 4
WITHIN = 1e-4  # log-probs of both sides on the same tokens
SETTINGS = {
    "both": f"float32, one thread, one product a step, {ANSWER_TOKENS} new tokens an answer, temperature 1, a frozen "
            "reference, AdamW, gradients clipped",
    "TRL": "GRPOTrainer as it is; the fastest of the micro-batches tried, without checkpointing; transformers' "
           "generate; completion rows scored only; photos decoded beforehand; no logging, evaluation, saving",
    "seconds": "CPU seconds of the process, medians; malloc keeps freed memory (M_MMAP_MAX 0, M_TRIM_THRESHOLD -1)",
    "memory": "high-water mark of resident memory (VmHWM) above what is resident before the step, a process each, "
              f"TRL at micro-batch {MEMORY_MICRO_BATCH}; malloc returns freed memory (M_MMAP_THRESHOLD 64 KiB)"}


def measure_case(case: Case, folder: Path, options: StepOptions) -> dict[str, Any]:
    """Measure one case: seconds in this process, memory in others."""
    sample, warm_up = make_sample(case, folder), make_sample(QUICK, folder)
    settings = step_options(folder / "model", case)
    run, meter = make_run(settings), Meter()
    measured_step(run, settings, case, warm_up, 0, meter)
    ours: list[dict[str, float]] = []
    groups: list[Group] = []
    result: dict[str, Any] = {"case": asdict(case) | {"name": case.name, "photo_tokens": case.photo_tokens},
                              "ours": {"repeats": ours}}

    def our_turn() -> None:
        groups[:] = measured_step(run, settings, case, sample, len(ours) + 1, meter)
        ours.append(dict(meter.seconds))

    if options.no_trl:
        for _ in range(options.repeats):
            our_turn()
    else:
        trainer, result["trl"] = trl_turns(case, folder, (warm_up, sample), our_turn, options)
        result["checks"] = check_same_work(case, trainer, load_photos(sample), run, groups[0])
    for side in ("ours",) if options.no_trl else ("ours", "trl", "trl_checkpointed"):
        result.setdefault(side, {})["peaks"] = memory_in_a_child(side, case)
    return result


def trl_turns(case: Case, folder: Path, samples: tuple[Sample, Sample], our_turn: Callable[[], None],
              options: StepOptions) -> tuple[Any, dict[str, Any]]:
    """Choose TRL's best micro-batch, then take turns; returns the last trainer and its seconds.

    samples: one to warm up on, whose step is not counted, and the one to measure.
    """
    import trl_side

    def seconds_of(micro_batch: int, checkpointing: bool, repeats: int, then: Callable[[], None] = lambda: None
                   ) -> tuple[Any, list[dict[str, float]]]:
        meter, counted = Meter(), []
        trainer = trl_side.make_trainer(folder / "model", folder / "trl", case, [samples[0], *[samples[1]] * repeats],
                                        micro_batch, checkpointing, meter)

        def after(step: int) -> None:
            if step:
                counted.append(dict(meter.seconds))
                then()

        trl_side.run_steps(trainer, after)
        trim()
        return trainer, counted

    sizes = [size for size in map(int, options.micro_batches.split(",")) if case.group_size % size == 0
             and (size == 1 or size * (case.prompt_tokens + ANSWER_TOKENS) <= options.most_tokens)]
    tried = [(size, False, seconds_of(size, False, 1)[1][0]) for size in sizes if len(sizes) > 1]
    best = min(tried, key=lambda trial: sum(trial[2].values()))[0] if tried else sizes[0]
    tried.append((best, True, seconds_of(best, True, 1)[1][0]))
    trainer, repeats = seconds_of(best, False, options.repeats, our_turn)
    return trainer, {"micro_batch": best, "repeats": repeats, "tried": [
        dict(zip(("micro_batch", "checkpointing", "seconds"), trial, strict=True)) for trial in tried]}


def check_same_work(case: Case, trainer: Any, photos: list[Any], run: Run, group: Group) -> dict[str, Any]:
    """Compare both sides' prompts, numbers of tokens and scores; raises RuntimeError when they are not the same."""
    import trl_side

    scored, without_markers = trl_side.reference_log_probs(trainer, photos, group.prompt.input_ids,
                                                           group.completions[:2])
    mine, worked = reference_log_probs(run, group, 2), trainer.worked
    checks = {"prompt_tokens": len(worked["prompt_ids"]), "generated": worked["generated"],
              "log_probs_within": float((mine - without_markers).abs().max()),
              "log_probs_within_markers_in": float((mine - scored).abs().max())}
    if not torch.equal(worked["prompt_ids"], group.prompt.input_ids):
        raise RuntimeError(f"{case.name}: the prompts differ")
    if not worked["generated"] == int(group.action_mask.sum()) == case.group_size * ANSWER_TOKENS:
        raise RuntimeError(f"{case.name}: TRL generated {worked['generated']} tokens, we "
                           f"{int(group.action_mask.sum())}")
    if not checks["log_probs_within"] < WITHIN:
        raise RuntimeError(f"{case.name}: log-probs differ by {checks['log_probs_within']:.1e}")
    return checks


def memory_in_a_child(side: str, case: Case) -> dict[str, float]:
    """Measure a side's peak memory, MiB above its base by phase, in a fresh process."""
    done = subprocess.run([sys.executable, __file__, "--memory_of", side, "--cases", case.name],
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} {case.name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_of(side: str, case: Case, folder: Path) -> dict[str, float]:
    """Peaks of a step, MiB above what is resident before it: models, optimizer state, libraries.

    A small step comes first, so that all of those are there.
    """
    sample, warm_up, meter = make_sample(case, folder), make_sample(QUICK, folder), Meter(memory=True)
    if side == "ours":
        settings = step_options(folder / "model", case)
        run = make_run(settings)
        measured_step(run, settings, case, warm_up, 0, meter)
        trim()
        base = resident()
        measured_step(run, settings, case, sample, 1, meter)
        return {name: peak - base for name, peak in meter.peaks.items()}
    import trl_side

    trainer = trl_side.make_trainer(folder / "model", folder / "trl", case, [warm_up, sample],
                                    min(MEMORY_MICRO_BATCH, case.group_size), side == "trl_checkpointed", meter)
    bases: list[float] = []
    peaks: dict[str, float] = {}

    def after(step: int) -> None:
        peaks.update(meter.peaks)
        trim()
        bases.append(resident())

    trl_side.run_steps(trainer, after)
    return {name: peak - bases[0] for name, peak in peaks.items()}


def total(side: dict[str, Any]) -> float:
    """Median CPU seconds of a whole step."""
    return statistics.median(sum(seconds.values()) for seconds in side["repeats"])


def by_phase(side: dict[str, Any]) -> str:
    """Median CPU seconds of each phase and of the whole step."""
    medians = [statistics.median(seconds.get(name, 0.0) for seconds in side["repeats"]) for name in PHASES]
    return " / ".join(f"{value:.2f}" for value in (*medians, total(side)))


def table(results: list[dict[str, Any]]) -> str:
    """Lay the results out as Markdown."""
    lines = ["| photos, prompt tokens, G | TRL: " + " / ".join(PHASES) + " / total, s | ours, s | ratio | TRL peak "
             "(checkpointed), MiB | ours, MiB | ratio |", "|---|---|---|---|---|---|---|"]
    for result in results:
        case, ours, trl = result["case"], result["ours"], result.get("trl")
        name = f"{case['photos']}, {case['prompt_tokens']}, {case['group_size']}"
        name += "" if case["train_vision"] else ", vision frozen"
        peak = max(ours["peaks"].values())
        cells = [name, "", by_phase(ours), "", "", f"{peak:.0f}", ""]
        if trl:
            trl_peak = max(trl["peaks"].values())
            checkpointed = sum(trl["tried"][-1]["seconds"].values())
            cells[1] = f"{by_phase(trl)} (micro-batch {trl['micro_batch']}; checkpointed {checkpointed:.2f})"
            cells[3] = f"{total(trl) / total(ours):.1f}"
            cells[4] = f"{trl_peak:.0f} ({max(result['trl_checkpointed']['peaks'].values()):.0f})"
            cells[6] = f"{trl_peak / peak:.1f}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def growth(results: list[dict[str, Any]]) -> list[str]:
    """Say how our cost grows with the group, where cases differ in nothing else."""
    lines = []
    for prompt_tokens in sorted({result["case"]["prompt_tokens"] for result in results}):
        same = sorted((result for result in results if result["case"]["prompt_tokens"] == prompt_tokens
                       and result["case"]["train_vision"]), key=lambda result: result["case"]["group_size"])
        for more in same[1:]:
            less = same[0]
            lines.append("{} prompt tokens, G {} -> {}: ours {:.2f} times the time, {:.2f} times the memory".format(
                prompt_tokens, less["case"]["group_size"], more["case"]["group_size"],
                total(more["ours"]) / total(less["ours"]),
                max(more["ours"]["peaks"].values()) / max(less["ours"]["peaks"].values())))
    return lines


def surroundings(options: StepOptions) -> dict[str, Any]:
    """Date, versions, settings."""
    packages = ["torch", "transformers"] + ([] if options.no_trl else ["trl", "accelerate", "datasets"])
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "python": sys.version.split()[0],
            "versions": {name: version(name) for name in packages}, "processor": processor_name(),
            "settings": SETTINGS, "options": asdict(options)}


def main(options: StepOptions) -> None:
    """Measure the cases, print the table, write the JSON after each case."""
    torch.set_num_threads(1)
    cases = [QUICK] if options.quick else cases_named(options.cases)
    if not all(size.isdecimal() and int(size) for size in options.micro_batches.split(",")):
        raise OptionError(f"--micro_batches {options.micro_batches}: give numbers above 0, separated by commas")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        if options.memory_of:
            return_memory()
            print(json.dumps(memory_of(options.memory_of, cases[0], folder)))
            return
        keep_memory()
        options.repeats = 1 if options.quick else options.repeats
        results: list[dict[str, Any]] = []
        for case in cases:
            results.append(measure_case(case, folder, options))
            report = surroundings(options) | {"cases": results}
            Path(options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")
            print(table(results[-1:]).splitlines()[-1], flush=True)
    print("", table(results), "", *growth(results), "", *(f"{name}: {text}" for name, text in SETTINGS.items()),
          sep="\n")
