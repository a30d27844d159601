"""What training brings real weights on a sheet of yours: before, GRPO, supervised, both; all weights and adapters.

    python demo.py --real --output_dir demo_real        # the weights, or any other model folder with --model_path
    python bench/real_weights.py --data_path data.xlsx
    python bench/real_weights.py --data_path data.xlsx --ways grpo      # the others later: what is done is kept
    python bench/real_weights.py --data_path data.xlsx --ways none --wordings 24    # which wording, before training

All ways train on the same products for the same number of steps and answer the same held-out ones. Started again, it
goes on where it was stopped, in training and in answering. It writes real_weights.json and .svg and prints the table.
"""

import hashlib
import json
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the program's own files

from config import SheetOptions, TrainOptions, option


@dataclass
class RealOptions(SheetOptions):
    """What to measure"""

    data_path: str = option("data.xlsx", "the sheet: text and label, and photos where there are any")
    model_path: str = option("demo_real/model", "the model that all ways begin with")
    run_config: str = option("configs/demo_real.yaml", "the options of training that are not named here")
    ways: tuple[str, ...] = option(
        ("grpo", "supervised", "both", "grpo_lora", "supervised_lora", "both_lora"), "how to train, or none")
    max_steps: int = option(18, "steps of each way", within="(0, inf)")
    sft_steps: int = option(6, "supervised ones among those of both", within="(0, inf)")
    lr: float = option(2e-5, "learning rate of all weights", within="(0, inf)")
    sft_lr: float = option(4e-5, "that of their supervised steps", within="(0, inf)")
    lora_rank: int = option(16, "rank of the adapters", within="(0, inf)")
    lora_lr: float = option(2e-4, "their learning rate", within="(0, inf)")
    eval_fraction: float = option(0.3, "share of the products held out", within="(0, 1)")
    eval_every: int = option(6, "steps between evaluations, for the curves; 0 for none", within="[0, inf)")
    num_samples: int = option(2, "answers sampled a held-out product with each model", within="(0, inf)")
    wordings: int = option(0, "products trained on that the untrained model answers in each wording, eight times",
                           within="[0, inf)")
    prompt: list[str] = option([], "a prompt file to try beside the built-in wordings; repeat for more")
    output_dir: str = option("outputs/real_weights", "folder for checkpoints, answers and results")


if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from ground.commands import start

    start(RealOptions, "Before, GRPO, supervised, both, on a sheet of yours.")

import torch
from loguru import logger

from evidence.charts import curve_svg
from evidence.comparison import change
from evidence.evaluation import Record, in_chunks, summarise
from evidence.journal import Journal, weights_of
from evidence.measures import bootstrap_interval, within
from ground.errors import OptionError
from ground.files import write_json, write_text
from ground.options import check_options, parse_options, write_options
from meter import processor_name
from own_reward import Scorer
from prompts import build_prompt, read_template
from reward import SUCCESS_REWARD
from run import read_curve
from sheets.cells import DataError
from sheets.samples import Sample
from train_vlm_parallel import load_products
from training.trained import TrainedModel, asked_otherwise, open_trained

WORDING_ANSWERS = 8


def settings_of(way: str, options: RealOptions) -> TrainOptions:
    """The training options of a way; raises OptionError for one that is not known."""
    method, _, adapters = way.partition("_")
    if method not in ("grpo", "supervised", "both") or adapters not in ("", "lora"):
        raise OptionError(f"--ways {way}: known are grpo, supervised and both, and each with _lora behind it")
    common = parse_options(TrainOptions, "", ["--config", options.run_config, "--data_path", options.data_path,
                                              "--eval_path", "null"])
    folder = Path(options.output_dir) / way
    sft_steps = {"grpo": 0, "supervised": options.max_steps, "both": options.sft_steps}[method]
    settings = replace(
        common, data_path=options.data_path, column=options.column, sheet_name=options.sheet_name,
        encoding=options.encoding, eval_fraction=options.eval_fraction, model_path=options.model_path,
        max_steps=options.max_steps, eval_every=options.eval_every, output_dir=str(folder),
        log_dir=str(folder / "curves"), resume="auto", sft_steps=sft_steps,
        sft_lr=options.sft_lr if sft_steps and not adapters else None, lr=options.lr, lr_scheduler="constant",
        min_lr_ratio=0.0)
    if adapters:
        settings = replace(settings, lora_rank=options.lora_rank, lr=options.lora_lr)
    check_options(settings)
    return settings


