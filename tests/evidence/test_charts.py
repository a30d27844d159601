"""Pictures: drawn to scale, readable whatever the names, and no harm to the page that they stand in."""

import re
import subprocess
import sys
import warnings
from pathlib import Path
from xml.etree import ElementTree

import pytest

from evidence.charts import COLOURS, boxes_svg, curve_svg, histogram_svg, risk_svg, times_too_large

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["before", "after", "_训练/步 <b>&$a$", "bell \x0b half \udc80", "outputs/a name/" + "x" * 70]
PICTURES = {
    "curve": lambda names: curve_svg({name: [(0, 0.2), (9, 0.7)] for name in names}, "t & u"),
    "rewards": lambda names: histogram_svg({name: [1, 2, 3] for name in names}),
    "risk": lambda names: risk_svg({name: [(0.9, 0.5, 0.1), (0.5, 1.0, 0.3)] for name in names}, 0.2),
}


def points(svg, colour):
    """Where the first line of a colour runs."""
    line = re.search(rf'<path d="([^"]+)"[^>]*style="fill: none; stroke: {colour}', svg)[1]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", line)]


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]


def test_a_curve_is_drawn_to_scale():
    svg = curve_svg({"a": [(0, 0.0), (50, 0.75), (100, 1.0)]}, "t & u")
    (left, bottom), (middle, high), (right, top) = points(svg, COLOURS[0])
    assert middle - left == pytest.approx((right - left) / 2, abs=1e-3)
    assert bottom - high == pytest.approx((bottom - top) * 0.75, abs=1e-3)
    assert {"t & u", "a", "step", "0.0", "1.0", "100"} <= set(texts(svg))
    assert "2.0" in texts(curve_svg({"of one's own": [(0, 0.0), (1, 2.0)]}, ""))  # rewards need not end at 1


def test_bars_are_as_high_as_their_shares():
    svg = histogram_svg({"a": [1, 3], "b": [2, 2]})
    bars = [[float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", bar)]
            for bar in re.findall(r'<path d="([^"]+)"[^>]*stroke: #ffffff', svg)]
    heights = [max(bar) - min(bar) for bar in bars]
    assert [height / max(heights) for height in heights] == pytest.approx([1 / 3, 1, 2 / 3, 2 / 3], abs=1e-3)
    assert {"a", "b", "0%", "50%", "1.0"} <= set(texts(svg))


def test_risks_are_drawn_to_scale():
    svg = risk_svg({"a": [(0.9, 0.25, 0.0), (0.8, 0.5, 0.1), (0.5, 1.0, 0.3)]}, 0.2)
    (left, bottom), (middle, low), (right, high) = points(svg, COLOURS[0])
    assert middle - left == pytest.approx((right - left) / 3, abs=1e-3)
    assert bottom - low == pytest.approx((bottom - high) / 3, abs=1e-3)
    dashed = re.search(r'<path d="M [\d.]+ ([\d.]+) [^"]*"[^>]*stroke-dasharray', svg)[1]
    assert bottom - float(dashed) == pytest.approx((bottom - high) * 0.2 / 0.3, abs=1e-3)


@pytest.mark.parametrize("name", PICTURES)
def test_names_stay_text_and_stay_inside(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = PICTURES[name](NAMES)
    shown = "".join(texts(svg))
    assert "before" in shown and "_训练/步 <b>&$a$" in shown and "bell ? half ?" in shown and "x" * 28 in shown
    for colour in COLOURS[:5]:
        assert re.search(rf"<text [^>]*fill: {colour}", svg)
    assert max(map(len, texts(svg))) <= 40


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_the_same_every_time(name):
    assert PICTURES[name](NAMES[:2]) == PICTURES[name](NAMES[:2])


def test_pictures_leave_each_other_and_the_page_alone():
    page = "".join(draw(NAMES) for draw in PICTURES.values())
    ids = re.findall(r' id="([^"]+)"', page)
    assert ids and len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)
    assert not re.search(r"<style|<\?xml|<!DOCTYPE|<metadata|font-family: |<script", page)
    assert set(re.findall(r"https?://[^\"]+", page)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_what_draws_and_reckons_is_imported_when_it_is_needed():
    code = "import evidence.charts, evidence.measures, sys; print({'matplotlib', 'scipy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "set()"


def test_boxes_are_drawn_to_scale():
    svg = boxes_svg((20, 10, 5), {"before": (40, 10, 5), "after": ()})
    fronts = re.findall(r'd="M8\.0 [\d.]+h([\d.]+)v-([\d.]+)', svg)
    (width, height), (other_width, other_height) = [tuple(map(float, pair)) for pair in fronts]
    assert other_width == pytest.approx(2 * width, abs=0.2) and other_height == height
    assert width / height == pytest.approx(4, abs=0.05)
    assert boxes_svg((20,), {"before": (1e9,)}).count("<path") == 1  # off the scale: only the true one
    assert boxes_svg((), {}) == ""


@pytest.mark.parametrize(("label", "sizes"), [((12, 5, 4), (120, 50, 40)), ((12, 5, 4), (1.2, 0.5, 0.4)),
                                              ((300, 4, 4), (3000, 40, 40)), ((0.2, 2, 2), (25.4,)),
                                              ((1000, 300, 20), (2, 1))])
def test_an_answer_ten_times_off_is_drawn_and_the_true_size_still_seen(label, sizes):
    svg = boxes_svg(label, {"before": sizes})
    widths = [float(width) for width in re.findall(r'd="M8\.0 [\d.]+h([\d.]+)', svg)]
    assert not times_too_large(label, sizes) and len(widths) == 2 and widths[0] >= 8 and max(widths) <= 208
    assert widths[1] / widths[0] == pytest.approx(max(sizes) / max(label), rel=0.05, abs=0.01)
    assert times_too_large(label, [260 * side for side in label]) == pytest.approx(260)


def test_a_legend_stands_above_and_axis_labels_below():
    for svg in (PICTURES["curve"](["one"]), PICTURES["risk"](["one"])):
        heights = {element.text: float(re.search(r"translate\([\d.]+ ([\d.]+)\)|$", element.get("transform", ""))[1]
                                       or element.get("y", 0))
                   for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")}
        bottom = heights.get("step") or heights["products accepted, the surest first"]
        ticks = [height for text, height in heights.items() if re.fullmatch(r"[\d.]+%?", text)]
        assert heights["one"] < min(ticks) and bottom >= max(ticks)
