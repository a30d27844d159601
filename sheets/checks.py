"""What may be wrong with rows that can be read: outliers, unit slips, answers in the text, repeats, leaks.

Nothing here leaves a row out: each finding is a RowProblem of a row that is used. look_over is cheap enough for every
start; look_at_photos opens the photos.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from statistics import median

from sheets.photos import SeenPhoto
from sheets.samples import CONTRADICTION, RowProblem, Sample, come_again, label_gap, most_different, rows_of_products
from sizes.texts import sizes_in_text

FEWEST = 20  # labelled rows it takes to say what is usual
_FACTOR = 10.0  # a side so many times the usual one is an outlier
_SPREAD = 4.0  # and so many standard deviations away from it
_SLIPS = {"inch and cm": 2.54, "inch and mm": 25.4, "mm and cm": 10.0, "m and cm": 100.0, "ft and cm": 30.48}
_WITHIN = 0.02  # sizes of text and label that differ by less are the same
_SAME_LOOK = 4  # of 64 bits in which photos that look alike differ at most


def look_over(samples: Sequence[Sample]) -> list[RowProblem]:
    """Find everything that may be wrong with rows that can be read, in the order of rows."""
    findings = [*look_across(samples), *(_finding(sample, problem) for sample in samples
                                         for problem in against_text(sample))]
    return sorted(findings, key=lambda finding: finding.row)


def look_across(samples: Sequence[Sample]) -> Iterator[RowProblem]:
    """Find what only several rows together tell; a text need only be equal where the texts of rows are."""
    yield from (finding for look in (outliers, placeholders, written_differently, repeats, shared_photos)
                for finding in look(samples))


def _finding(sample: Sample, problem: str) -> RowProblem:
    return RowProblem(sample.row, sample.product_id, problem, used=True)


def outliers(samples: Sequence[Sample]) -> list[RowProblem]:
    """Find labels an order of magnitude off what is usual among their like, the worst first."""
    found = []
    for name, group in _alike([sample for sample in samples if sample.label]).items():
        for rank in range(3):
            having = [sample for sample in group if len(sample.label) > rank]
            if len(having) < FEWEST:
                continue
            logs = [math.log(sorted(sample.label, reverse=True)[rank]) for sample in having]
            usual = median(logs)
            spread = 1.4826 * median(abs(log - usual) for log in logs)  # of a normal distribution
            limit = max(math.log(_FACTOR), _SPREAD * spread)
            for log, sample in zip(logs, having, strict=True):
                away = abs(log - usual)
                if away > limit:
                    how = "times as long as" if log > usual else "times shorter than"
                    side = sorted(sample.label, reverse=True)[rank]
                    found.append((away, sample, f"{side:g} cm is {math.exp(away):.0f} {how} the usual "
                                                f"{math.exp(usual):.3g} cm {name}"))
    worst: dict[int, RowProblem] = {}
    for _, sample, text in sorted(found, key=lambda finding: -finding[0]):
        worst.setdefault(sample.row, _finding(sample, f"label outlier: {sample.written_label!r}: {text}"))
    return list(worst.values())


def _alike(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Group samples by category, or by text where many rows share it; the rest is one group."""
    texts = Counter(sample.text for sample in samples)
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        category = sample.category or (sample.text if texts[sample.text] >= FEWEST else "")
        groups.setdefault(f"of {category[:40]}" if category else "of this sheet", []).append(sample)
    small = [name for name, group in groups.items() if len(group) < FEWEST and name != "of this sheet"]
    for name in small:
        groups.setdefault("of this sheet", []).extend(groups.pop(name))
    return groups


def placeholders(samples: Sequence[Sample]) -> Iterator[RowProblem]:
    """Find labels that look as if they were typed to fill the cell: three equal sides, or 1 2 3."""
    labelled = sum(bool(sample.label) for sample in samples)
    for sample in samples:
        numbers = re.findall("[0-9.]+", sample.written_label)
        if len(sample.label) == 3 and len(set(sample.label)) == 1:
            few = f"; {labelled} labelled rows are too few to say what is usual" if labelled < FEWEST else ""
            yield _finding(sample, f"label like a placeholder: {sample.written_label!r}: three equal sides{few}")
        elif numbers[:3] in (["1", "2", "3"], ["3", "2", "1"]):
            yield _finding(sample, f"label like a placeholder: {sample.written_label!r}")


def against_text(sample: Sample) -> Iterator[str]:
    """Tell a text that names the label's sizes, and a label that is such sizes in another unit."""
    sizes = _sizes_in_text(sample.text) if sample.label else ()
    if len(sizes) < max(len(sample.label), 1):
        return
    if _all_among(sample.label, sizes):
        yield "answer in the text: it names all sides of the label"
    elif len(set(sample.label)) > 1:
        for name, factor in _SLIPS.items():
            for times in (factor, 1 / factor):
                if _all_among([side * times for side in sample.label], sizes):
                    yield (f"unit slip: {sample.written_label!r}: the text names these sides "
                           f"{max(times, 1 / times):g} times {'larger' if times > 1 else 'smaller'}, as when {name} "
                           "are confused")