def train(way: str, settings: TrainOptions) -> Path:
    """Train a way in a process of its own, or go on with it; returns its last checkpoint."""
    folder = Path(settings.output_dir)
    last = folder / f"step_{settings.max_steps:06d}"
    if (last / "options.yaml").is_file():
        return last
    folder.mkdir(parents=True, exist_ok=True)
    write_options(settings, folder / "run.yaml")
    before = children_seconds()
    try:
        done = subprocess.run([sys.executable, ROOT / "train_vlm_parallel.py", "--config", folder / "run.yaml"])
    finally:
        note = folder / "cpu_seconds.json"
        earlier = json.loads(note.read_text()) if note.is_file() else 0
        note.write_text(json.dumps(round(earlier + children_seconds() - before, 1)))
    if done.returncode:
        raise OptionError(f"{way}: training ended with status {done.returncode}; started again, this goes on from the "
                          "last checkpoint")
    return last


def children_seconds() -> float:
    """CPU seconds of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def text_of(asked: TrainOptions) -> str:
    """The wording of a prompt without photos."""
    return build_prompt("{text}", [], asked.prompt_language, read_template(asked.prompt_file))


def answers_of(name: str, made_with: Any, model: TrainedModel, samples: Sequence[Sample], count: int, journal: Journal
               ) -> list[Record]:
    """Answer products count times, but those that the journal has under this name, made with the same."""
    encoder, records = model.encoder(), []
    name = f"{name} ({hashlib.sha256(repr(made_with).encode()).hexdigest()[:8]})"
    rest = [sample for sample in samples if f"{name} row {sample.row}" not in journal.done]
    for chunk in in_chunks(encoder, rest, model.batch_size, name, len(samples) - len(rest)):
        found, failures = model.answer(encoder, chunk, count, 0)
        for failure in failures:
            logger.warning(f"not answered: {failure}")
        journal.add((f"{name} row {record.sample.row}", {"answers": record.answers}) for record in found)
    for sample in samples:
        answers = journal.done.get(f"{name} row {sample.row}", {}).get("answers", [])
        if answers:
            records.append(Record(sample, answers, [model.scorer(answer, sample) for answer in answers]))
    if not records:
        raise DataError("no product could be answered; see the warnings above")
    return records


def figures(records: Sequence[Record], before: Sequence[Record]) -> dict[str, Any]:
    """Summarise answers: means with intervals over products, and the change since before."""
    by_product = {
        "mean_reward": [record.reward for record in records],
        "success_rate": [fmean(reward >= SUCCESS_REWARD for reward in record.rewards) for record in records],
        "within_10": [fmean(within(part.errors, 0.1) for part in record.parts) for record in records]}
    known = {record.key: record for record in before}
    both = [(known[record.key], record) for record in records if record.key in known]
    return summarise(records) | {
        "intervals": {name: bootstrap_interval(values) for name, values in by_product.items()},
        "change": change(*zip(*both, strict=True))}


def try_wordings(options: RealOptions, model: TrainedModel, products: Sequence[Sample], journal: Journal
                 ) -> dict[str, dict[str, float]]:
    """Ask the untrained model in each wording, built in and of the user's own, what is there for RL to learn from."""
    trained, found = model.options, {}
    chosen = products[::max(1, len(products) // options.wordings)][:options.wordings]
    for wording in ("en", "zh", *options.prompt):
        asked = ("en", wording) if wording in options.prompt else (wording, None)
        model.options = asked_otherwise(trained, *asked)
        records = answers_of(f"wording {wording}", text_of(model.options), model, chosen, WORDING_ANSWERS, journal)
        found[wording] = summarise(records) | {"best": fmean(max(record.rewards) for record in records)}
    model.options = trained
    return found


def table(results: Mapping[str, Any]) -> str:
    """Lay ways and wordings out as tables in Markdown."""
    lines = []
    if "before" in results["ways"]:
        lines += ["| | mean reward | reward >= 0.9 | every side within 10 % | reward 0 | readable | change "
                  "| CPU minutes of training |", "|---|---|---|---|---|---|---|---|"]
    for name, way in results["ways"].items():
        low, high = way["change"]["interval"]
        changed = "" if name == "before" else f"{way['change']['mean']:+.3f} ({low:+.3f} to {high:+.3f})"
        minutes = f"{way['cpu_seconds'] / 60:.0f}" if way.get("cpu_seconds") else ""
        cells = [_with_interval(way, "mean_reward", "{:.3f}"), _with_interval(way, "success_rate", "{:.1%}"),
                 _with_interval(way, "within_10", "{:.1%}"), f"{way['zero_rate']:.1%}", f"{way['valid_rate']:.1%}"]
        lines.append(f"| {' | '.join([name, *cells, changed, minutes])} |")
    if results["wordings"]:
        lines += ["", f"| wording, untrained, {WORDING_ANSWERS} answers a product | mean reward | best of "
                  f"{WORDING_ANSWERS} | reward >= 0.9 | readable |", "|---|---|---|---|---|"]
    for name, wording in results["wordings"].items():
        lines.append(f"| {name} | {wording['mean_reward']:.3f} | {wording['best']:.3f} | "
                     f"{wording['success_rate']:.1%} | {wording['valid_rate']:.1%} |")
    return "\n".join(lines)


def _with_interval(way: Mapping[str, Any], name: str, form: str) -> str:
    low, high = (form.format(end) for end in way["intervals"][name])
    return f"{form.format(way[name])} ({low} to {high})"


def main(options: RealOptions) -> None:
    """Train and answer what is not done yet, write the results, print the table."""
    ways = [way for way in options.ways if way != "none"]
    settings = {way: settings_of(way, options) for way in ways}
    common = settings_of("grpo", options)
    torch.set_num_threads(common.num_threads or torch.get_num_threads())
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    products, held_out = load_products(common)
    journal = Journal(folder / "answers.journal", {
        "held_out": hashlib.sha256(repr(held_out).encode()).hexdigest(), "num_samples": options.num_samples,
        "model": weights_of(options.model_path), "temperature": common.temperature, "max_length": common.max_length})
    results: dict[str, Any] = surroundings(options, held_out)
    model = open_trained(common, common.model_path, None, common.device, common.trust_remote_code,
                         Scorer(common.reward))
    if options.wordings:
        results["wordings"] = try_wordings(options, model, products, journal)
    before = answers_of("before", text_of(common), model, held_out, options.num_samples, journal) if ways else []
    del model  # one model in memory at a time
    if before:
        results["ways"]["before"] = figures(before, before)
    curves = {}
    for way in ways:
        checkpoint = train(way, settings[way])
        model = open_trained(settings[way], "", str(checkpoint), common.device, common.trust_remote_code,
                             Scorer(common.reward))
        made_with = weights_of(checkpoint), text_of(common)
        records = answers_of(way, made_with, model, held_out, options.num_samples, journal)
        del model
        results["ways"][way] = figures(records, before) | {
            "cpu_seconds": json.loads((checkpoint.parent / "cpu_seconds.json").read_text()),
            "curve": read_curve(Path(settings[way].log_dir))}
        curves |= {f"{way}: {title}": line for title, line in results["ways"][way]["curve"].items()
                   if ">=" not in title}
        write_json(folder / "real_weights.json", results)
    write_json(folder / "real_weights.json", results)
    if curves:
        write_text(folder / "real_weights.svg", curve_svg(curves, "mean reward over training steps"))
    print(table(results))


def surroundings(options: RealOptions, held_out: Sequence[Sample]) -> dict[str, Any]:
    """Date, machine, versions, options; room for the results."""
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "processor": processor_name(),
            "versions": {name: version(name) for name in ("torch", "transformers")}, "options": asdict(options),
            "held_out": len(held_out), "ways": {}, "wordings": {}}
