"""Numbers and names as text, the same way in every renderer."""

from __future__ import annotations

import math
import unicodedata

MISSING = "–"


def _special(value: float | None) -> str:
    """The text of what is no finite number."""
    if value is None:
        return MISSING
    return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"


def scientific(value: float | None) -> str:
    """1.5e-06, and 0 for exact equality, which people look for."""
    if value is None or not math.isfinite(value):
        return _special(value)
    return "0" if value == 0 else f"{value:.1e}"


def multiple(value: float | None) -> str:
    """How many times as large, over many magnitudes: 1.34×, 100×, 8.1e+05×."""
    if value is None or math.isnan(value):
        return scientific(value)
    return f"{value:.3g}×" if 1 <= value < 1000 else f"{scientific(value)}×"


def factor(value: float | None) -> str:
    """A factor around 1, roughly: 0.97×, 3.1×, 8.1e+05×."""
    if value is None or not math.isfinite(value):
        return _special(value)
    return f"{value:.2f}×" if value < 10 else multiple(value)


def significant(value: float | None) -> str:
    """Seven significant digits: 12.34568."""
    if value is None or not math.isfinite(value):
        return _special(value)
    return f"{value:.7g}"


def ratio(value: float | None) -> str:
    """A ratio near 1: 1.031×."""
    if value is None or not math.isfinite(value):
        return _special(value)
    return f"{value:.3f}×"


def interval(low: float, high: float) -> str:
    return f"{ratio(low)} to {ratio(high)}"


def share(value: float | None) -> str:
    """0.941 as 94.1%; something below 1 never reads 100%, since a gate may lie in between."""
    if value is None or not math.isfinite(value):
        return _special(value)
    for digits in range(1, 6):
        text = f"{100 * value:.{digits}f}%"
        if value >= 1 or float(text[:-1]) < 100:
            return text
    return "<100%"


def used(value: float) -> str:
    """How much of a limit is used: <1%, 31%, 820%, 1.2e+05×."""
    if not math.isfinite(value):
        return _special(value)
    if value < 0.01:
        return "<1%" if value else "0%"
    if value >= 100:
        return multiple(value)
    # What is beyond the limit never reads 100%, nor what is within.
    for digits in range(6):
        text = f"{100 * value:.{digits}f}%"
        if value == 1 or float(text[:-1]) != 100:
            break
    return text


def points(difference: float | None) -> str:
    """A difference of shares in percentage points, with its sign: -43.3."""
    if difference is None or not math.isfinite(difference):
        return _special(difference)
    return f"{100 * difference:+.1f}" if difference else "0.0"


def milliseconds(value: float | None) -> str:
    """Milliseconds: 12.34 ms, three significant digits below 1."""
    if value is None or not math.isfinite(value):
        return _special(value)
    return f"{value:.2f} ms" if value >= 1 or value == 0 else f"{value:#.3g} ms"


def microseconds(value: float | None) -> str:
    """Microseconds: 12.3 µs; from 1000 on as milliseconds."""
    if value is None or not math.isfinite(value):
        return _special(value)
    return f"{value:.1f} µs" if value < 1000 else milliseconds(value / 1000)


def rate(value: float | None) -> str:
    """Rows per second: 1234.5, and without the decimal from 10000 on."""
    if value is None or not math.isfinite(value):
        return _special(value)
    return f"{value:.1f}" if value < 10_000 else f"{value:.0f}"


def megabytes(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return _special(value)
    return f"{value:.1f} MB"


def byte_size(n_bytes: int) -> str:
    """Bytes in decimal units: 512 B, 3.2 kB, 812.4 MB."""
    if n_bytes < 1000:
        return f"{n_bytes} B"
    size, units = n_bytes / 1000, ["kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.1f} {units[0]}"


def duration(seconds: float) -> str:
    """Seconds: 12.3 s; from two minutes on 3 min 12 s."""
    if not math.isfinite(seconds):
        return _special(seconds)
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def counted(n: int, noun: str) -> str:
    """1 comparison, 2 comparisons."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def listed(names: list[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def plain(text: str) -> str:
    """One printable line: names from files may hold line breaks, terminal escapes or undecodable bytes."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(
        " " if char in "\t\n\r\u2028\u2029" else "\ufffd" if unicodedata.category(char) in ("Cc", "Cf") else char
        for char in text
    )


def quantile(values: tuple[float, ...], fraction: float) -> float:
    """The quantile at `fraction` (0 to 1) by linear interpolation; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
