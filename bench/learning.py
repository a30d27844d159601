"""What the same CPU seconds teach: TRL's GRPOTrainer, ours, supervised steps alone, supervised steps and then GRPO.

    pip install -r bench/requirements.txt
    python bench/learning.py                            # four arms, three seeds, an hour and a half of one core
    python bench/learning.py --arms ours,supervised --seeds 4 --seconds 60
    python bench/learning.py --arms ours --settings '{"lr": 2e-3}' --seeds 0 --output_dir outputs/lr_2e-3

All arms train the same tiny Qwen2.5-VL from the same weights on the same products (learning_task.py), each run in a
process of its own on one thread. Its clock counts the CPU seconds of training only: loading, the start-up checks and
the answers to held-out products stand still. How many steps the seconds hold is tried first, so that the learning rate
falls over the whole budget. Done runs are kept: started again, the script goes on with those that lack.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the program's own files

from config import option


@dataclass
class LearningOptions:
    """What to compare"""

    arms: str = option("trl,ours,supervised,both", "which of them to run")
    seeds: str = option("4,5,6", "each draws products, weights and answers anew")
    seconds: float = option(240.0, "CPU seconds of training, each run", within="(0, inf)")
    looks: int = option(8, "times that the held-out products are answered on the way", within="(0, inf)")
    sft_share: float = option(0.25, "share of the seconds that `both` learns labels in", within="(0, 1)")
    settings: str = option("{}", "JSON of settings that differ, to try them: of TrainOptions, or of TrlSettings")
    warm_up_steps: int = option(550, "steps of the warm-up that all start from", within="(0, inf)")
    products: int = option(800, "products to train on", within="(0, inf)")
    held_out: int = option(96, "products held out", within="(0, inf)")
    output_dir: str = option("outputs/learning", "a file for each run; of all of them table.md, learning.json and .svg")
    run: str = option("", "one run, such as trl/4, in this process: what the script calls itself with")


if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from ground.commands import start

    start(LearningOptions, "What the same CPU seconds teach.")

import torch
from torch import nn

import demo
from config import DemoOptions, TrainOptions
from evidence.evaluation import evaluate, summarise
from ground.errors import OptionError
from ground.files import whole_file, whole_folder, write_json, write_text
from learning_ours import run_steps
from learning_task import Clock, make_parts
from meter import keep_memory
from models.processes import Processes
from prompts import read_template
from rollout import PromptEncoder
from sheets.samples import Sample
from train_vlm_parallel import load_models, load_products, prepare

ARMS = {"trl": "TRL's GRPOTrainer", "ours": "GRPO, ours", "supervised": "supervised steps alone",
        "both": "supervised steps, then GRPO"}
FIGURES = {"mean_reward": "mean reward", "within_10": "every side within 10 %"}
PACE_STEPS = 6  # steps that tell how many the seconds hold; the first is left out
ANSWERS = 4  # sampled answers a held-out product
# What all arms have alike, the demo's but for the scheduler, which TRL has too; --settings tries others.
ALIKE = {"train_vision": True, "device": "cpu", "num_threads": 1, "batch_size": 8, "rollout_batch_size": 8,
         "minibatch_size": 4, "micro_batch_size": 4, "max_length": 20, "temperature": 1.0, "lr": 1e-3,
         "lr_scheduler": "cosine", "min_lr_ratio": 0.1, "adam_betas": (0.9, 0.95), "kl_weight": 0.003, "eval_every": 0,
         "preflight": False}


def train_options(task: Path, output: Path, seed: int, settings: dict[str, Any]) -> TrainOptions:
    """Options of our arms on a task."""
    return TrainOptions(
        model_path=str(task / "model"), data_path=str(task / "catalogue.xlsx"), eval_path=str(task / "held_out.xlsx"),
        image_cache_dir=str(task / "image_cache"), prompt_file=str(task / "prompt.txt"), output_dir=str(output),
        overwrite_output_dir=True, log_dir=str(output / "runs"), seed=seed, **(ALIKE | settings))


class Watcher:
    """Stops the clock to answer held-out products now and then, and says when the seconds are used up."""

    def __init__(self, held_out: Sequence[Sample], options: LearningOptions, seed: int):
        self.clock = Clock()
        self.points: list[dict[str, float]] = []
        self._held_out, self._seed = held_out, seed
        self._marks = [options.seconds * number / options.looks for number in range(1, options.looks + 1)]

    def begin(self, encoder: PromptEncoder, trained: nn.Module | None = None) -> None:
        """Look at the model as it starts, then let the clock run. trained: what trains, where it isn't the encoder's
        own policy."""
        self._encoder, self._trained, self._steps = encoder, trained, 0
        self._look()
        self.clock.start()

    def after(self, steps: int) -> bool:
        """Look if it is time; returns whether the seconds are used up."""
        self._steps = steps
        if self.clock.stop() >= self._marks[len(self.points) - 1]:
            self._look()
        self.clock.start()
        return len(self.points) > len(self._marks)

    def end(self) -> None:
        """Look at what the last step left, where the steps that were counted took less than the seconds."""
        self.clock.stop()
        if self.points[-1]["steps"] != self._steps:
            self._look()

    def _look(self) -> None:
        if self._trained is not None:
            self._encoder.policy.model.load_state_dict(self._trained.state_dict())
        records, failures = evaluate(self._encoder, self._held_out, ANSWERS, 1.0, ALIKE["max_length"], self._seed, 32,
                                     show=False)
        if failures:
            raise RuntimeError(str(failures[0]))
        summary = summarise(records)
        figures = {name: summary[name] for name in FIGURES}
        self.points.append({"seconds": self.clock.used, "steps": self._steps} | figures)
        print(json.dumps(self.points[-1]), file=sys.stderr)


class Pacer(Watcher):
    """Measures the seconds of a step instead, and stops after a few."""

    def begin(self, encoder: PromptEncoder, trained: nn.Module | None = None) -> None:
        """Let the clock run."""
        self.times: list[float] = []
        self.clock.start()

    def after(self, steps: int) -> bool:
        """Note how long a step took."""
        self.times.append(self.clock.stop())
        self.clock.start()
        return steps >= PACE_STEPS

    def end(self) -> None:
        """Nothing to look at."""

    @property
    def pace(self) -> float:
        """CPU seconds a step."""
        return (self.times[-1] - self.times[0]) / (PACE_STEPS - 1)


def run_arm(arm: str, seed: int, task: Path, options: LearningOptions) -> dict[str, Any]:
    """Train one arm on one seed for its seconds; returns the points of its curve and its settings."""
    output = Path(options.output_dir) / "work" / f"{arm}_{seed}"
    changed = json.loads(options.settings)
    if arm == "trl":
        return run_trl(seed, task, output, changed, options)
    given = train_options(task, output, seed, changed)
    products, held_out = load_products(given)

    def go(settings: TrainOptions, watcher: Watcher) -> None:
        run = prepare(settings, Processes())
        watcher.begin(run.encoder)
        run_steps(run, settings, watcher.after)
        watcher.end()

    share = {"ours": 0.0, "supervised": 1.0, "both": options.sft_share}[arm]
    steps = {}
    for kind, part in (("supervised", share), ("sampled", 1 - share)):
        steps[kind] = 0
        if part:
            pacer = Pacer(held_out, options, seed)
            go(replace(given, max_steps=PACE_STEPS, sft_steps=PACE_STEPS if kind == "supervised" else 0), pacer)
            steps[kind] = max(round(options.seconds * part / pacer.pace), 1)
    watcher = Watcher(held_out, options, seed)
    go(replace(given, max_steps=sum(steps.values()), sft_steps=steps["supervised"]), watcher)
    return {"points": watcher.points, "steps": steps, "settings": ALIKE | changed}


def run_trl(seed: int, task: Path, output: Path, changed: dict[str, Any], options: LearningOptions) -> dict[str, Any]:
    """Train TRL's arm."""
    import learning_trl

    settings = learning_trl.TrlSettings(**changed)
    given = train_options(task, output, seed, {})
    products, held_out = load_products(given)
    policy, *_ = load_models(given, None)  # answers the held-out products, with the trainer's weights
    encoder = PromptEncoder(policy, template=read_template(given.prompt_file))

    def go(optimizer_steps: int, watcher: Watcher) -> None:
        def after(updates: int) -> bool:
            return updates % settings.updates == 0 and watcher.after(updates // settings.updates)

        trainer = learning_trl.make_trainer(task, output, products, settings, given.group_size, given.batch_size,
                                            given.max_length, optimizer_steps, seed,
                                            learning_trl.Watch(lambda: watcher.begin(encoder, trainer.model), after))
        trainer.train()
        watcher.end()

    pacer = Pacer(held_out, options, seed)
    go(PACE_STEPS * settings.updates, pacer)
    steps = max(round(options.seconds / pacer.pace), 1)
    watcher = Watcher(held_out, options, seed)
    go(steps * settings.updates, watcher)
    return {"points": watcher.points, "steps": {"sampled": steps}, "settings": ALIKE | vars(settings)}


def task_of(seed: int, options: LearningOptions) -> Path:
    """Make the task of a seed, unless it is there: sheets, photos and the warmed-up model that all arms start from."""
    folder = Path(options.output_dir) / "work" / f"task_{seed}"
    if not folder.is_dir():
        with whole_folder(folder) as made:
            demo.fill_folder(made, DemoOptions(products=options.products, held_out=options.held_out, seed=seed,
                                               warm_up_steps=options.warm_up_steps), make_parts)
    return folder


def given_of(options: LearningOptions) -> dict[str, Any]:
    """The options that decide what a run finds."""
    return {name: getattr(options, name) for name in
            ("seconds", "looks", "sft_share", "settings", "warm_up_steps", "products", "held_out")}


def run_in_a_child(arm: str, seed: int, options: LearningOptions) -> dict[str, Any]:
    """Do one run in a process of its own, or read what it found before; raises OptionError if the two don't agree."""
    path = Path(options.output_dir) / f"{arm}_{seed}.json"
    given = given_of(options)
    if path.is_file():
        found = json.loads(path.read_text())
        if found["given"] != given:
            raise OptionError(f"{path} was made with other options ({found['given']}): move it away, or give another "
                              "--output_dir")
        return found
    print(f"{ARMS[arm]}, seed {seed}", file=sys.stderr)
    task_of(seed, options)
    subprocess.run([sys.executable, __file__, *(f"--{name}={value}" for name, value in given.items()),
                    f"--output_dir={options.output_dir}", f"--run={arm}/{seed}"], check=True)
    return json.loads(path.read_text())


def table(runs: dict[str, list[dict[str, Any]]], seconds: float) -> str:
    """Lay the end of each arm's curves out: mean over seeds, and the lowest and highest."""
    def spread(values: Sequence[float], form: str) -> str:
        return f"{statistics.fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    lines = [f"| after {seconds:.0f} CPU s of training | steps | mean reward | every side within 10 % |",
             "|---|---|---|---|"]
    starts = [run["points"][0] for arm in runs.values() for run in arm]
    for name, ends in (("before", starts), *((ARMS[arm], [run["points"][-1] for run in found])
                                             for arm, found in runs.items())):
        steps = round(statistics.fmean(end["steps"] for end in ends))
        lines.append(f"| {name} | {steps or ''} | {spread([end['mean_reward'] for end in ends], '.3f')} | "
                     f"{spread([end['within_10'] for end in ends], '.1%')} |")
    return "\n".join(lines)


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw both figures over CPU seconds: the mean over seeds, and a band from the lowest to the highest."""
    from matplotlib.figure import Figure

    figure = Figure((9, 3.6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 2), FIGURES.items(), strict=True):
        for arm, found in runs.items():
            looks = list(zip(*(run["points"] for run in found), strict=False))
            seconds = [statistics.fmean(point["seconds"] for point in look) for look in looks]
            values = [[point[name] for point in look] for look in looks]
            line, = axes.plot(seconds, [statistics.fmean(some) for some in values], label=ARMS[arm])
            axes.fill_between(seconds, [min(some) for some in values], [max(some) for some in values],
                              color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(title=f"{title}, held out", xlabel="CPU seconds of training", xlim=(0, None), ylim=(None, 1))
        axes.grid(color="#e4e7eb")
    axes.legend(frameon=False)
    with whole_file(path) as part:
        figure.savefig(part, format="svg", metadata={"Date": None})


def main(options: LearningOptions) -> None:
    """Do what lacks, then print and write the table, the picture and every point."""
    arms, folder = options.arms.split(","), Path(options.output_dir)
    for arm in arms:
        if arm not in ARMS:
            raise OptionError(f"--arms: {arm!r} is none; there are {', '.join(ARMS)}")
    folder.mkdir(parents=True, exist_ok=True)
    if options.run:
        arm, seed = options.run.split("/")
        torch.set_num_threads(1)
        keep_memory()
        found = run_arm(arm, int(seed), task_of(int(seed), options), options)
        write_json(folder / f"{arm}_{seed}.json", {"given": given_of(options)} | found)
        return
    seeds = [int(seed) for seed in options.seeds.split(",")]
    runs = {arm: [run_in_a_child(arm, seed, options) for seed in seeds] for arm in arms}
    text = table(runs, options.seconds)
    print(text)
    write_text(folder / "table.md", text + "\n")
    write_json(folder / "learning.json", {"made": datetime.now(UTC).isoformat(timespec="seconds"), "runs": runs})
    draw(runs, folder / "learning.svg")
