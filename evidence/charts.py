"""Pictures as inline SVG: curves, distributions, intervals, and products' sizes drawn to scale. Strings only."""

from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#8b95a1", "#1f6feb", "#d1495b", "#2a9d8f", "#b8860b", "#7b4fa3")
TRUE_COLOUR = "#dfe4ea"
_TOO_LARGE = 2.5  # an answer's box this many times the true one's largest side is not drawn
_DEPTH = 0.4  # the middle side runs back at an angle, foreshortened


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
        colour = COLOURS[index % len(COLOURS)]
        line = " ".join(at(step, value) for step, value in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<rect x="{left + 190 * index}" y="336" width="14" height="4" fill="{colour}"/>'
                     f'<text x="{left + 190 * index + 20}" y="342">{escape(name)}</text>')
    parts.append(f'<text x="{left}" y="328">0</text>'
                 f'<text x="{right}" y="328" text-anchor="end">step {last_step}</text>')
    return "\n".join([*parts, "</svg>", ""])


def histogram_svg(counts: Mapping[str, Sequence[int]]) -> str:
    """Draw how answers spread over rewards from 0 to 1, as shares: one row of bars a model, all to one scale."""
    shares = {name: [count / max(sum(bins), 1) for count in bins] for name, bins in counts.items()}
    highest = max(max(bins) for bins in shares.values()) or 1
    row, left, width = 96, 8, 616
    parts = [f'<svg viewBox="0 0 640 {row * len(shares) + 24}" role="img" font-size="12">']
    for index, (name, bins) in enumerate(shares.items()):
        foot, step, colour = row * (index + 1) - 8, width / len(bins), _colour(index)
        parts.append(f'<text x="{left}" y="{foot - 70}" fill="{colour}" font-weight="600">{escape(name)}</text>'
                     f'<path d="M{left} {foot}H{left + width}" stroke="#c5ccd3"/>')
        for place, height in enumerate(62 * share / highest for share in bins):
            parts.append(f'<rect x="{left + step * place + 1:.1f}" y="{foot - height:.1f}" width="{step - 2:.1f}" '
                         f'height="{height:.1f}" fill="{colour}"/>')
    foot = row * len(shares) + 8
    parts += [f'<text x="{left + width * tenth / 10:.0f}" y="{foot}" fill="#5b6570" text-anchor="'
              f'{"start" if tenth == 0 else "end" if tenth == 10 else "middle"}">{tenth / 10:.1f}</text>'
              for tenth in range(0, 11, 2)]
    return "".join([*parts, "</svg>"])


def risk_svg(curves: Mapping[str, Sequence[Sequence[float]]], promise: float) -> str:
    """Draw the share of wrong products (up) over the share accepted (right). curves: (threshold, coverage, risk)."""
    highest = max([promise * 1.5, *(risk for curve in curves.values() for _, _, risk in curve)])
    left, right, top, bottom = 52, 628, 12, 200
    parts = ['<svg viewBox="0 0 640 240" role="img" font-size="12">']
    for share in (0.0, 0.5, 1.0):
        parts.append(f'<path d="M{left} {bottom - (bottom - top) * share}H{right}" stroke="#e4e7eb"/>'
                     f'<text x="{left - 8}" y="{bottom - (bottom - top) * share + 4}" text-anchor="end" fill="#5b6570">'
                     f'{highest * share:.0%}</text>'
                     f'<text x="{left + (right - left) * share}" y="{bottom + 18}" fill="#5b6570" text-anchor="'
                     f'{"start" if share == 0 else "end" if share == 1 else "middle"}">{share:.0%}</text>')
    level = bottom - (bottom - top) * promise / highest
    parts.append(f'<path d="M{left} {level:.1f}H{right}" stroke="#d1495b" stroke-dasharray="5 4"/>')
    for index, (name, curve) in enumerate(curves.items()):
        points = " ".join(f"{left + (right - left) * coverage:.1f},{bottom - (bottom - top) * risk / highest:.1f}"
                          for _, coverage, risk in curve)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{_colour(index)}" stroke-width="2"/>'
                     f'<text x="{left + 8 + 150 * index}" y="236" fill="{_colour(index)}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


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
    limit = _TOO_LARGE * max(label)
    drawn = {name: _three(sizes) for name, sizes in answers.items() if sizes and max(sizes) <= limit}
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


def too_large(label: Sequence[float], sizes: Sequence[float]) -> bool:
    """Tell whether boxes_svg leaves an answer out."""
    return bool(label and sizes) and max(sizes) > _TOO_LARGE * max(label)


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
