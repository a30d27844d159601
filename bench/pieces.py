"""What in a step is not the model: reward, buffer, data, prompts, checkpoints, start-up. CPU time.

    python bench/pieces.py

The first table times each piece by itself, with its share of a step where every step needs it. The second takes one
real step apart: what its model computes, what the policy does around it, and everything else. The third names the
torch operators that each phase of the step spends its time in.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the program's own files

from config import option


@dataclass
class PiecesOptions:
    """What to measure"""

    case: str = option("1000x12", "the step of step.py that is taken apart")
    repeats: int = option(5, "calls and steps; the tables give medians", within="(0, inf)")
    operators: int = option(8, "torch operators shown of each phase, the dearest first")



if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from ground.commands import start

    start(PiecesOptions, "Time what in a step is not the model.")

import torch
from torch.profiler import ProfilerActivity, profile

from cases import LABEL, Case, cases_named, make_sample, write_model
from evidence.report import write_sheet
from meter import Meter, keep_memory
from models import lean, sampling
from models import policy as policy_file
from models.loading import load_weights
from ours import make_run, measured_step, step_options
from replay_buffer import ReplayBuffer, join_experiences
from reward import score_answer
from rollout import PromptEncoder
from sheets.samples import Sample, cached_photo_path, load_photos, load_samples
from train_vlm_parallel import fill_buffer
from training.checkpoint import read_state, save_checkpoint
from training.upkeep import Run

ANSWER = 'The size is {"length": "12.5 cm", "width": 8, "height": 15, "unit": "cm"}.'
ROWS, PRODUCTS = 100, 16  # of the sheet; of the buffer


def cpu_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median CPU seconds of a call."""
    seconds = []
    for _ in range(repeats + 1):
        since = time.process_time()
        call()
        seconds.append(time.process_time() - since)
    return statistics.median(seconds[1:])  # the first fills caches


def child_seconds(arguments: list[str], repeats: int) -> float:
    """Median CPU seconds of a Python process."""
    seconds = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(seconds)


def data_pieces(run: Run, sample: Sample, folder: Path, repeats: int) -> list[tuple[str, float, int]]:
    """Sheet, photos, prompt: name, CPU seconds a call, calls a step."""
    photos = folder / "photos"
    photos.mkdir()
    addresses = [f"https://bench.invalid/{index}.png" for index in range(5)]
    for address, path in zip(addresses, sample.photos, strict=True):
        cached_photo_path(address, photos).symlink_to(path)
    columns = ("sku_img", "spu_img_1", "spu_img_2", "spu_img_3", "spu_img_4")
    row = {"text": sample.text, "label": "12 8 15", **dict(zip(columns, addresses, strict=True))}
    write_sheet(folder / "sheet.xlsx", {"products": [row] * ROWS})
    opened = load_photos(sample)
    return [(f"sheet of {ROWS} rows", cpu_seconds(lambda: load_samples(folder / "sheet.xlsx", photos), repeats), 0),
            ("photos of a product from files", cpu_seconds(lambda: load_photos(sample), repeats), 1),
            ("prompt of a product, photos open",
             cpu_seconds(lambda: PromptEncoder(run.policy).encode_parts(sample.text, opened), repeats), 1)]


def step_pieces(run: Run, options: Any, groups: list[Any], repeats: int) -> list[tuple[str, float, int]]:
    """Reward and buffer: name, CPU seconds a call, calls a step."""
    without_reference = replace(run, reference=None)
    buffer = fill_buffer(groups * PRODUCTS, without_reference, options)

    def minibatches() -> None:
        full = ReplayBuffer(items=buffer.items)
        for _ in full.minibatches(epochs=1, parts=full.parts(4), seed=0):
            pass

    return [("reward of an answer", cpu_seconds(lambda: score_answer(ANSWER, LABEL), repeats), options.group_size),
            ("group to buffer", cpu_seconds(lambda: fill_buffer(groups, without_reference, options), repeats), 1),
            ("join a group", cpu_seconds(lambda: join_experiences(buffer.items[:1]), repeats), 2),
            (f"join {PRODUCTS} groups", cpu_seconds(lambda: join_experiences(buffer.items), repeats), 0),
            (f"minibatches of {PRODUCTS} groups", cpu_seconds(minibatches, repeats), 0)]


def run_pieces(run: Run, options: Any, folder: Path, repeats: int) -> list[tuple[str, float, int]]:
    """Checkpoints and start-up: name, CPU seconds a call, 0."""
    options = replace(options, output_dir=str(folder / "run"))
    state = {"step": 1, "why_bad": [], "products_per_step": options.batch_size, "world": 1,
             "optimizer": run.learner.optimizer.state_dict()}
    saved = save_checkpoint(run.policy, options, 1, state)
    size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file()) / 2 ** 20

    def load() -> None:
        load_weights(run.policy.model, str(saved))
        run.learner.optimizer.load_state_dict(read_state(saved, options)["optimizer"])

    return [(f"save a checkpoint of {size:.0f} MiB",
             cpu_seconds(lambda: save_checkpoint(run.policy, options, 1, state), repeats), 0),
            ("load it", cpu_seconds(load, repeats), 0),
            ("start-up: --help", child_seconds(["train_vlm_parallel.py", "--help"], repeats), 0),
            ("start-up: imports", child_seconds(["-c", "import train_vlm_parallel"], repeats), 0)]


