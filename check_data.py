"""Look at a sheet before training: which rows can be trained on, what is wrong with the others, what is odd.

    python check_data.py --data_path data.xlsx --image_cache_dir image_cache_new

Takes the data options of training. Prints a summary, writes a page with thumbnails and the sheet back with a `problem`
column. The exit status is 0 when training would start, 1 when it would not, 2 when the sheet can't be read.
"""

if __name__ == "__main__":  # before torch is imported, so that --help and a misspelt option answer at once
    from config import CheckDataOptions
    from ground.commands import start

    start(CheckDataOptions, "Look at a sheet before training.")

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loguru import logger
from tqdm import tqdm

from config import CheckDataOptions, SheetOptions
from ground.errors import OptionError
from ground.files import write_text
from ground.options import held_out_sheet
from prompts import build_prompt, read_template
from sheets.check_page import html_page
from sheets.checks import FEWEST, count_kinds, leaks, look_at_photos, look_over, outliers
from sheets.columns import header_rows
from sheets.photos import examine_photos
from sheets.samples import (
    CONTRADICTION,
    WITHOUT_PHOTOS,
    DataError,
    RowProblem,
    Sample,
    count_photos,
    describe_labels,
    doubtful_labels,
    load_samples,
    obey_bad_rows,
    read_rows,
    require_usable,
    split_held_out,
)
from sheets.table import read_table, write_table


@dataclass
class SheetCheck:
    """What was found in one sheet."""

    path: str
    reading: SheetOptions
    rows: list[Sample]  # all rows with a text, the label () where none can be read
    usable: list[Sample]  # those that would be trained on
    losses: list[RowProblem]  # why others would not
    problems: list[RowProblem]  # everything that was found
    verdict: str = ""  # why training would not start

    def sort_out(self) -> None:
        """Put the problems in order, each once; whether a row is used is decided by what would be trained on."""
        used = {sample.row for sample in self.usable}
        self.problems = sorted({RowProblem(problem.row, problem.product_id, problem.problem, problem.row in used): None
                                for problem in self.problems}, key=lambda problem: problem.row)


def check(options: CheckDataOptions) -> bool:
    """Look at the sheet, and the held-out one; print, write page and sheet back; say whether training would start."""
    checks = [inspect_rows(options.data_path, options, options)]
    if options.eval_path:
        checks.append(inspect_rows(options.eval_path, held_out_sheet(options), options))
    seen = see_photos([sample for each in checks for sample in each.rows], options.max_photos)
    for each in checks:
        each.problems += [*look_over(each.rows), *look_at_photos(each.rows, seen), *too_long(each.rows, options)]
    first, last = checks[0], checks[-1]
    training, held_out = ((first.usable, last.usable) if options.eval_path
                          else split_held_out(first.usable, options.eval_fraction))
    if first.usable and not training:
        first.verdict = first.verdict or f"all {len(first.usable)} usable products are held out by --eval_fraction"
    last.problems += list(leaks(training, held_out, {path: content for path, (content, _, _) in seen.items()}))
    verdict = first.verdict or last.verdict
    conclusion = (f"training would not start: {verdict}" if verdict else
                  f"training would start: {len(training)} rows to train on, {len(held_out)} held out; "
                  f"{count_photos(first.usable, first.losses)}")
    stem = Path(options.data_path).stem
    names = [(options.html_path or f"{stem}.check.html", options.output_path or f"{stem}.check.xlsx"),
             (f"{stem}.check.held_out.html", f"{stem}.check.held_out.xlsx")]
    for each, (page, sheet) in zip(checks, names, strict=False):
        each.sort_out()
        print(summarise(each))
        write_text(page, html_page(each.path, each.rows, each.problems, conclusion))
        write_table(sheet, with_problems(each))
        print(f"written: {page}, {sheet}\n")
    print(conclusion)
    return not verdict


def inspect_rows(path: str, reading: SheetOptions, options: CheckDataOptions) -> SheetCheck:
    """Read a sheet twice: every row as it is, and as training would."""
    rows, problems = read_rows(path, options.image_cache_dir, "text_only", False, reading, options.partial_labels)
    usable, losses = load_samples(path, options.image_cache_dir, options.missing_photos, reading=reading,
                                  partial_labels=options.partial_labels)
    doubts = doubtful_labels(rows)
    problems += [problem for problem in losses if problem.kind == "label missing"]
    problems += [RowProblem(sample.row, sample.product_id, doubts[sample.row], False) for sample in rows
                 if sample.row in doubts]
    found = SheetCheck(path, reading, rows, usable, losses, problems)
    try:
        require_usable(usable, losses, path, options.image_cache_dir, WITHOUT_PHOTOS)
        obey_bad_rows(losses, path, options.on_bad_row)
    except DataError as problem:
        found.verdict = str(problem)
    return found


