"""Curves over a logarithmic axis, against another or against a count, as an inline SVG.

The curves lie in a nested image that stretches with the width, while strokes, text and marks keep their size.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from lora_export.report.svg import picture

_LEFT, _RIGHT, _TOP, _HEIGHT, _AXIS_HEIGHT = 8.0, 98.0, 26, 320, 52
_MOST_DECADES = 8
_MOST_COUNTS = 10


@dataclass(frozen=True)
class Curve:
    """Points (x, y), both positive; `style` is a class of the page's style sheet, `label` is shown by a pointer."""

    label: str
    style: str
    points: Sequence[tuple[float, float]]


def curve_plot(
    key: str,
    title: str,
    description: str,
    *,
    curves: Sequence[Curve],
    x_title: str,
    y_title: str,
    log_x: bool = True,
) -> str:
    """The SVG of `curves`, the last ones on top; empty without a point. `key` must be unique within the page.

    Args:
        log_x: Whether the horizontal axis, from 1 on, is logarithmic, too.
    """
    points = [point for curve in curves for point in curve.points]
    if not points:
        return ""
    right = max(2.0, *(x for x, _ in points))
    low = 10.0 ** math.floor(math.log10(min(y for _, y in points)))
    high = 10.0 ** math.ceil(math.log10(max(max(y for _, y in points), 10 * low)) - 1e-9)
    root = picture(key, title, description, height=_TOP + _HEIGHT + _AXIS_HEIGHT, style="plot framed")

    def across(x: float) -> float:
        return math.log(x) / math.log(right) if log_x else (x - 1) / (right - 1)

    def down(y: float) -> float:
        return (math.log10(high) - math.log10(y)) / (math.log10(high) - math.log10(low))

    ticks = _powers_of_two(right) if log_x else _counts(right)
    _grid(root, ticks, low, high=high, across=across, down=down)
    _text(root, x_title, "50%", y=_TOP + _HEIGHT + 44, style="axis middle")
    _text(root, y_title, f"{_LEFT}%", y=_TOP - 12, style="axis")
    place = {"x": f"{_LEFT}%", "y": str(_TOP), "width": f"{_RIGHT - _LEFT}%", "height": str(_HEIGHT)}
    inner = ET.SubElement(root, "svg", place | {"viewBox": "0 0 1000 1000", "preserveAspectRatio": "none"})
    for curve in curves:
        line = " ".join(f"{1000 * across(x):.0f},{1000 * down(y):.0f}" for x, y in curve.points)
        shape = {"points": line, "class": f"curve {curve.style}", "vector-effect": "non-scaling-stroke"}
        ET.SubElement(ET.SubElement(inner, "polyline", shape), "title").text = curve.label
    return ET.tostring(root, encoding="unicode")


def _powers_of_two(right: float) -> list[int]:
    return [2**power for power in range(math.floor(math.log2(right)) + 1)]


def _counts(right: float) -> list[int]:
    """1 and round numbers, at most `_MOST_COUNTS` of them."""
    powers = (10**power for power in range(12))
    step = next(step for power in powers for step in (power, 2 * power, 5 * power) if right / step <= _MOST_COUNTS)
    return sorted({1, *range(step, math.floor(right) + 1, step)})


def _grid(root: ET.Element, ticks: Sequence[int], low: float, *, high: float, across, down) -> None:
    for tick in ticks:
        x = f"{_LEFT + (_RIGHT - _LEFT) * across(float(tick)):.2f}%"
        _line(root, (x, x), (_TOP, _TOP + _HEIGHT))
        _text(root, str(tick), x, y=_TOP + _HEIGHT + 18, style="tick middle")
    first, last = round(math.log10(low)), round(math.log10(high))
    step = math.ceil((last - first) / _MOST_DECADES)
    for power in range(last, first - 1, -1):
        y = _TOP + _HEIGHT * down(10.0**power)
        _line(root, (f"{_LEFT}%", f"{_RIGHT}%"), (y, y))
        if (last - power) % step == 0:
            _text(root, "1" if power == 0 else f"1e{power:+03d}", f"{_LEFT - 0.8}%", y=y + 4, style="tick end")


def _line(root: ET.Element, x: tuple[str, str], y: tuple[float, float]) -> None:
    ends = {"x1": x[0], "x2": x[1], "y1": f"{y[0]:.1f}", "y2": f"{y[1]:.1f}"}
    ET.SubElement(root, "line", ends | {"class": "grid"})


def _text(root: ET.Element, content: str, x: str, *, y: float, style: str) -> None:
    ET.SubElement(root, "text", {"x": x, "y": f"{y:.1f}", "class": style}).text = content
