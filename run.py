"""Compare the model before and after training on the same held-out products.

    python run.py --checkpoint_path outputs/demo/step_000200 [--ablate] [--also outputs/demo/step_000100]

Prompt, photo budget, parser, reward and sampling are those the checkpoint was trained with. Writes compare.html (the
page to show), compare.xlsx and compare.json beside the checkpoint and prints the table. A comparison that is killed
goes on where it stopped when it is started again.
"""

if __name__ == "__main__":  # before torch is imported, so that --help and a misspelt option answer at once
    from config import CompareOptions
    from ground.commands import start

    start(CompareOptions, "Compare a model before and after training on the same products.")

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from config import CompareOptions, TrainOptions
from evidence.charts import curve_svg
from evidence.comparison import Answers, build_report
from evidence.evaluation import Record, ablations, in_chunks, with_other_photos
from evidence.journal import Journal, weights_of
from evidence.page import write_page
from evidence.report import change_lines, confidence_line, summary_table, tables, write_sheet
from ground.errors import OptionError
from ground.files import write_json, write_text
from ground.options import sheet_options
from models.loading import settle_dtype
from models.lora import is_adapter
from models.weights import check_files
from own_reward import Scorer
from prompts import read_template
from rollout import PromptEncoder
from sheets.cells import DataError
from sheets.order import split_held_out
from sheets.samples import Sample, load_samples
from sheets.summary import require_usable, summarise_problems
from training.trained import TrainedModel, open_trained, options_of, scorer_of

# What decides how a model answers; the prompt is compared by its text.
_ANSWERING = ("prompt_language", "max_slice_nums", "max_pixels", "max_prompt_length", "max_length", "temperature",
              "dtype", "quantize")


def main(options: CompareOptions) -> None:
    """Answer with each model, and write and print how they differ."""
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    trained = training_options(options)
    names_of(options.also)  # refuses what is given twice before any model answers
    samples = choose_samples(options, trained)
    if options.ablate and not with_other_photos(samples):
        raise DataError("--ablate: none of these products can be shown another one's photos, having none, or all the "
                        "same; leave it out")
    scorer = scorer_of(trained, options.reward, options.trust_remote_code)
    logger.info(scorer.check(samples[0]))
    folder = Path(options.output_dir) if options.output_dir else Path(options.checkpoint_path).parent / "compare"
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / "compare.journal", made_with(options, trained, samples))
    if journal.done:
        logger.info(f"going on from {journal.path}: {len(journal.done)} products are answered, all models together")
    answers = [*answers_of_run(options, trained, samples, scorer, journal),
               *answers_of_also(options, trained, samples, scorer, journal)]
    report = build_report(answers, settings(options, trained), options.accept_error)
    curve = read_curve(Path(trained.log_dir))
    write_json(folder / "compare.json", report | {"curve": curve})
    write_sheet(folder / "compare.xlsx", tables(report))
    write_page(folder / "compare.html", report, curve)
    if curve:
        write_text(folder / "curve.svg", curve_svg(curve, "mean reward over training steps"))
    journal.finish()
    print(f"\n{report['settings']['how']}\n{summary_table(report['summary'])}\n\n{change_lines(report)}\n"
          f"{confidence_line(report)}\nreport: {folder / 'compare.html'}, compare.xlsx, compare.json\n"
          f"curves: tensorboard --logdir {trained.log_dir}")


def made_with(options: CompareOptions, trained: TrainOptions, samples: Sequence[Sample]) -> dict[str, Any]:
    """What the answers depend on: a journal made with anything else is not gone on from."""
    paths = [options.model_path or trained.model_path, options.checkpoint_path, *options.also]
    return {"products": hashlib.sha256(repr(samples).encode()).hexdigest(), "greedy": options.greedy,
            "num_samples": options.num_samples, "seed": options.seed, "models": [[path, weights_of(path)]
                                                                                 for path in paths],
            "trained": asdict(trained), "prompt": read_template(trained.prompt_file)}


