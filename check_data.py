"""Look at a sheet before training: which rows can be trained on, what is wrong with the others, what is odd.

    python check_data.py --data_path data.xlsx --image_cache_dir image_cache_new

Takes the data options of training. Prints a summary, writes a page with thumbnails and the sheet back with a `problem`
column, a workbook as .xlsx and any other sheet as .csv. The exit status is 0 when training would start, 1 when it would
not, 2 when the sheet can't be read.
"""

if __name__ == "__main__":  # before torch is imported, so that --help and a misspelt option answer at once
    from config import CheckDataOptions
    from ground.commands import start

    start(CheckDataOptions, "Look at a sheet before training.")

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice
from pathlib import Path

from loguru import logger
from tqdm import tqdm

from config import CheckDataOptions, SheetOptions
from ground.errors import OptionError
from ground.files import write_text
from ground.options import held_out_sheet
from prompts import build_prompt, read_template
from sheets import workbooks
from sheets.cells import DataError
from sheets.check_page import html_page
from sheets.checks import FEWEST, against_text, leaks, look_across, look_at_photos
from sheets.findings import FoundRow, RowFile, Tally
from sheets.order import split_held_out
from sheets.photos import SeenPhoto, examine_photos
from sheets.samples import CONTRADICTION, RowProblem, Sample, doubtful_labels, judge_rows
from sheets.summary import WITHOUT_PHOTOS, count_photos, describe_labels, obey_bad_rows, require_usable
from sheets.table import as_many_as_fit, write_table

_BRIEF = 40  # characters of a text that stay in memory: as many as are shown of what rows share


@dataclass
class SheetCheck:
    """What was found in one sheet."""

    path: str
    rows: list[Sample]  # all rows with a text, which is in brief, the label () where none can be read
    usable: list[Sample]  # those that would be trained on
    header: Sequence[str]
    file: RowFile  # every row, with what is wrong with it by itself
    findings: list[RowProblem]  # what several rows tell together
    verdict: str = ""  # why training would not start

    def by_row(self) -> Iterator[tuple[FoundRow, list[RowProblem]]]:
        """Give each row and all its problems, each once; it is used if it would be trained on."""
        used = {sample.row for sample in self.usable}
        found = groupby(sorted(self.findings, key=lambda problem: problem.row), key=lambda problem: problem.row)
        number, more = next(found, (None, ()))
        for row in self.file:
            problems = row.problems
            if row.number == number:
                problems = [*problems, *(problem.problem for problem in more)]
                number, more = next(found, (None, ()))
            yield row, [RowProblem(row.number, row.product_id, problem, row.number in used)
                        for problem in dict.fromkeys(problems)]

    def problems(self) -> Iterator[RowProblem]:
        """Give all problems in the order of rows."""
        return chain.from_iterable(problems for _, problems in self.by_row())


def check(options: CheckDataOptions) -> bool:
    """Look at the sheet, and the held-out one; print, write page and sheet back; say whether training would start."""
    stem = Path(options.data_path).stem
    names = [(options.html_path or f"{stem}.check.html",
              options.output_path or f"{stem}.check{kind_of(options.data_path)}"),
             (f"{stem}.check.held_out.html", f"{stem}.check.held_out{kind_of(options.eval_path or '')}")]
    checks = [inspect_rows(options.data_path, options, options, names[0][1])]
    if options.eval_path:
        checks.append(inspect_rows(options.eval_path, held_out_sheet(options), options, names[1][1]))
    seen = see_photos([sample for each in checks for sample in each.rows], options.max_photos)
    for each in checks:
        each.findings += [*look_across(each.rows), *look_at_photos(each.rows, seen)]
    first, last = checks[0], checks[-1]
    training, held_out = ((first.usable, last.usable) if options.eval_path
                          else split_held_out(first.usable, options.eval_fraction))
    if first.usable and not training:
        first.verdict = first.verdict or f"all {len(first.usable)} usable products are held out by --eval_fraction"
    last.findings += leaks(training, held_out, seen)
    verdict = first.verdict or last.verdict
    conclusion = (f"training would not start: {verdict}" if verdict else
                  f"training would start: {len(training)} rows to train on, {len(held_out)} held out; "
                  f"{count_photos(first.usable, first.problems())}")
    for each, (page, sheet) in zip(checks, names, strict=False):
        tally = Tally()
        write_table(sheet, rows_back(each, tally))
        print(summarise(each, tally))
        write_text(page, html_page(each.path, count_rows(each), tally.worst_first(), conclusion, seen))
        print(f"written: {page}, {sheet}\n")
    print(conclusion)
    return not verdict


def kind_of(path: str) -> str:
    """Choose the kind of the sheet that is written back: a workbook for a workbook, else .csv, which has no end."""
    return ".xlsx" if Path(path).suffix.lower() in workbooks.KINDS else ".csv"


