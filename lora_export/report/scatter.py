"""Points on two logarithmic axes as an inline SVG; each has its name for a pointer."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from lora_export.report.svg import picture

_LEFT, _RIGHT, _TOP, _HEIGHT, _AXIS_HEIGHT = 9.0, 98.0, 10, 300, 52
_MOST_TICKS = 8


@dataclass(frozen=True)
class Point:
    """A point (x, y), both positive; `style` is a class of the page's style sheet."""

    name: str
    x: float
    y: float
    style: str


def scatter_plot(key: str, title: str, description: str, *, points: Sequence[Point], x_title: str, y_title: str) -> str:
    """The SVG; empty without a point. `key` must be unique within the page."""
    if not points:
        return ""
    across = _scale([point.x for point in points])
    down = _scale([point.y for point in points])
    root = picture(key, title, description, height=_TOP + _HEIGHT + _AXIS_HEIGHT, style="plot framed")

    def x_of(value: float) -> str:
        return f"{_LEFT + (_RIGHT - _LEFT) * _share(value, across):.2f}%"

    def y_of(value: float) -> str:
        return f"{_TOP + _HEIGHT * (1 - _share(value, down)):.1f}"

    bottom = str(_TOP + _HEIGHT)
    for tick in _ticks(across):
        ET.SubElement(
            root, "line", {"class": "grid", "x1": x_of(tick), "x2": x_of(tick), "y1": str(_TOP), "y2": bottom}
        )
        label = {"class": "tick middle", "x": x_of(tick), "y": str(_TOP + _HEIGHT + 18)}
        ET.SubElement(root, "text", label).text = f"{tick:.0e}"
    for tick in _ticks(down):
        line = {"class": "grid", "x1": f"{_LEFT}%", "x2": f"{_RIGHT}%", "y1": y_of(tick), "y2": y_of(tick)}
        ET.SubElement(root, "line", line)
        label = {"class": "tick end", "x": f"{_LEFT - 0.8}%", "y": str(float(y_of(tick)) + 4)}
        ET.SubElement(root, "text", label).text = f"{tick:.0e}"
    for point in points:
        circle = ET.SubElement(
            root, "circle", {"class": point.style, "cx": x_of(point.x), "cy": y_of(point.y), "r": "4"}
        )
        ET.SubElement(circle, "title").text = f"{point.name}: {x_title} {point.x:.2g}, {y_title} {point.y:.2g}"
    axis = {"class": "axis middle", "x": "50%", "y": str(_TOP + _HEIGHT + _AXIS_HEIGHT - 10)}
    ET.SubElement(root, "text", axis).text = f"{x_title} (across), {y_title} (up)"
    return ET.tostring(root, encoding="unicode")


def _scale(values: Sequence[float]) -> tuple[int, int]:
    """The powers of ten around `values`."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def _share(value: float, scale: tuple[int, int]) -> float:
    return (math.log10(value) - scale[0]) / (scale[1] - scale[0])


def _ticks(scale: tuple[int, int]) -> list[float]:
    step = max(1, math.ceil((scale[1] - scale[0]) / _MOST_TICKS))
    return [10.0**power for power in range(scale[0], scale[1] + 1, step)]
