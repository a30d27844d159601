"""Pictures as inline SVG: matplotlib's curves and distributions; intervals, and products' sizes drawn to scale.

Importing matplotlib takes half a second, so that only the functions that draw with it import it.
"""

import io
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

COLOURS = ("#8b95a1", "#1f6feb", "#d1495b", "#2a9d8f", "#b8860b", "#7b4fa3")
TRUE_COLOUR = "#dfe4ea"
_TOO_LARGE = 25  # an answer's box more times the true one would leave too little of the true one to see
_DEPTH = 0.4  # the middle side runs back at an angle, foreshortened
_WIDTH = 400  # of matplotlib's pictures: narrow, so that their text can be read on a phone
_STYLE = {
    "axes.edgecolor": "#8b95a1", "axes.grid": True, "axes.labelcolor": "#5b6570", "axes.spines.right": False,
    "axes.spines.top": False, "axes.axisbelow": True, "axes.titlesize": "medium", "figure.labelsize": "medium",
    "font.family": ["DejaVu Sans", "Last Resort High-Efficiency"],  # measures every sign; the page's font shows it
    "font.size": 12, "grid.color": "#e4e7eb", "legend.frameon": False, "lines.linewidth": 1.2,
    "svg.fonttype": "none", "text.color": "#5b6570", "text.parse_math": False, "xtick.color": "#5b6570",
    "ytick.color": "#5b6570",
}


