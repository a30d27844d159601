"""Try one model on one product, or on a sheet.

    python test_model.py --model_path demo/model --text "mug, grid 5 cm" --image front.png --image side.png
    python test_model.py --model_path outputs/demo/step_000200 --data_path demo/held_out.xlsx --accept_at 0.93

A checkpoint brings the prompt, photo budget and sampling it was trained with; an adapter brings the model under it. The
same text and photos are answered alike wherever they stand: alone, in any row of any sheet. A sheet comes back with
every row of it, in its order; a run that is killed goes on where it stopped when it is started again.
"""

if __name__ == "__main__":  # before torch is imported, so that --help and a misspelt option answer at once
    from config import AnswerOptions
    from ground.commands import start

    start(AnswerOptions, "Try one model on one product, or on a sheet.")

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from config import AnswerOptions, FetchOptions, SheetOptions, TrainOptions
from evidence.evaluation import in_chunks
from evidence.journal import Journal, weights_of
from evidence.report import answer_line, sizes_text, write_sheet
from ground.options import sheet_options
from models.loading import settle_dtype
from reward import RewardParts
from sheets.cells import DataError
from sheets.columns import header_rows
from sheets.fetch import fetch, make_session
from sheets.samples import PhotoError, Sample, cached_photo_path, load_samples
from sheets.summary import require_usable, summarise_problems
from sheets.table import read_table
from sizes.labels import parse_label
from sizes.texts import as_seen
from training.trained import TrainedModel, asked_otherwise, open_trained, options_of, scorer_of


def open_model(options: AnswerOptions) -> TrainedModel:
    """Open the model with the prompt, photo budget, sampling and reward it was trained with, where that is known."""
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    trained = options_of(options.checkpoint_path or options.model_path)
    if trained is None:
        logger.info("no options.yaml with this model: default prompt and photo budget")
    trained = asked_otherwise(trained or TrainOptions(), options.prompt_language, options.prompt_file)
    trained = settle_dtype(trained, options.device)
    scorer = scorer_of(trained, options.reward, options.trust_remote_code)
    return open_trained(trained, options.model_path, options.checkpoint_path, options.device,
                        options.trust_remote_code, scorer, options.eval_batch_size)


def answer_product(options: AnswerOptions) -> None:
    """Answer one product from the command line and print the answer, how it was read, and its reward."""
    label = parse_label(options.label, "--label") if options.label else ()
    for path in options.image:
        if not _is_address(path) and not Path(path).is_file():
            raise PhotoError(f"--image {path}: no such file")
    model = open_model(options)
    cache = Path(options.image_cache_dir or model.options.image_cache_dir)
    photos = tuple(fetch_photo(path, cache, options.allow_private) if _is_address(path) else Path(path)
                   for path in options.image)
    sample = Sample(row=1, product_id="-", text=as_seen(str(options.text).strip()), label=label, photos=photos,
                    sheet="command line", by_content=True)
    records, failures = model.answer(model.encoder(), [sample], options.num_samples, options.seed,
                                     greedy=options.num_samples == 1)
    if failures:
        raise DataError(failures[0].reason)
    index, sure = records[0].agreed()
    print(f"answer: {records[0].answers[index]}")
    print(reading(records[0].parts[index], bool(label)))
    if sure is not None:
        readings = ", ".join(sizes_text(parts.sizes) or "unreadable" for parts in records[0].parts)
        print(f"confidence: {sure:.3f}, of {len(records[0].parts)} answers: {readings}")


