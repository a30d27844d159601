"""A comparison's report, or records -> what people read: a console table, sheets, JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.comparison import SAME_WITHIN
from evidence.evaluation import FIGURES, Record
from sheets.table import write_tables
from sizes.units import as_written

_ON_CONSOLE = ("mean_reward", "success_rate", "failure_rate", "zero_rate", "within_10", "volume_error", "valid_rate")


def summary_table(summaries: Mapping[str, Mapping[str, float]]) -> str:
    """Lay the main figures out as a table: a row a figure, a column a model."""
    widths = {name: max(10, len(name) + 2) for name in summaries}
    lines = [" " * 20 + "".join(f"{name:>{width}}" for name, width in widths.items())]
    for key in _ON_CONSOLE:
        if all(key in summary for summary in summaries.values()):
            cells = (f"{FIGURES[key].form.format(summary[key]):>{widths[name]}}" for name, summary in summaries.items())
            lines.append(f"{FIGURES[key].title:<20}" + "".join(cells))
    return "\n".join(lines)


def sizes_text(sizes: Sequence[float], digits: int = 6) -> str:
    """Write sizes as 15 x 12 x 8, with so many digits at most that matter."""
    return " x ".join(as_written(size, digits) for size in sizes)


def product_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Flatten a report's products for a sheet: one line a product, the first two models' answers side by side."""
    rows = []
    for product in report["products"]:
        row = {name: product[name] for name in ("row", "product_id", "category", "text")}
        row |= {"photos": len(product["photos"]), "label_cm": sizes_text(product["label"]), "change": product["change"]}
        for name, model in product["models"].items():
            agreed = model["answers"][model["agreed"]]
            row |= {f"reward {name}": model["reward"], f"confidence {name}": model["confidence"],
                    f"read {name}": sizes_text(agreed["sizes"]), f"answer {name}": agreed["answer"],
                    f"rewards {name}": [answer["reward"] for answer in model["answers"]]}
        rows.append(row)
    return rows


def review_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the products that the second model should not be trusted with unseen, the least sure first."""
    name = report["models"][1]["name"]
    accepted = report["confidence"].get(name, {}).get("accept")
    rows = [row for row in product_rows(report) if row[f"confidence {name}"] is not None
            and not (accepted and row[f"confidence {name}"] >= accepted["threshold"])]
    return sorted(rows, key=lambda row: row[f"confidence {name}"])


def tables(report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The sheets of a report: figures, products, those to review, groups."""
    figures = [{"model": name, **summary} for name, summary in report["summary"].items()]
    groups = [{**{name: line[name] for name in ("by", "value", "products", "change", "interval")}, **line["rewards"]}
              for line in report["groups"]]
    return {"summary": figures, "products": product_rows(report), "review": review_rows(report), "groups": groups}


def answer_line(record: Record, accept_at: float | None = None) -> dict[str, Any]:
    """Describe one product's answer, of several the one that agrees most with the others: sizes in cm, largest first,
    confidence, and whether a person should look (below accept_at or unreadable); the reward only with a label."""
    index, sure = record.agreed()
    parts, labelled = record.parts[index], bool(record.sample.label)
    sizes = [*parts.sizes, None, None, None][:3]
    review = not parts.sizes or accept_at is not None and sure is not None and sure < accept_at
    return {"answer": record.answers[index], **{f"size_{place}_cm": size for place, size in enumerate(sizes, start=1)},
            "confidence": sure, "review": "yes" if review else "",
            "problem": parts.reason if labelled or not parts.sizes else "",
            "label_cm": sizes_text(sorted(record.sample.label, reverse=True)),
            "reward": parts.reward if labelled else None}


def change_lines(report: Mapping[str, Any], shown: int = 5) -> str:
    """Say how far the mean reward moved and how sure that is, and name the largest gains and losses."""
    before, after = (model["name"] for model in report["models"][:2])
    change, products = report["change"][after], report["products"]
    low, high = change["interval"]
    lines = [f"mean reward {change['mean']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, "
             f"paired test p = {change['p_value']:.2g}",
             f"products: {change['better']} improved, {change['worse']} worse, {change['same']} the same "
             f"(within {SAME_WITHIN})"]
    ordered = sorted(products, key=lambda product: product["change"], reverse=True)
    gains = [product for product in ordered if product["change"] > SAME_WITHIN][:shown]
    losses = [product for product in reversed(ordered) if product["change"] < -SAME_WITHIN][:shown]
    for title, part in (("largest gains", gains), ("largest losses", losses)):
        if part:
            lines.append(f"{title}:")
            lines += ["  " + product_line(product, before, after) for product in part]
    return "\n".join(lines)


def product_line(product: Mapping[str, Any], before: str, after: str) -> str:
    """Say on one line how one product's answers changed."""
    one, two = (product["models"][name] for name in (before, after))
    return (f"row {product['row']:<5} {one['reward']:.3f} -> {two['reward']:.3f} ({product['change']:+.3f})  label "
            f"{sizes_text(product['label'])}  read {sizes_text(two['answers'][two['agreed']]['sizes']) or '-'}")


def confidence_line(report: Mapping[str, Any]) -> str:
    """Say which answers of the second model can be taken unseen."""
    found = report["confidence"].get(report["models"][1]["name"])
    if found is None:
        return "confidence: sample more than one answer a product (--num_samples) to have it"
    accept = found["accept"]
    if accept is None:
        return f"confidence: no threshold keeps wrong answers under {found['promise']:.0%} with these products"
    return (f"confidence: accept from {accept['threshold']:.3f} on: {accept['coverage']:.0%} of products, "
            f"{accept['wrong']} of {accept['accepted']} wrong, at most {accept['at_most']:.1%} (95 %)")


def write_sheet(path: Path, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write .xlsx, whole or not at all: one sheet a table, a header row, every text as text and never as a formula."""
    write_tables(path, {title: [{name: _joined(value) for name, value in row.items()} for row in rows]
                        for title, rows in tables.items()})


def _joined(value: Any) -> Any:
    """Put a list on one line."""
    if isinstance(value, (list, tuple)):
        return " | ".join(f"{item:.3f}" if isinstance(item, float) else str(item) for item in value)
    return value
