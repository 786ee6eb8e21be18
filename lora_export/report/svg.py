"""Axes, rows and marks of the inline plots.

Horizontal positions are percentages and vertical ones pixels, so that a plot fills any width while its text and marks
keep their size, on a phone as on paper.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from dataclasses import dataclass

from lora_export.report import format as fmt

_LEFT, _RIGHT = 2.0, 98.0
_ROW_HEIGHT, _LABEL_DOWN, _MARK_DOWN = 52, 18, 34
_HEADING_HEIGHT, _HEADING_DOWN = 30, 22
_AXIS_HEIGHT = 52
_SHORT_LABEL, _LONG_LABEL = 28, 72
_MOST_TICKS = 6


@dataclass(frozen=True)
class Axis:
    """A horizontal axis from `low` to `high`; logarithmic ones need positive bounds."""

    low: float
    high: float
    log: bool = False

    def percent(self, value: float) -> float:
        """Position of a value; those outside stand at the border."""
        low, high, value = (_log(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return round(_LEFT + (_RIGHT - _LEFT) * min(max(share, 0.0), 1.0), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """Round values and their text; on a logarithmic axis every decade, some of them without text."""
        return self._decades() if self.log else self._round_steps()

    def _decades(self) -> list[tuple[float, str]]:
        first, last = math.ceil(_log(self.low) - 1e-9), math.floor(_log(self.high) + 1e-9)
        step = math.ceil((last - first + 1) / _MOST_TICKS)
        return [(10.0**n, "" if (n - first) % step else f"1e{n:+03d}") for n in range(first, last + 1)]

    def _round_steps(self) -> list[tuple[float, str]]:
        rough = (self.high - self.low) / (_MOST_TICKS - 1) or 1.0
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
        digits = max(0, next(d for d in range(12) if abs(round(step, d) - step) < step * 1e-6))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [(n * step, f"{n * step:.{digits}f}") for n in range(first, last + 1)]


def _log(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf


def picture(key: str, title: str, description: str, *, height: int, style: str) -> ET.Element:
    """An SVG image of the page's width, without content, that readers of a screen have in words."""
    attributes = {"class": style, "role": "img", "aria-labelledby": f"{key}-title", "aria-describedby": f"{key}-desc"}
    root = ET.Element("svg", attributes | {"height": str(height)})
    ET.SubElement(root, "title", {"id": f"{key}-title"}).text = title
    ET.SubElement(root, "desc", {"id": f"{key}-desc"}).text = description
    return root