def see_photos(samples: Sequence[Sample], most: int) -> dict[str, tuple[str, int | None, str]]:
    """Open at most so many photos: path -> content key, look, fault."""
    paths = list(dict.fromkeys(photo for sample in samples for photo in sample.photos))
    if len(paths) > most:
        logger.warning(f"{most} of {len(paths)} photos are opened (--max_photos)")
    opened = tqdm(examine_photos(paths[:most]), total=min(len(paths), most), unit="photo", disable=None)
    return {path: (content, look, fault) for path, content, look, fault in opened}


def too_long(samples: Sequence[Sample], options: CheckDataOptions) -> Iterator[RowProblem]:
    """Find rows whose text alone is longer than the prompt may be: they can't be rolled out."""
    if not options.max_prompt_length:
        return
    template = read_template(options.prompt_file)
    count = token_counter(options.model_path)
    for sample in samples:
        tokens = count(build_prompt(sample.text, (), options.prompt_language, template))
        if tokens > options.max_prompt_length:
            about = "" if options.model_path else "about "
            yield RowProblem(sample.row, sample.product_id, f"text too long: {about}{tokens} tokens without photos, "
                             f"--max_prompt_length is {options.max_prompt_length}", True)


def token_counter(model_path: str | None) -> Callable[[str], int]:
    """Count tokens with the model's own tokenizer, or estimate: four signs of ASCII, or one other, a token."""
    if not model_path:
        return lambda text: (outside := sum(sign > "\x7f" for sign in text)) + (len(text) - outside) // 4
    from tokenizers import Tokenizer

    path = Path(model_path) / "tokenizer.json"
    if not path.is_file():
        raise OptionError(f"--model_path {model_path}: no tokenizer.json in it; leave the option out for an estimate")
    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: len(tokenizer.encode(text).ids)


def summarise(found: SheetCheck, examples: int = 3, outliers_shown: int = 10) -> str:
    """Write the console summary: how many rows, what is wrong with how many of them, the first of each kind."""
    labelled = sum(bool(sample.label) for sample in found.rows)
    lost = {problem.row for problem in found.problems if not problem.used}
    lines = [f"{found.path}: {len(found.rows)} rows with a text, {labelled} with a readable label, "
             f"{sum(len(sample.photos) for sample in found.rows)} photos there",
             f"{len(found.usable)} rows would be used, {len(lost)} left out", describe_labels(found.usable)]
    of_kind: dict[str, list[RowProblem]] = {}
    for problem in found.problems:
        of_kind.setdefault(problem.kind, []).append(problem)
    of_kind["label outlier"] = outliers(found.rows)  # the worst first
    apart, alike = (len({problem.product_id for problem in of_kind.get(kind, ())})
                    for kind in ("labels contradict", "label written differently"))
    if apart + alike:
        lines.append(f"products with labels written differently: {apart + alike}; of these {apart} contradict each "
                     f"other, by more than {CONTRADICTION:.0%} on a side")
    if labelled < FEWEST:
        lines.append(f"labelled rows: {labelled}, too few to say which labels are outliers (it takes {FEWEST})")
    for kind, count in count_kinds(found.problems).items():
        lines.append(f"{kind} ({count} of the rows)")
        lines += [f"    row {problem.row} ({problem.product_id}): {problem.detail[:150]}"
                  for problem in of_kind[kind][:outliers_shown if kind == "label outlier" else examples]]
    return "\n".join(lines)


def with_problems(found: SheetCheck) -> Iterator[list[str]]:
    """Give the sheet's rows back with their number, what was read as label, and problems in three more columns."""
    said: dict[int, list[str]] = {}
    for problem in found.problems:
        said.setdefault(problem.row, []).append(problem.problem + ("" if problem.used else " (left out)"))
    read = {sample.row: str(sample.label) for sample in found.rows}
    header = header_rows(found.path, found.reading, ("text",))
    width = 0
    for number, cells in read_table(found.path, found.reading):
        cells = [*cells, *[""] * (width - len(cells))]
        if number == header[0]:
            width = len(cells)
            yield [*cells, "row", "read", "problem"]
        elif number in header:
            yield [*cells, "", "", ""]
        elif number > header[-1]:
            yield [*cells, str(number), read.get(number, ""), "\n".join(said.get(number, []))]


def main(options: CheckDataOptions) -> int:
    """Check; 0 when training would start, 1 when it would not."""
    return 0 if check(options) else 1