def charge_calls(owner: Any, name: str, meter: Meter, phase: str) -> None:
    """Charge an object's method to a phase from now on."""
    stock = getattr(owner, name)

    def charged(*args: Any, **kwargs: Any) -> Any:
        with meter.phase(phase):
            return stock(*args, **kwargs)

    setattr(owner, name, charged)


def take_apart(run: Run, options: Any, case: Case, sample: Sample, repeats: int) -> dict[str, float]:
    """Median CPU seconds of a step by what runs: model, policy, and the step's phases for what is outside both."""
    meter = Meter()
    for policy in (run.policy, run.reference):
        family, model = policy.family, policy.model
        for module in (family.language_model(model), family.head(model), *family.vision_modules(model)):
            charge_calls(module, "forward", meter, "model")
        for name in ("photo_features", "sample", "log_probs"):
            charge_calls(policy, name, meter, "policy")
    charge_calls(run.learner.optimizer, "step", meter, "model")
    shared = [(torch.Tensor, "backward"), (policy_file, "token_log_probs"),
              (sampling, "distribution"), (lean.LeanDecoder, "__call__")]
    stock = [getattr(owner, name) for owner, name in shared]
    for owner, name in shared:
        charge_calls(owner, name, meter, "model")
    try:
        steps = []
        for step in range(repeats):
            measured_step(run, options, case, sample, step, meter)
            steps.append(dict(meter.seconds))
    finally:
        for (owner, name), method in zip(shared, stock, strict=True):
            setattr(owner, name, method)
    return {name: statistics.median(seconds[name] for seconds in steps) for name in steps[0]}


def apart_table(seconds: dict[str, float]) -> str:
    """Lay a step's parts out as Markdown."""
    says = {"model": "model: forward of vision, language model and head, softmax, backward, optimizer",
            "policy": "policy around it: embedding, layout, masks, drawing tokens",
            "prepare": "photo files, pixels, prompt", "generate": "decoding and rewarding answers, cutting groups",
            "reference": "advantages, buffer", "train": "minibatches, loss, clipping, metrics"}
    whole = sum(seconds.values())
    lines = ["| part of a step | ms | share |", "|---|---|---|"]
    lines += [f"| {text} | {1000 * seconds[name]:.1f} | {seconds[name] / whole:.1%} |" for name, text in says.items()]
    other = whole - seconds["model"] - seconds["policy"]
    return "\n".join([*lines, f"| all but model and policy | {1000 * other:.1f} | {other / whole:.1%} |"])


class Profiler(Meter):
    """A meter that keeps each outermost phase's torch operators."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: dict[str, list[tuple[str, float, int]]] = {}  # name, time of its own, calls

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Profile a block."""
        with super().phase(name), profile(activities=[ProfilerActivity.CPU]) as profiled:
            yield
        averages = sorted(profiled.key_averages(), key=lambda item: -item.self_cpu_time_total)
        self.operators[name] = [(item.key, item.self_cpu_time_total, item.count) for item in averages]


def operator_table(operators: dict[str, list[tuple[str, float, int]]], most: int) -> str:
    """Lay the dearest operators of each phase out as Markdown; preparing is Pillow's and numpy's work, not torch's."""
    lines = ["| phase | operator | calls | share of the phase's operators |", "|---|---|---|---|"]
    for phase, rows in operators.items():
        whole = sum(spent for _, spent, _ in rows)
        lines += [f"| {phase} | {name} | {calls} | {spent / whole:.0%} |" for name, spent, calls in rows[:most]
                  if phase != "prepare"]
    return "\n".join(lines)


def main(options: PiecesOptions) -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    keep_memory()
    case = cases_named(options.case)[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = step_options(write_model(folder), case)
        run, sample = make_run(settings), make_sample(case, folder)
        groups = measured_step(run, settings, case, sample, 0, Meter())
        pieces = [*data_pieces(run, sample, folder, options.repeats),
                  *step_pieces(run, settings, groups, options.repeats),
                  *run_pieces(run, settings, folder, options.repeats)]
        profiler = Profiler()
        measured_step(run, settings, case, sample, 1, profiler)
        apart = take_apart(run, settings, case, sample, options.repeats)
    whole = sum(apart.values())
    print("| piece | ms a call | calls a step | share of a step |", "|---|---|---|---|", sep="\n")
    for text, seconds, calls in pieces:
        share = f"{calls} | {seconds * calls / whole:.2%}" if calls else " | "
        print(f"| {text} | {1000 * seconds:.2f} | {share} |")
    print("", f"A step of {case.name}, {whole:.2f} CPU seconds:", "", apart_table(apart), "",
          operator_table(profiler.operators, options.operators), sep="\n")