class Plot:
    """An SVG image of labelled rows, one below the other, over one axis; `key` must be unique within the page.

    Args:
        axis_detail: Goes on with the axis' title where there is width for it.
    """

    def __init__(
        self, key: str, title: str, description: str, *, axis: Axis, axis_title: str, axis_detail: str = ""
    ) -> None:
        self.axis = axis
        self._key, self._title, self._description = key, title, description
        self._axis_title, self._axis_detail = axis_title, axis_detail
        self._references: list[tuple[float, str]] = []
        self._body: list[ET.Element] = []
        self._height = 0

    def heading(self, text: str) -> None:
        """A line above the rows of a group."""
        self._text(fmt.plain(text), f"{_LEFT}%", self._height + _HEADING_DOWN, style="heading")
        self._height += _HEADING_HEIGHT

    def row(self, label: str, result: str, detail: str = "", *, style: str = "") -> float:
        """Begin a row; returns the y of its marks. `detail` shows only where there is width for it."""
        top = self._height
        self._height += _ROW_HEIGHT
        label = fmt.plain(label)
        shown = self._text(label[:_SHORT_LABEL], f"{_LEFT}%", top + _LABEL_DOWN, style=f"label {style}".strip())
        if len(label) > _SHORT_LABEL:
            more = label[_SHORT_LABEL:_LONG_LABEL] + ("…" if len(label) > _LONG_LABEL else "")
            ET.SubElement(shown, "tspan", {"class": "wide"}).text = more
            ET.SubElement(shown, "tspan", {"class": "narrow"}).text = "…"
        right = self._text(None, f"{_RIGHT}%", top + _LABEL_DOWN, style=f"result end {style}".strip())
        if detail:
            ET.SubElement(right, "tspan", {"class": "detail wide"}).text = f"{fmt.plain(detail)} "
        ET.SubElement(right, "tspan").text = fmt.plain(result)
        y = top + _MARK_DOWN
        self._line((_LEFT, _RIGHT), (y, y), "rail")
        return y

    def span(self, low: float, high: float, y: float, *, style: str) -> None:
        """A horizontal line between two values."""
        self._line((self.axis.percent(low), self.axis.percent(high)), (y, y), style)

    def bar(self, value: float, y: float, height: float, *, style: str) -> None:
        """A vertical stroke at a value."""
        x = self.axis.percent(value)
        self._line((x, x), (y - height / 2, y + height / 2), style)

    def band(self, low: float, high: float, y: float, *, height: float, style: str) -> None:
        """A filled box between two values."""
        left, right = self.axis.percent(low), self.axis.percent(high)
        place = {"x": f"{left}%", "y": str(y - height / 2), "width": f"{round(right - left, 2)}%"}
        self._body.append(ET.Element("rect", place | {"height": str(height), "class": style}))

    def dot(self, value: float, y: float, radius: float, *, style: str) -> None:
        place = {"cx": f"{self.axis.percent(value)}%", "cy": str(round(y, 1)), "r": str(radius)}
        self._body.append(ET.Element("circle", place | {"class": style}))

    def diamond(self, value: float, y: float, style: str) -> None:
        # A path knows no percentages; a nested image brings its origin there.
        place = ET.Element("svg", {"x": f"{self.axis.percent(value)}%", "y": str(y), "class": "place"})
        ET.SubElement(place, "path", {"class": style, "d": "M0-6.5 6.5 0 0 6.5-6.5 0Z"})
        self._body.append(place)

    def note(self, text: str, y: float) -> None:
        """Words on a row in place of marks."""
        self._text(fmt.plain(text), f"{_LEFT}%", y + 5, style="note")

    def reference(self, value: float, style: str) -> None:
        """A vertical line through all rows."""
        self._references.append((self.axis.percent(value), style))

    def markup(self) -> str:
        height = self._height
        root = picture(self._key, self._title, self._description, height=height + _AXIS_HEIGHT, style="plot")
        # The grid lies below the marks, but its height is known only after them.
        marks, self._body = self._body, []
        ticks = [(self.axis.percent(value), text) for value, text in self.axis.ticks()]
        for percent, style in [*((percent, "grid") for percent, _ in ticks), *self._references]:
            self._line((percent, percent), (4, height + 4), style)
        for percent, text in filter(lambda tick: tick[1], ticks):
            anchor = "start" if percent < 6 else "end" if percent > 94 else "middle"
            self._text(text, f"{percent}%", height + 20, style=f"tick {anchor}")
        below = self._text(self._axis_title, "50%", height + _AXIS_HEIGHT - 8, style="axis middle")
        if self._axis_detail:
            ET.SubElement(below, "tspan", {"class": "wide"}).text = f" {self._axis_detail}"
        root.extend([*self._body, *marks])
        self._body = marks
        return ET.tostring(root, encoding="unicode")

    def _line(self, x: tuple[float, float], y: tuple[float, float], style: str) -> None:
        ends = {"x1": f"{x[0]}%", "x2": f"{x[1]}%", "y1": str(y[0]), "y2": str(y[1])}
        self._body.append(ET.Element("line", ends | {"class": style}))

    def _text(self, content: str | None, x: str, y: float, *, style: str) -> ET.Element:
        element = ET.Element("text", {"x": x, "y": str(y), "class": style})
        element.text = content
        self._body.append(element)
        return element