def answers_of_run(options: CompareOptions, trained: TrainOptions, samples: Sequence[Sample], scorer: Scorer,
                   journal: Journal) -> Iterator[Answers]:
    """Answer with the model before, the one after and, with --ablate, the one after without the right photos."""
    before_path = options.model_path or trained.model_path
    model = open_trained(trained, before_path, None, options.device, options.trust_remote_code, scorer,
                         options.eval_batch_size)
    check_weights(model, before_path, options)
    yield Answers("before", "before", before_path,
                  *answer("before", model, model.encoder(options.workers), samples, options, journal))
    model.policy.load_weights(options.checkpoint_path)
    yield Answers("after", "after", options.checkpoint_path,
                  *answer("after", model, model.encoder(options.workers), samples, options, journal))
    if options.ablate:
        for name, (encoder, others) in ablations(samples, partial(model.encoder, options.workers)).items():
            left_out = len(samples) - len(others)
            notes = (f"{left_out} of {len(samples)} products left out: they have no photos, or no other product has "
                     "other ones",) if left_out else ()
            for note in notes:
                logger.warning(f"{name}: {note}")
            sampled, greedy = answer(name, model, encoder, others, options, journal, both=False)
            yield Answers(name, "ablation", options.checkpoint_path, sampled, greedy, notes)


def check_weights(model: TrainedModel, model_path: str, options: CompareOptions) -> None:
    """Refuse weights that can't be read or don't fit the model before, before any model has answered."""
    model.policy.check_weights(options.checkpoint_path)
    for path in options.also:
        if Path(path).is_file() and (options_of(path) or model.options).model_path == model_path:
            model.policy.check_weights(path)
        elif Path(path).is_dir() and not is_adapter(path):
            check_files(Path(path))


def answers_of_also(options: CompareOptions, trained: TrainOptions, samples: Sequence[Sample], scorer: Scorer,
                    journal: Journal) -> Iterator[Answers]:
    """Answer with the models of --also, each with its own options where it has any."""
    for path, name in zip(options.also, names_of(options.also), strict=True):
        own = options_of(path)
        notes = differences(own, trained) if own else (
            "no options.yaml beside it: answered with the prompt and options of the model after",)
        model = open_trained(own or trained, "", path, options.device, options.trust_remote_code, scorer,
                             options.eval_batch_size)
        for note in notes:
            logger.warning(f"{path}: {note}")
        sampled, greedy = answer(name, model, model.encoder(options.workers), samples, options, journal)
        del model  # one model in memory at a time
        yield Answers(name, "also", path, sampled, greedy, notes)


def names_of(paths: Sequence[str]) -> list[str]:
    """Name each of --also by the end of its path, as much of it as tells them apart."""
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names) and not {"before", "after"} & set(names):
            return names
    if parts:
        raise OptionError(f"--also {' '.join(paths)}: one of them is given twice")
    return []


def differences(own: TrainOptions, trained: TrainOptions) -> tuple[str, ...]:
    """Say which of the options that decide an answer differ from those of the model after."""
    notes = [f"answered with its own --{name} {getattr(own, name)}; the model after has {getattr(trained, name)}"
             for name in _ANSWERING if getattr(own, name) != getattr(trained, name)]
    if read_template(own.prompt_file) != read_template(trained.prompt_file):
        notes.append(f"answered with its own prompt, {own.prompt_file or 'the built-in one'}; the model after has "
                     f"{trained.prompt_file or 'the built-in one'}")
    if own.reward != trained.reward:
        notes.append(f"trained for another reward, {' + '.join(own.reward) or 'size'}; scored here as the others are")
    return tuple(notes)


