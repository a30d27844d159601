"""A comparison's report -> one HTML file that needs no network and no script: the figures, the pictures, the products.

Every number on the page is looked up in the report by the path in its data-key attribute.
"""

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from loguru import logger
from markupsafe import Markup
from PIL import Image

from evidence import charts
from evidence.comparison import outcome
from evidence.evaluation import FIGURES
from evidence.report import sizes_text
from ground.files import write_text
from sheets.samples import PhotoError, Sample, load_photos

PHOTO_BYTES = 12_000_000  # of all thumbnails together, as they stand in the page
_SIDES, _QUALITY = (176, 128, 96, 72, 48), 60
_SHOWN = 8  # products among the largest gains, and among the largest losses


def write_page(path: Path, report: Mapping[str, Any], curve: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Write the page of a report; curve: the training run's rewards over steps, empty when they are gone."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["sizes"] = partial(sizes_text, digits=4)
    environment.globals.update(number=lambda keys, form: number(report, keys, form), figures=FIGURES,
                               pictures=pictures(report, curve), times_too_large=charts.times_too_large,
                               interval=lambda line, reach: Markup(charts.interval_svg(
                                   line.get("change", line.get("mean")), *line["interval"], reach)))
    products = report["products"]
    order = sorted(range(len(products)), key=lambda place: -products[place]["change"])
    photos = thumbnails([products[place] for place in order])
    cards = [card(report, place, rank, len(order), photo)
             for rank, (place, photo) in enumerate(zip(order, photos, strict=True))]
    counts = Counter(kind for one in cards for kind in (*one["kinds"], "all"))
    write_text(path, environment.get_template("page.html").render(report=report, cards=cards, counts=counts))


def number(report: Mapping[str, Any], keys: Sequence[Any], form: str) -> Markup:
    """Write the report's number at a path, marked with the path; a dash where it has none."""
    value: Any = report
    for key in keys:
        value = value[key] if isinstance(value, list | tuple) else value.get(key)
        if value is None:
            return Markup("&ndash;")
    return Markup('<span data-key="{}">{}</span>').format(json.dumps(list(keys), ensure_ascii=False),
                                                          form.format(value))


def pictures(report: Mapping[str, Any], curve: Mapping[str, Any]) -> dict[str, Markup]:
    """Draw what belongs to no single product."""
    models = [model["name"] for model in report["models"] if model["kind"] != "ablation"]
    drawn = {"rewards": charts.histogram_svg({name: report["rewards"][name] for name in models})}
    if curve:
        drawn["curve"] = charts.curve_svg(curve, "mean reward over training steps")
    if report["confidence"]:
        drawn["risk"] = charts.risk_svg({name: part["curve"] for name, part in report["confidence"].items()},
                                        report["settings"]["promise"])
    return {name: Markup(svg) for name, svg in drawn.items()}


def card(report: Mapping[str, Any], place: int, rank: int, count: int, photos: list[str]) -> dict[str, Any]:
    """Prepare what the page shows of one product. rank: its place when sorted from largest gain to largest loss."""
    product = report["products"][place]
    names = list(product["models"])[:2]
    agreed = {name: product["models"][name]["answers"][product["models"][name]["agreed"]] for name in names}
    accepted = report["confidence"].get(names[1], {}).get("accept")
    sure = product["models"][names[1]]["confidence"]
    kinds = {"gain": rank < _SHOWN and product["change"] > 0,
             "loss": rank >= count - _SHOWN and product["change"] < 0,
             "review": sure is not None and not (accepted and sure >= accepted["threshold"]),
             "unread": any(not answer["sizes"] for answer in product["models"][names[1]]["answers"])}
    return {"place": place, "rank": rank, "product": product, "photos": photos, "agreed": agreed,
            "kinds": [outcome(product["change"]), *(kind for kind, holds in kinds.items() if holds)],
            "boxes": Markup(charts.boxes_svg(product["label"], {name: agreed[name]["sizes"] for name in names}))}


def thumbnails(products: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Shrink the products' photos into data addresses, small enough that all of them stay within PHOTO_BYTES.

    A product whose photos can't be read any more is named in the log and shown without.
    """
    budget = PHOTO_BYTES // max(sum(len(product["photos"]) for product in products), 1)
    shown = []
    for product in products:
        paths = tuple(map(Path, product["photos"]))
        try:
            photos = load_photos(Sample(product["row"], product["product_id"], "", (), paths, "not on the page:"))
        except PhotoError as problem:
            logger.warning(str(problem))
            photos = []
        shown.append([_thumbnail(photo, budget) for photo in photos])
    return shown


def _thumbnail(photo: Image.Image, budget: int) -> str:
    address = ""
    for side in _SIDES:
        photo.thumbnail((side, side), Image.Resampling.LANCZOS)  # in place: each size is made from the one before
        packed = io.BytesIO()
        photo.save(packed, "JPEG", quality=_QUALITY)
        address = "data:image/jpeg;base64," + base64.b64encode(packed.getvalue()).decode()
        if len(address) <= budget:
            break
    return address