def curve_svg(series: Mapping[str, Sequence[tuple[int, float]]], title: str) -> str:
    """Draw rewards over steps. series: name -> (step, value), in order of steps."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        _lines(axes, series.values())
        low, high = axes.get_ylim()
        axes.set(title=title, xlabel="step", ylabel="mean reward, or share", xlim=(0, None),
                 ylim=(min(low, 0), max(high, 1)))
        axes.locator_params(axis="x", integer=True)
        _legend(figure, axes.get_lines(), list(series))

    return _svg("curve", title, 230 + _height(series), draw)


def histogram_svg(counts: Mapping[str, Sequence[int]]) -> str:
    """Draw how answers spread over rewards from 0 to 1, as shares: one row of bars a model, all to one scale."""

    def draw(figure: Any) -> None:
        rows = figure.subplots(len(counts), sharex=True, sharey=True, squeeze=False)[:, 0]
        for index, (axes, (name, bins)) in enumerate(zip(rows, counts.items(), strict=True)):
            axes.bar([place / len(bins) for place in range(len(bins))], [count / max(sum(bins), 1) for count in bins],
                     1 / len(bins), align="edge", color=_colour(index), edgecolor="white")
            axes.set_title(_wrapped(name), color=_colour(index), loc="left")
            axes.set(xlim=(0, 1))
            axes.yaxis.set_major_formatter("{x:.0%}")
            axes.locator_params(axis="y", nbins=3)
        rows[-1].set_xlabel("reward of an answer")
        figure.supylabel("share of answers")

    return _svg("rewards", "how answers spread over rewards", 40 + 60 * len(counts) + _height(counts), draw)


def risk_svg(curves: Mapping[str, Sequence[Sequence[float]]], promise: float) -> str:
    """Draw the share of wrong products (up) over the share accepted (right). curves: (threshold, coverage, risk)."""
    names = [*curves, f"promised: at most {promise:.0%} wrong"]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        _lines(axes, ([(coverage, risk) for _, coverage, risk in curve] for curve in curves.values()))
        axes.axhline(promise, color="#1c2530", linestyle="--")
        axes.set(xlabel="products accepted, the surest first", ylabel="wrong among them", xlim=(0, 1),
                 ylim=(0, max(axes.get_ylim()[1], 1.5 * promise)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:.0%}")
        _legend(figure, axes.get_lines(), names)

    return _svg("risk", "wrong answers among the products accepted", 210 + _height(names), draw)


def interval_svg(change: float, low: float, high: float, reach: float) -> str:
    """Draw a change and its interval on a line from -reach to reach."""

    def at(value: float) -> float:
        return 80 + 76 * max(-1.0, min(1.0, value / (reach or 1)))

    colour = "#2a9d8f" if low > 0 else "#d1495b" if high < 0 else "#8b95a1"
    return (f'<svg viewBox="0 0 160 16" class="interval" role="img"><path d="M4 8H156" stroke="#e4e7eb"/>'
            f'<path d="M80 1V15" stroke="#8b95a1"/><path d="M{at(low):.1f} 8H{at(high):.1f}" stroke="{colour}" '
            f'stroke-width="4"/><circle cx="{at(change):.1f}" cy="8" r="4.5" fill="{colour}"/></svg>')


def boxes_svg(label: Sequence[float], answers: Mapping[str, Sequence[float]]) -> str:
    """Draw the true size as a grey box and each answer's as an outline over it, all to one scale.

    The largest side runs right, the middle one back, the smallest up; a missing side is flat.
    """
    if not label:
        return ""
    drawn = {name: _three(sizes) for name, sizes in answers.items() if sizes and not times_too_large(label, sizes)}
    true = _three(label)
    reach = max(max(right + _DEPTH * back, 1.6 * (up + _DEPTH * back))
                for right, back, up in [true, *drawn.values()])
    scale = 208 / reach
    foot = 8 + scale * max(up + _DEPTH * back for _, back, up in [true, *drawn.values()])
    parts = [f'<svg viewBox="0 0 224 {foot + 8:.0f}" class="boxes" role="img">',
             _box(true, scale, foot, TRUE_COLOUR, "#5b6570", "")]
    for index, name in enumerate(answers):
        if name in drawn:
            parts.append(_box(drawn[name], scale, foot, "none", _colour(index), "4 3" if index == 0 else ""))
    return "".join([*parts, "</svg>"])


def times_too_large(label: Sequence[float], sizes: Sequence[float]) -> float:
    """Say how many times the true size an answer is that boxes_svg leaves out; 0 where it is drawn."""
    times = max(sizes) / max(label) if label and sizes else 0
    return times if times > _TOO_LARGE else 0


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _three(sizes: Sequence[float]) -> tuple[float, float, float]:
    right, back, up = [*sorted(sizes, reverse=True), 0.0, 0.0][:3]
    return right, back, up


def _box(sides: tuple[float, float, float], scale: float, foot: float, fill: str, stroke: str, dashes: str) -> str:
    right, back, up = (side * scale for side in sides)
    left, slant = 8.0, back * _DEPTH
    path = (f"M{left:.1f} {foot:.1f}h{right:.1f}v{-up:.1f}h{-right:.1f}z"
            f"M{left:.1f} {foot - up:.1f}l{slant:.1f} {-slant:.1f}h{right:.1f}l{-slant:.1f} {slant:.1f}z"
            f"M{left + right:.1f} {foot:.1f}l{slant:.1f} {-slant:.1f}v{-up:.1f}l{-slant:.1f} {slant:.1f}z")
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path d="{path}" fill="{fill}" stroke="{stroke}" stroke-width="1.6" stroke-linejoin="round"{dashed}/>'


def _svg(name: str, title: str, height: float, draw: Callable[[Any], None]) -> str:
    """Make an element of a page of what matplotlib draws; the name keeps its ids apart from other pictures'."""
    import matplotlib.style
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.style.context(["default", _STYLE | {"svg.hashsalt": name}]):
        figure = Figure((_WIDTH / 72, height / 72), layout="constrained")
        draw(figure)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = re.sub(r"<style.*?</style>", "", svg[svg.index("<svg"):])  # would reach every element of the page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every picture; nothing refers to them
    svg = re.sub(r'(<text style="[^"]*?); font-family: [^;"]*', r"\1", svg)  # the page's font
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}" font-family="sans-serif" '
                               'style="stroke-linejoin: round; stroke-linecap: butt"', 1)


def _lines(axes: Any, series: Iterable[Sequence[tuple[float, float]]]) -> None:
    axes.margins(0)
    for index, points in enumerate(series):
        axes.plot([point[0] for point in points], [point[1] for point in points], color=_colour(index), clip_on=False,
                  marker="o" if len(points) == 1 else "")


def _legend(figure: Any, lines: Sequence[Any], names: Sequence[str]) -> None:
    legend = figure.legend(lines, [str(index) for index in range(len(names))], loc="outside upper left",
                           labelcolor="linecolor")
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(_wrapped(name))  # not above, where a name that begins with _ is left out


def _height(names: Iterable[str]) -> float:
    return sum(20 + 14 * _wrapped(name).count("\n") for name in names)


def _wrapped(name: str) -> str:
    """Break a long name into lines; what can't be printed, and XML can't hold, becomes a ?."""
    return "\n".join(textwrap.wrap("".join(sign if sign.isprintable() else "?" for sign in name), 28))