def answer(name: str, model: TrainedModel, encoder: PromptEncoder, samples: Sequence[Sample], options: CompareOptions,
           journal: Journal, both: bool = True) -> tuple[list[Record], list[Record]]:
    """Answer all products, sampled and greedily, but those that the journal has under this name.

    Products that can't be answered are logged. both: greedily too where answers are sampled.
    """
    wanted = {"sampled": not options.greedy, "greedy": options.greedy or both}
    kinds = [kind for kind, asked_for in wanted.items() if asked_for]
    records: dict[str, list[Record]] = {"sampled": [], "greedy": []}
    rest = []
    for sample in samples:
        line = journal.done.get(f"{name} row {sample.row}", {})
        for kind, answers in line.items():
            records[kind].append(Record(sample, answers, [model.scorer(each, sample) for each in answers]))
        rest += [] if line else [sample]
    for chunk in in_chunks(encoder, rest, options.eval_batch_size, name, len(samples) - len(rest)):
        lines: dict[str, dict[str, list[str]]] = defaultdict(dict)
        for kind in kinds:
            found, failures = model.answer(encoder, chunk, options.num_samples, options.seed, kind == "greedy")
            records[kind] += found
            for failure in failures:
                logger.warning(f"not answered: {failure}")
            for record in found:
                lines[f"{name} row {record.sample.row}"][kind] = record.answers
        journal.add((key, line) for key, line in lines.items() if len(line) == len(kinds))
    if not all(records[kind] for kind in kinds):
        raise DataError("no product could be answered; see the warnings above")
    return records["sampled"], records["greedy"]


def settings(options: CompareOptions, trained: TrainOptions) -> dict:
    """What a reader of the report needs to know of how it came about."""
    how = "one greedy answer a product" if options.greedy else (
        f"{options.num_samples} answers a product, sampled at temperature {trained.temperature}")
    rows = (f"{options.data_path or trained.eval_path or trained.data_path}"
            + ("" if options.data_path else f", {options.rows.replace('_', ' ')}"))
    supervised = f", the first {trained.sft_steps} supervised" if trained.sft_steps else ""
    facts = [how, f"at most {trained.max_length} new tokens, seed {options.seed}",
             f"reward: {' + '.join(options.reward or trained.reward) or 'size, the built-in one'}",
             f"rows: {rows}",
             f"training: {trained.max_steps} steps{supervised}, learning rate {trained.lr:g}, "
             f"kl_weight {trained.kl_weight:g}, {trained.batch_size} products x {trained.group_size} answers a step, "
             f"seed {trained.seed}"]
    return {"how": how, "sheet": rows, "rows": "named" if options.data_path else options.rows,
            "made": time.strftime("%Y-%m-%d %H:%M"),
            "facts": facts, "promise": options.accept_error, "temperature": None if options.greedy else
            trained.temperature, "num_samples": 1 if options.greedy else options.num_samples, "seed": options.seed,
            "trained_with": asdict(trained)}


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
    return settle_dtype(trained, options.device)


def choose_samples(options: CompareOptions, trained: TrainOptions) -> list[Sample]:
    """The products to compare on: the training run's held-out ones unless told otherwise."""
    own_sheet = options.data_path is not None
    path = options.data_path or (trained.eval_path if options.rows == "held_out" else None) or trained.data_path
    from_eval_path = not own_sheet and options.rows == "held_out" and trained.eval_path is not None
    reading = sheet_options(options, trained, own_sheet, from_eval_path)
    samples, problems = load_samples(path, options.image_cache_dir or trained.image_cache_dir, trained.missing_photos,
                                     reading=reading, partial_labels=trained.partial_labels)
    logger.info(f"{path}: {len(samples)} products")
    if samples and problems:
        logger.warning(f"{path}: rows with problems\n{summarise_problems(problems)}")
    require_usable(samples, problems, path, options.image_cache_dir or trained.image_cache_dir)
    if options.rows == "held_out" and path == trained.data_path and not from_eval_path:
        samples = split_held_out(samples, trained.eval_fraction)[1]
        if not samples:
            raise DataError(f"{path}: eval_fraction {trained.eval_fraction} of this run held out no product; compare "
                            "on all rows with --rows all, or give another sheet with --data_path")
    elif own_sheet:
        logger.info(f"{path} was named on the command line: all its products are compared")
    return samples[:options.max_products]
