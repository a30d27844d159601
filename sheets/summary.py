"""What is said of a sheet that was read, and when there is too little in it to go on."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from sheets.cells import DataError
from sheets.samples import FETCHED, RowProblem, Sample

WITHOUT_PHOTOS = "use such rows without photos: --missing_photos text_only"


def describe_labels(samples: Sequence[Sample]) -> str:
    """Say how many labels have three, two and one size, and how each kind is compared with answers."""
    kinds = Counter((len(sample.label), bool(sample.label.axes) and len(sample.label) < 3)
                    for sample in samples if sample.label)
    ways = {(3, False): "sorted", (2, True): "by their axes", (2, False): "largest first", (1, True): "by its axis",
            (1, False): "with the largest"}
    said = [f"{kinds[kind]} of {('one size', 'two sizes', 'three sizes')[kind[0] - 1]} ({way})"
            for kind, way in ways.items() if kinds[kind]]
    return f"labels: {', '.join(said) or 'none'}"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def summarise_problems(problems: Sequence[RowProblem], limit: int = 20) -> str:
    """Write one line for each of the first `limit` problems, the number of the others, and how many rows they cost."""
    lines = [f"row {problem.row} ({problem.product_id}): {problem.problem}: {'used' if problem.used else 'left out'}"
             for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"... and {len(problems) - limit} more")
    used = {problem.row for problem in problems if problem.used}
    left_out = {problem.row for problem in problems if not problem.used}
    lines.append(f"{_rows(len(used | left_out))} with problems: {len(left_out)} left out, {len(used)} used")
    return "\n".join(lines)


def require_usable(samples: Sequence[Sample], problems: Iterable[RowProblem], data_path: str | Path,
                   image_cache_dir: str | Path, without_photos: str = "") -> None:
    """Raise DataError when a sheet gave no sample: how many rows it has, what is wrong with them, and the way out.

    problems: in the order of rows. without_photos: how the command at work uses rows whose photos are missing, if it
    can.
    """
    if samples:
        return
    first, rows = None, Counter()  # how many rows have which kinds of problem
    fetched = False  # whether photos are missing that can be fetched
    for _, of_row in groupby(problems, key=lambda problem: problem.row):
        of_row = list(of_row)
        first = first or of_row[0]
        fetched = fetched or any(FETCHED in problem.problem for problem in of_row)
        rows[frozenset(problem.kind for problem in of_row)] += 1
    if first is None:
        raise DataError(f"{data_path}: has no rows below its header. Add one row for each product")
    counts = ", ".join(f"{name} ({_rows(sum(count for kinds, count in rows.items() if name in kinds))})"
                        for name in sorted(frozenset().union(*rows)))
    message = [f"{data_path}: no row can be used, of {rows.total()}: {counts}.",
               f"The first: row {first.row} ({first.product_id}): {first.problem}."]
    if frozenset({"photo missing"}) in rows:
        ways_out = ["Put them there", "give their folder with --image_cache_dir"]
        if fetched:
            ways_out[0] = (f"Fetch them: python download_images.py --data_path {data_path} --image_cache_dir "
                           f"{image_cache_dir}")
        message.append(f"Photos were looked for in {image_cache_dir} under md5(address) + extension. "
                       f"{', or '.join(filter(None, [*ways_out, without_photos]))}.")
    if any(kinds - {"photo missing"} for kinds in rows):
        message.append("Fill in the text and label of the rows in the sheet.")
    raise DataError(" ".join(message))


def count_photos(samples: Sequence[Sample], problems: Iterable[RowProblem]) -> str:
    """Say how many photos samples have, and how many of them are placeholders."""
    count = f"{sum(len(sample.photos) for sample in samples)} photos"
    rows = {sample.row for sample in samples if sample.missing_photos == "placeholder"}
    stand_ins = sum(problem.kind == "photo missing" and problem.row in rows for problem in problems) if rows else 0
    return f"{count}, {stand_ins} of them placeholders" if stand_ins else count


def obey_bad_rows(problems: Iterable[RowProblem], data_path: str | Path, on_bad_row: str) -> None:
    """Raise DataError when rows are left out and that is to stop the run (--on_bad_row stop)."""
    bad = (problem for problem in problems if not problem.used)
    if on_bad_row == "stop" and (first := next(bad, None)):
        count = len({first.row, *(problem.row for problem in bad)})
        raise DataError(f"{data_path}: {_rows(count)} can't be trained on, and --on_bad_row is stop. The first: row "
                        f"{first.row} ({first.product_id}): {first.problem}. Mend them (python check_data.py lists "
                        "all), or leave them out with --on_bad_row skip")
