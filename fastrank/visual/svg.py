"""Curves and histograms as inline SVG, in the colours of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 420, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 34


def line_chart(
    title: str,
    series: Sequence[tuple[str, str, Points]],
    *,
    limits: tuple[float, float] | None = None,
) -> str:
    """One chart over training steps.

    Args:
        title: above it.
        series: label, colour class and points of each line; points are dots where there are few,
            and two points make no line.
        limits: of the vertical axis; by default those of the points.
    """
    known = [(label, colour, list(points)) for label, colour, points in series if points]
    values = [y for _, _, points in known for _, y in points]
    steps = [x for _, _, points in known for x, _ in points]
    if not values:
        return ""
    low, high = limits or _padded(min(values), max(values))
    last = max(max(steps), 1)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (_WIDTH - _LEFT - _RIGHT) * x / last,
            _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - y) / (high - low),
        )

    parts = _axes(low, high, place)
    for x in _ticks(0, last, 5):
        at, _ = place(x, low)
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - 18}" class="mid">{_number(x)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 3}" class="mid">step</text>')
    for label, colour, points in known:
        places = [place(*point) for point in points]
        if len(points) > 2:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="line {colour}" points="{path}"/>')
        radius = 3.5 if len(points) <= 12 else 1.5
        for (x, y), (step, value) in zip(places, points, strict=True):
            said = f"{label}, step {_number(step)}: {value:.4g}"
            parts.append(
                f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
                f"<title>{escape(said)}</title></circle>"
            )
    return _figure(title, parts, [(label, colour) for label, colour, _ in known])


def histogram(
    title: str, edges: Sequence[float], counts: Sequence[tuple[str, str, list[int]]]
) -> str:
    """Shares of values between ``edges``, of several sets (label, colour class, counts) beside each
    other."""
    shares = [
        (label, colour, [n / max(sum(own), 1) for n in own]) for label, colour, own in counts if own
    ]
    high = max((share for _, _, own in shares for share in own), default=0.0)
    if not high:
        return ""
    bins = len(edges) - 1
    step = (_WIDTH - _LEFT - _RIGHT) / bins

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + step * x, _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - y / high)

    parts = _axes(0.0, high, place, percent=True)
    width = step * 0.9 / len(shares)
    for number, (label, colour, own) in enumerate(shares):
        for i, share in enumerate(own):
            x, y = place(i, share)
            _, floor = place(i, 0.0)
            said = f"{label}: {share:.1%} from {edges[i]:.4g} to {edges[i + 1]:.4g}"
            parts.append(
                f'<rect class="bar {colour}" x="{x + number * width:.1f}" y="{y:.1f}" '
                f'width="{width:.1f}" height="{floor - y:.1f}"><title>{escape(said)}</title></rect>'
            )
    for i in {0, bins // 2, bins}:
        x, _ = place(i, 0.0)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 18}" class="mid">{edges[i]:.3g}</text>')
    return _figure(title, parts, [(label, colour) for label, colour, _ in shares])


def _figure(title: str, parts: list[str], legend: Sequence[tuple[str, str]]) -> str:
    keys = " ".join(
        f'<span class="key"><i class="{colour}"></i>{escape(label)}</span>'
        for label, colour in legend
        if label
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg><div>{keys}</div></figure>"
    )


def _axes(low: float, high: float, place: object, percent: bool = False) -> list[str]:
    parts = []
    for y in _ticks(low, high, 5):
        _, at = place(0, y)  # type: ignore[operator]
        text = f"{y:.0%}" if percent else _number(y)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" class="end">{text}</text>'
        )
    return parts


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = (high - low) * 0.05 or abs(low) * 0.1 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between the ends: about ``count``."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:.6g}" if abs(value) < 1e6 else f"{value:.2e}"
