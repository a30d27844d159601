"""One step of the demo with the shared prefix and without: CPU seconds. 22-token prompts leave little to share.

    python demo.py && python bench/demo_step.py

Both run the demo's model, catalogue and settings, turn by turn, from the same weights with the same random numbers.
"""

import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the program's own files

from config import TrainOptions, option
from ground.options import parse_options


@dataclass
class DemoStepOptions:
    """What to measure"""

    run_config: str = option("configs/demo.yaml", "the run whose steps are measured")
    repeats: int = option(5, "steps of each side; their medians are printed", within="(0, inf)")



if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from ground.commands import start

    start(DemoStepOptions, "One step of the demo with the shared prefix and without.")

import torch

from meter import Meter, keep_memory
from ours import make_run, our_step
from prompts import read_template
from sheets.order import products_of_step
from train_vlm_parallel import load_products


def measure(settings: TrainOptions, repeats: int) -> dict[bool, list[dict[str, float]]]:
    """Seconds by phase of every step, for exact_path True and False."""
    template = read_template(settings.prompt_file)
    products, _ = load_products(settings)
    sides = {exact_path: replace(settings, exact_path=exact_path) for exact_path in (True, False)}
    runs = {exact_path: make_run(options, template) for exact_path, options in sides.items()}
    seconds: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for step in range(repeats + 1):
        tokens = set()
        for exact_path, run in runs.items():
            run.products = [products[index] for index in
                            products_of_step(len(products), settings.batch_size, step, settings.seed)]
            meter = Meter()
            groups = our_step(run, sides[exact_path], step, meter)
            meter.charge()
            tokens.add(sum(int(group.action_mask.sum()) for group in groups))
            if step:  # the first step fills caches
                seconds[exact_path].append(dict(meter.seconds))
        print(f"step {step}: answers of {' and '.join(map(str, tokens))} tokens")
    return seconds


def main(options: DemoStepOptions) -> None:
    """Print both sides by phase and what is left of the exact path's cost."""
    settings = parse_options(TrainOptions, "", ["--config", options.run_config])
    torch.set_num_threads(1)
    keep_memory()
    seconds = measure(settings, options.repeats)
    medians = {}
    for exact_path, steps in seconds.items():
        medians[exact_path] = statistics.median(sum(step.values()) for step in steps)
        phases = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
        print(f"{'exact path' if exact_path else 'shared prefix'}: "
              + ", ".join(f"{name} {value:.3f}" for name, value in phases.items())
              + f", step {medians[exact_path]:.3f} CPU seconds")
    print(f"shared prefix / exact path: {medians[False] / medians[True]:.2f}")
