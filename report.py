"""Records -> what people read: a console table, a sheet, JSON, a curve."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from openpyxl import Workbook
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
from openpyxl.styles import Font

from evaluation import Record

SAME_WITHIN = 0.01  # a product whose mean reward moved by less counts as unchanged

_ROWS = (("mean_reward", "mean reward", "{:.3f}"), ("success_rate", "reward >= 0.9", "{:.1%}"),
         ("failure_rate", "reward < 0.3", "{:.1%}"), ("zero_rate", "reward 0", "{:.1%}"),
         ("valid_rate", "readable answers", "{:.1%}"))


def summary_table(summaries: Mapping[str, Mapping[str, float]]) -> str:
    """Lay figures out as a table: a row a figure, a column a model."""
    width = max(14, *(len(name) + 2 for name in summaries))
    lines = [" " * 20 + "".join(f"{name:>{width}}" for name in summaries)]
    for key, title, form in _ROWS:
        cells = (form.format(summary[key]) for summary in summaries.values())
        lines.append(f"{title:<20}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def compare_products(before: Sequence[Record], after: Sequence[Record]) -> list[dict[str, Any]]:
    """Pair records by row: one line a product, in the sheet's order. Products that only one side answered are left
    out here; the caller reports them."""
    answered = {record.key: record for record in after}
    lines = []
    for record in before:
        other = answered.get(record.key)
        if other is None:
            continue
        lines.append({
            **_product(record), "label_cm": sizes_text(sorted(record.sample.label, reverse=True)),
            "reward_before": record.reward, "reward_after": other.reward, "change": other.reward - record.reward,
            **_best(record, "before"), **_best(other, "after"),
            "rewards_before": record.rewards, "rewards_after": other.rewards,
        })
    return lines


def _product(record: Record) -> dict[str, Any]:
    return {"row": record.sample.row, "product_id": record.sample.product_id, "text": record.sample.text,
            "photos": len(record.sample.photos)}


def _best(record: Record, when: str) -> dict[str, str]:
    best = max(range(len(record.parts)), key=lambda index: record.parts[index].reward)
    return {f"best_answer_{when}": record.answers[best], f"best_read_{when}": sizes_text(record.parts[best].sizes)}


def sizes_text(sizes: Sequence[float]) -> str:
    """Write sizes as 15 x 12 x 8."""
    return " x ".join(f"{size:g}" for size in sizes)


def product_line(line: Mapping[str, Any]) -> str:
    """Say on one line how one product's answers changed."""
    return (f"row {line['row']:<5} {line['reward_before']:.3f} -> {line['reward_after']:.3f} ({line['change']:+.3f})  "
            f"label {line['label_cm']}  best read {line['best_read_after'] or '-'}")


def answer_line(record: Record) -> dict[str, Any]:
    """Describe one product's first answer: sizes in cm, largest first; the reward only where there is a label."""
    parts = record.parts[0]
    sizes = [*parts.sizes, None, None, None][:3]
    return {**_product(record), "answer": record.answers[0],
            **{f"size_{index}_cm": size for index, size in enumerate(sizes, start=1)},
            "problem": parts.reason if record.sample.label or not parts.sizes else "",
            "label_cm": sizes_text(sorted(record.sample.label, reverse=True)),
            "reward": parts.reward if record.sample.label else None}


def change_lines(products: Sequence[Mapping[str, Any]], shown: int = 5) -> str:
    """Say how many products improved, and name the largest gains and losses."""
    changes = [line["change"] for line in products]
    improved = sum(change > SAME_WITHIN for change in changes)
    worse = sum(change < -SAME_WITHIN for change in changes)
    lines = [f"products: {improved} improved, {worse} worse, {len(changes) - improved - worse} the same "
             f"(within {SAME_WITHIN})"]
    ordered = sorted(products, key=lambda line: line["change"], reverse=True)
    gains = [line for line in ordered if line["change"] > SAME_WITHIN][:shown]
    losses = [line for line in reversed(ordered) if line["change"] < -SAME_WITHIN][:shown]
    for title, part in (("largest gains", gains), ("largest losses", losses)):
        if part:
            lines.append(f"{title}:")
            lines += ["  " + product_line(line) for line in part]
    return "\n".join(lines)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    partial.replace(path)


def write_sheet(path: Path, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write .xlsx, whole or not at all: one sheet a table, a header row, every text as text and never as a formula."""
    book = Workbook()
    book.remove(book.active)
    for title, rows in tables.items():
        sheet = book.create_sheet(title)
        columns = list(rows[0]) if rows else []
        for column, name in enumerate(columns, start=1):
            sheet.cell(1, column, name).font = Font(bold=True)
        for line, row in enumerate(rows, start=2):
            for column, name in enumerate(columns, start=1):
                _write_cell(sheet.cell(line, column), row[name])
        sheet.freeze_panes = "A2"
    partial = path.with_name(path.name + ".partial")
    book.save(partial)
    partial.replace(path)


def _write_cell(cell: Any, value: Any) -> None:
    if isinstance(value, (list, tuple)):
        value = " | ".join(f"{item:.3f}" if isinstance(item, float) else str(item) for item in value)
    if isinstance(value, str):
        cell.value = ILLEGAL_CHARACTERS_RE.sub("\N{REPLACEMENT CHARACTER}", value)
        cell.data_type = "s"
    else:
        cell.value = value


_COLOURS = ("#9aa5b1", "#1f6feb", "#d1495b")


def curve_svg(series: Mapping[str, Sequence[tuple[int, float]]], title: str) -> str:
    """Draw rewards over steps as an SVG of 640 x 360. series: name -> (step, value in [0, 1]) in order of steps."""
    last_step = max((step for points in series.values() for step, _ in points), default=0) or 1
    left, right, top, bottom = 48, 624, 40, 312

    def at(step: int, value: float) -> str:
        return f"{left + (right - left) * step / last_step:.1f},{bottom - (bottom - top) * value:.1f}"

    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 360" font-family="sans-serif" font-size="12">',
             '<rect width="640" height="360" fill="white"/>',
             f'<text x="{left}" y="22" font-size="14">{escape(title)}</text>']
    for tenth in range(0, 11, 2):
        y = bottom - (bottom - top) * tenth / 10
        parts.append(f'<path d="M{left} {y}H{right}" stroke="#e4e7eb"/>'
                     f'<text x="16" y="{y + 4}">{tenth / 10:.1f}</text>')
    for index, (name, points) in enumerate(series.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        line = " ".join(at(step, value) for step, value in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<rect x="{left + 190 * index}" y="336" width="14" height="4" fill="{colour}"/>'
                     f'<text x="{left + 190 * index + 20}" y="342">{escape(name)}</text>')
    parts.append(f'<text x="{left}" y="328">0</text>'
                 f'<text x="{right}" y="328" text-anchor="end">step {last_step}</text>')
    return "\n".join([*parts, "</svg>", ""])