def inspect_rows(path: str, reading: SheetOptions, options: CheckDataOptions, output: str) -> SheetCheck:
    """Read a sheet once, its rows as they are and as training would take them. output: where it is to be written."""
    found = SheetCheck(path, [], [], (), RowFile(Path(output).parent), [])
    too_long = length_check(options)
    judged_rows = judge_rows(path, options.image_cache_dir, options.missing_photos, True, reading,
                             options.partial_labels)
    below_header = islice(as_many_as_fit(output, chain([None], judged_rows), "write a .csv instead: --output_path "
                                         "NAME.csv"), 1, None)
    for judged in below_header:
        sample, problems, found.header = judged.sample, judged.problems, judged.row.header
        there = sample.photos
        if options.missing_photos == "placeholder":
            there = tuple(filter(os.path.isfile, there))
        if sample.text:
            problems = [*problems, *against_text(sample), *too_long(sample.text)]
            found.rows.append(replace(sample, text=in_brief(sample.text), photos=there))
        if judged.used:
            found.usable.append(found.rows[-1] if there == sample.photos else sample)
        found.file.add(FoundRow(sample.row, sample.product_id, judged.row.cells, sample.text, sample.written_label,
                                str(sample.label), there, problems))
    doubts = doubtful_labels(found.usable)
    found.usable = [sample for sample in found.usable if sample.row not in doubts]
    doubts = doubtful_labels(found.rows)
    found.findings = [RowProblem(sample.row, sample.product_id, doubts[sample.row], False) for sample in found.rows
                   if sample.row in doubts]
    try:
        require_usable(found.usable, found.problems(), path, options.image_cache_dir, WITHOUT_PHOTOS)
        obey_bad_rows(found.problems(), path, options.on_bad_row)
    except DataError as problem:
        found.verdict = str(problem)
    return found


def in_brief(text: str) -> str:
    """Stand in for a text where texts are only compared, so that a million need not be in memory."""
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]} ... {hash(text):x}"


def see_photos(samples: Sequence[Sample], most: int) -> dict[str, SeenPhoto]:
    """Open at most so many photos, each once; path -> what was seen."""
    named = (photo for sample in samples for photo in sample.photos)
    paths: dict[str, None] = {}
    while len(paths) < most and (path := next(named, None)):
        paths[path] = None
    if any(path not in paths for path in named):
        logger.warning(f"the first {most} photos are opened, not the others (--max_photos)")
    return dict(tqdm(examine_photos(paths), total=len(paths), unit="photo", disable=None))


def length_check(options: CheckDataOptions) -> Callable[[str], Iterator[str]]:
    """Make the function that tells a text which alone is longer than the prompt may be: it can't be rolled out."""
    if not options.max_prompt_length:
        return lambda text: iter(())
    count, template = token_counter(options.model_path), read_template(options.prompt_file)
    about = "" if options.model_path else "about "

    def too_long(text: str) -> Iterator[str]:
        tokens = count(build_prompt(text, (), options.prompt_language, template))
        if tokens > options.max_prompt_length:
            yield (f"text too long: {about}{tokens} tokens without photos, --max_prompt_length is "
                   f"{options.max_prompt_length}")

    return too_long


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


def count_rows(found: SheetCheck) -> str:
    """Say how many rows a sheet has."""
    return (f"{len(found.rows)} rows with a text, {sum(bool(sample.label) for sample in found.rows)} with a readable "
            f"label, {sum(len(sample.photos) for sample in found.rows)} photos there")


def summarise(found: SheetCheck, tally: Tally, examples: int = 3, outliers_shown: int = 10) -> str:
    """Write the console summary: how many rows, what is wrong with how many of them, the first of each kind."""
    lines = [f"{found.path}: {count_rows(found)}", f"{len(found.usable)} rows would be used, {tally.lost} left out",
             describe_labels(found.usable)]
    apart, alike = (len({problem.product_id for problem in found.findings if problem.kind == kind})
                    for kind in ("labels contradict", "label written differently"))
    if apart + alike:
        lines.append(f"products with labels written differently: {apart + alike}; of these {apart} contradict each "
                     f"other, by more than {CONTRADICTION:.0%} on a side")
    labelled = sum(bool(sample.label) for sample in found.rows)
    if labelled < FEWEST:
        lines.append(f"labelled rows: {labelled}, too few to say which labels are outliers (it takes {FEWEST})")
    worst = [problem for problem in found.findings if problem.kind == "label outlier"]  # in this order
    for name, kind in tally.worst_first().items():
        lines.append(f"{name} ({kind.rows} of the rows)")
        shown = ([(problem.row, [problem]) for problem in worst[:outliers_shown]] if name == "label outlier" else
                 [(row.number, problems) for row, problems in kind.first[:examples]])
        lines += [f"    row {row} ({problems[0].product_id}): {problems[0].detail[:150]}"
                  + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "") for row, problems in shown]
    return "\n".join(lines)


def rows_back(found: SheetCheck, tally: Tally) -> Iterator[list[str]]:
    """Give the sheet's rows back with their number, what was read as label, and problems in three more columns.

    Counts the problems of the rows that go by.
    """
    yield [*found.header, "row", "read", "problem"]
    for row, problems in found.by_row():
        tally.add(row, problems)
        said = [problem.problem + ("" if problem.used else " (left out)") for problem in problems]
        yield [*row.cells, str(row.number), row.read, "\n".join(said)]


def main(options: CheckDataOptions) -> int:
    """Check; 0 when training would start, 1 when it would not."""
    return 0 if check(options) else 1