_sizes_in_text = lru_cache(1000)(sizes_in_text)  # since rows of one product may share a text


def _all_among(label: Sequence[float], sizes: Sequence[float]) -> bool:
    return all(any(abs(side - size) <= _WITHIN * side for size in sizes) for side in label)


def written_differently(samples: Sequence[Sample]) -> Iterator[RowProblem]:
    """Find products whose labels are written differently but agree."""
    for group in rows_of_products(samples):
        one, other = most_different(group)
        if other is not None and label_gap(one.label, other.label) <= CONTRADICTION:
            for sample in group:
                against = one if sample is not one else other
                yield _finding(sample, f"label written differently: {sample.written_label!r} here, "
                                       f"{against.written_label!r} in row {against.row} for the same product, which "
                                       "agrees")


def repeats(samples: Sequence[Sample]) -> Iterator[RowProblem]:
    """Find rows that say what an earlier row says."""
    def content_of(sample: Sample) -> tuple:
        return sample.text, sample.label, sample.photos, sample.product_id

    several, seen = come_again(map(content_of, samples)), {}
    for sample in samples if several else ():
        content = content_of(sample)
        if hash(content) in several and (first := seen.setdefault(content, sample.row)) != sample.row:
            yield _finding(sample, f"row repeated: the same as row {first}")


def shared_photos(samples: Sequence[Sample]) -> Iterator[RowProblem]:
    """Find photo files that an earlier row of another product has too."""
    several, first = come_again(photo for sample in samples for photo in sample.photos), {}
    for sample in samples:
        for photo in sample.photos:
            if hash(photo) in several and (owner := first.setdefault(photo, sample)).product_id != sample.product_id:
                yield _finding(sample, f"photo shared: {photo} belongs to row {owner.row} ({owner.product_id}) too")


def look_at_photos(samples: Sequence[Sample], seen: Mapping[str, SeenPhoto]) -> list[RowProblem]:
    """Find photos that are broken, equal, or look alike. seen: path -> what was seen of it, where it was opened."""
    found, owners, looks = [], {}, {}
    for sample in samples:
        mine: list[tuple[str, str, int | None]] = []
        for path in filter(seen.__contains__, sample.photos):
            content, look = seen[path].content, seen[path].look
            if seen[path].fault:
                found.append(_finding(sample, f"photo broken: {path}: {seen[path].fault}"))
                continue
            for other, its_content, its_look in mine:
                if content == its_content:
                    found.append(_finding(sample, f"photo twice: {path} equals {other}; it counts once"))
                elif look is not None and its_look is not None and (look ^ its_look).bit_count() <= _SAME_LOOK:
                    found.append(_finding(sample, f"photos look alike: {path} and {other}"))
            mine.append((path, content, look))
            owner, its_path = owners.setdefault(content, (sample, path))
            alike, _ = looks.setdefault(look, (sample, path)) if look is not None else (sample, path)
            if owner.product_id != sample.product_id and its_path != path:
                found.append(_finding(sample, f"photo shared: {path} equals {its_path} of row {owner.row} "
                                              f"({owner.product_id})"))
            elif alike.product_id not in (sample.product_id, owner.product_id):
                found.append(_finding(sample, f"photos look alike: {path} and that of row {alike.row} "
                                              f"({alike.product_id})"))
    return found


def leaks(training: Sequence[Sample], held_out: Sequence[Sample], seen: Mapping[str, SeenPhoto] | None = None
          ) -> Iterator[RowProblem]:
    """Find held-out rows whose product or photo is trained on. seen: path -> what was seen of an opened photo."""

    def content_of(photo: str) -> str:
        return seen[photo].content if seen and photo in seen else photo

    products = dict.fromkeys(sample.product_id for sample in held_out)  # -> the first sample that is trained on
    photos = dict.fromkeys(content_of(photo) for sample in held_out for photo in sample.photos)
    for sample in training:
        if sample.product_id in products:
            products[sample.product_id] = products[sample.product_id] or sample
        for content in filter(photos.__contains__, map(content_of, sample.photos)):
            photos[content] = photos[content] or sample
    for sample in held_out:
        if other := products[sample.product_id]:
            yield _finding(sample, f"held-out product trained on: {other.sheet} row {other.row} has it too")
        for photo in sample.photos:
            other = photos[content_of(photo)]
            if other and other.product_id != sample.product_id:
                yield _finding(sample, f"held-out photo trained on: {other.sheet} row {other.row} has {photo} too")


def count_kinds(problems: Sequence[RowProblem]) -> dict[str, int]:
    """Count the rows of each kind of problem: the kinds that cost most rows first, then the commonest."""
    rows: dict[str, set[int]] = {}
    lost: dict[str, set[int]] = {}
    for problem in problems:
        rows.setdefault(problem.kind, set()).add(problem.row)
        if not problem.used:
            lost.setdefault(problem.kind, set()).add(problem.row)
    worst_first = sorted(rows, key=lambda kind: (-len(lost.get(kind, ())), -len(rows[kind])))
    return {kind: len(rows[kind]) for kind in worst_first}