def _is_address(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def fetch_photo(address: str, cache_dir: Path, allow_private: bool = False) -> Path:
    """Find a photo in the cache, or fetch it into it; raises PhotoError naming the address."""
    path = cached_photo_path(address, cache_dir)
    if not path.is_file():
        cache_dir.mkdir(parents=True, exist_ok=True)
        options = FetchOptions(retries=1, allow_private=allow_private)
        with make_session(options) as session:
            found = fetch(session, address, cache_dir, options)
        if found.reason:
            raise PhotoError(f"--image {address}: can't be fetched: {found.reason}")
    return path


def reading(parts: RewardParts, labelled: bool) -> str:
    """Say how an answer was read and, with a label, what it is worth."""
    lines = [f"read:   {sizes_text(parts.sizes)} cm, largest first" if parts.sizes else f"read:   {parts.reason}"]
    if labelled:
        errors = ", ".join(f"{error:.1%}" for error in parts.errors)
        lines.append(f"reward: {parts.reward:.4f} (errors, largest side first: {errors})")
        lines += [f"        {name} {value:+.4f}" for name, value in parts.named]
    return "\n".join(lines)


def answer_sheet(options: AnswerOptions, model: TrainedModel | None = None) -> None:
    """Answer every product of a sheet and write the sheet back with answers, sizes and confidence beside each row.

    model: what answers; default: the one that the options name.
    """
    model, data_path = model or open_model(options), str(options.data_path)
    trained, cache = model.options, options.image_cache_dir or model.options.image_cache_dir
    reading = sheet_options(options, trained, own_sheet=True)
    samples, problems = load_samples(data_path, cache, trained.missing_photos, require_label=False, reading=reading,
                                     partial_labels=trained.partial_labels, local_photos=options.local_photos)
    if samples and problems:
        logger.warning(f"{data_path}: rows with problems\n{summarise_problems(problems)}")
    require_usable(samples, problems, data_path, cache)
    path = Path(options.output_path or Path(data_path).with_suffix(".answers.xlsx").name)
    path.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(path.with_name(path.name + ".journal"), made_with(options, trained))
    if journal.done:
        logger.info(f"going on from {journal.path}: {len(journal.done)} of {len(samples)} products are answered")
    answer_rest(model, samples, journal, options)
    noted: dict[int, list[str]] = {}
    for problem in problems:
        noted.setdefault(problem.row, []).append(problem.problem)
    rows = list(rows_with_answers(Path(data_path), reading, journal.done, noted))
    write_sheet(path, {"answers": rows, "review": [row for row in rows if row["review"]]})
    journal.finish()
    answered = [line for line in journal.done.values() if line["answer"] is not None]
    rewards = [line["reward"] for line in answered if line["reward"] is not None]
    mean = f", mean reward {sum(rewards) / len(rewards):.3f} on {len(rewards)} labelled" if rewards else ""
    review = sum(bool(row["review"]) for row in rows)
    print(f"{len(answered)} products answered{mean}; {len(rows) - len(answered)} not answered; {review} to review; "
          f"written to {path}")


def answer_rest(model: TrainedModel, samples: Sequence[Sample], journal: Journal, options: AnswerOptions) -> None:
    """Answer the products that the journal lacks, noting each few of them as they are done."""
    encoder = model.encoder(options.workers)
    rest = [replace(sample, by_content=True) for sample in samples if sample.row not in journal.done]
    for chunk in in_chunks(encoder, rest, options.eval_batch_size, "answering", len(samples) - len(rest)):
        records, failures = model.answer(encoder, chunk, options.num_samples, options.seed,
                                         greedy=options.num_samples == 1)
        for failure in failures:
            logger.warning(f"not answered: {failure}")
        journal.add([(record.sample.row, answer_line(record, options.accept_at)) for record in records]
                    + [(failure.sample.row, no_answer(failure.reason)) for failure in failures])


def no_answer(problem: str) -> dict[str, Any]:
    """The line of a row that has no answer."""
    return {"answer": None, "size_1_cm": None, "size_2_cm": None, "size_3_cm": None, "confidence": None,
            "review": "yes", "problem": problem, "label_cm": "", "reward": None}


def rows_with_answers(data_path: Path, sheet: SheetOptions, done: Mapping[int, dict[str, Any]],
                      noted: Mapping[int, Sequence[str]]) -> Iterator[dict[str, Any]]:
    """Put the answers beside the sheet's own columns: every row that is not blank, in the sheet's order."""
    header = header_rows(data_path, sheet, ("text",))
    taken = {"row", *no_answer("")}
    names: list[str] = []
    for number, cells in read_table(data_path, sheet):
        if number == header[0]:
            for place, column in enumerate(cells, start=1):
                names.append(column if column and column not in taken else f"{column or 'column'} ({place})")
                taken.add(names[-1])
        elif number > header[-1]:
            line = done.get(number) or no_answer("")
            problems = [*noted.get(number, []), line["problem"]]
            cells = [*cells, *[""] * (len(names) - len(cells))]
            yield {"row": number, **dict(zip(names, cells, strict=False)), **line,
                   "problem": "; ".join(filter(None, problems))}


def made_with(options: AnswerOptions, trained: TrainOptions) -> dict[str, Any]:
    """What the answers of a sheet depend on: a journal made with anything else is not gone on from."""
    free = {"eval_batch_size", "num_threads", "device", "workers", "image_cache_dir", "output_path"}
    return {"options": {name: value for name, value in asdict(options).items() if name not in free},
            "trained": asdict(trained), "sheet": hashlib.sha256(Path(str(options.data_path)).read_bytes()).hexdigest(),
            "weights": weights_of(options.checkpoint_path or options.model_path)}


def main(options: AnswerOptions) -> None:
    """Answer the product, or the sheet."""
    answer_product(options) if options.text is not None else answer_sheet(options)
