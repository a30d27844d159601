"""Compare the model before and after training on the same held-out products.

    python run.py --checkpoint_path outputs/demo/step_000420 [--ablate]

Prompt, photo budget, parser and sampling are those the checkpoint was trained with. Writes compare.xlsx and
compare.json beside the checkpoint and prints the table.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from config import CompareOptions, OptionError, TrainOptions, parse_options, sheet_options

if __name__ == "__main__":
    OPTIONS = parse_options(CompareOptions, "Compare a model before and after training on the same products.")

import torch
from loguru import logger

from checkpoint import options_of
from data import DataError, Sample, load_samples, require_usable, split_held_out, summarise_problems
from evaluation import Record, ablations, evaluate, summarise
from family import ModelError
from policy import load_policy
from prompts import read_template
from report import change_lines, compare_products, curve_svg, product_line, summary_table, write_json, write_sheet
from rollout import PromptEncoder


def compare(options: CompareOptions) -> None:
    """Answer with the model before and after, and write and print how they differ."""
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    trained = training_options(options)
    samples = choose_samples(options, trained)
    before_path = options.model_path or trained.model_path
    policy = load_policy(before_path, trained, options.device, options.trust_remote_code)
    make_encoder = partial(PromptEncoder, policy, trained.prompt_language, read_template(trained.prompt_file),
                           trained.prompt_cache_mb, trained.max_prompt_length)
    encoder = make_encoder()

    results: dict[str, list[Record]] = {"before": answer(encoder, samples, options, trained)}
    policy.load_weights(options.checkpoint_path)
    results["after"] = answer(encoder, samples, options, trained)
    if options.ablate:
        for name, (blind, others) in ablations(samples, make_encoder).items():
            results[name] = answer(blind, others, options, trained)

    summaries = {name: summarise(records) for name, records in results.items()}
    products = compare_products(results["before"], results["after"])
    output_dir = Path(options.output_dir) if options.output_dir else Path(options.checkpoint_path).parent / "compare"
    output_dir.mkdir(parents=True, exist_ok=True)
    settings = {"before": before_path, "after": options.checkpoint_path, "rows": options.rows,
                "temperature": None if options.greedy else trained.temperature,
                "num_samples": 1 if options.greedy else options.num_samples, "seed": options.seed,
                "trained_with": asdict(trained)}
    write_json(output_dir / "compare.json", {"settings": settings, "summary": summaries, "products": products})
    write_sheet(output_dir / "compare.xlsx", {
        "summary": [{"model": name, **summary} for name, summary in summaries.items()], "products": products})
    curve = read_curve(Path(trained.log_dir))
    if curve:
        (output_dir / "curve.svg").write_text(curve_svg(curve, "mean reward over training steps"), encoding="utf-8")
    for line in products:
        logger.info(product_line(line))
    print(f"\n{how_answered(settings)}\n{summary_table(summaries)}\n\n{change_lines(products)}\n\n"
          f"report: {output_dir / 'compare.xlsx'}, compare.json{', curve.svg' if curve else ''}\n"
          f"curves: tensorboard --logdir {trained.log_dir}")


def read_curve(log_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the reward curves of the training run from its TensorBoard logs; empty when they are gone."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not log_dir.is_dir():
        return {}
    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    events.Reload()
    tags = {"returns": "sampled in training", "held_out/mean_reward": "held-out products",
            "held_out/success_rate": "held-out, share >= 0.9"}
    return {title: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag, title in tags.items() if tag in events.Tags()["scalars"]}


def training_options(options: CompareOptions) -> TrainOptions:
    """The options the checkpoint was trained with; the defaults, said aloud, when none lie beside it."""
    trained = options_of(options.checkpoint_path)
    if trained is None:
        logger.warning(f"{options.checkpoint_path}: no options.yaml beside it, so the default prompt, sampling and "
                       "photo budget are used; put the training run's options.yaml there to get the same")
        trained = TrainOptions()
        if not options.model_path:
            raise OptionError("--model_path is missing: without options.yaml the model before is unknown")
    return trained


def choose_samples(options: CompareOptions, trained: TrainOptions) -> list[Sample]:
    """The products to compare on: the training run's held-out ones unless told otherwise."""
    own_sheet = options.data_path is not None
    path = options.data_path or (trained.eval_path if options.rows == "held_out" else None) or trained.data_path
    from_eval_path = not own_sheet and options.rows == "held_out" and trained.eval_path is not None
    reading = sheet_options(options, trained, own_sheet, from_eval_path)
    samples, problems = load_samples(path, options.image_cache_dir or trained.image_cache_dir, trained.missing_photos,
                                     reading=reading)
    logger.info(f"{path}: {len(samples)} products")
    if samples and problems:
        logger.warning(f"{path}: rows with problems\n{summarise_problems(problems)}")
    require_usable(samples, problems, path, options.image_cache_dir or trained.image_cache_dir)
    if options.rows == "held_out" and path == trained.data_path and not from_eval_path:
        samples = split_held_out(samples, trained.eval_fraction)[1]
        if not samples:
            raise DataError(f"{path}: --eval_fraction {trained.eval_fraction} of this run held out no product; compare "
                            "on all rows with --rows all, or give another sheet with --data_path")
    elif own_sheet:
        logger.info(f"{path} was named on the command line: all its products are compared")
    return samples[:options.max_products]


def answer(encoder: PromptEncoder, samples: Sequence[Sample], options: CompareOptions, trained: TrainOptions
           ) -> list[Record]:
    """Answer all products with the policy as it is now; products that can't be answered are logged."""
    records, failures = evaluate(encoder, samples, options.num_samples, None if options.greedy else trained.temperature,
                                 trained.max_length, options.seed, options.eval_batch_size)
    for failure in failures:
        logger.warning(f"not answered: {failure}")
    if not records:
        raise DataError("no product could be answered; see the warnings above")
    return records


def how_answered(settings: dict) -> str:
    """One line that says how the answers came about."""
    if settings["temperature"] is None:
        return "one greedy answer a product"
    return f"{settings['num_samples']} answers a product, sampled at temperature {settings['temperature']}"


def main(options: CompareOptions) -> int:
    """Compare; problems that the user can mend end with one message and status 2."""
    logger.remove()
    logger.add(sys.stderr, format="{level:<7} {message}")
    try:
        compare(options)
    except (OptionError, DataError, ModelError) as problem:
        logger.error(str(problem))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
