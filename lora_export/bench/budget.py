"""What an export may cost: allowances for latency ratios, swaps and memory, read from a TOML file.

    [ratio]                  # latency ÷ the base's, by variant
    dynamic = 1.10
    against = 1.02           # the export's latency ÷ that of the export named by --against
    [ratio."16x64"]          # of one shape: goes before the lines above
    "mixed rows" = 1.15
    [swap_us]                # changing the adapter, microseconds
    bound = 500
    [difference]             # the other's outputs on the same inputs: largest difference ÷ largest value
    against = 1e-3
    [memory_mb]              # peak of one session, 10⁶ bytes: in the process, and with [device_memory_mb] on the GPU
    dynamic = 400

Medians and peaks are all that can be limited. A quantile far above the median says nothing below a thousand samples,
and there are fewer.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.bench.shapes import Shape, parse_shape
from lora_export.errors import InputRefused
from lora_export.named import no_such

AGAINST = "against"
CHANGING = "changing rows"
SWAPS = ("bound", "loaded")
_SECTIONS = ("ratio", "difference", "swap_us", "memory_mb", "device_memory_mb")


@dataclass(frozen=True)
class Budget:
    """Allowances, each None where there is none.

    Attributes:
        where: The file, for messages.
        max_ratio: Of every ratio to the base that nothing below limits.
        ratios: By variant, or `AGAINST`; those of one shape in `shape_ratios`.
        memory_mb: By place ("process", "device") and variant.
        difference: Of the outputs of this export and the other.
    """

    where: str = ""
    max_ratio: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    shape_ratios: Mapping[Shape, Mapping[str, float]] = field(default_factory=dict)
    swap_us: Mapping[str, float] = field(default_factory=dict)
    memory_mb: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    difference: float | None = None

    def ratio(self, shape: Shape, variant: str) -> float | None:
        """The most specific allowance: this shape's, else the variant's, else `max_ratio`, for the base only.

        A mix that changes in every run is the worst that a host can do: `max_ratio` is not meant for it.
        """
        known = {variant: None if variant in (AGAINST, CHANGING) else self.max_ratio}
        return (known | dict(self.ratios) | dict(self.shape_ratios.get(shape, {})))[variant]

    def memory(self, place: str, variant: str) -> float | None:
        return self.memory_mb.get(place, {}).get(variant)


def read_budget(path: Path, max_ratio: float | None = None) -> Budget:
    """The allowances in a file; whether they match anything is for the plan of a bench to say.

    Raises:
        InputRefused: There is no such file, it is no TOML, or it holds a key or value that means nothing.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise no_such("budget", path, expected="a TOML file") from None
    except OSError as error:
        raise InputRefused("The budget cannot be read", where=str(path), found=error.strerror) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputRefused("The budget is no TOML", where=str(path), found=str(error)) from error
    _refuse_unknown(found, _SECTIONS, str(path))
    for name, section in found.items():
        if not isinstance(section, dict):
            raise InputRefused("A part of the budget is no table", where=f"{path}: {name}", expected=f"[{name}]")
    ratio = found.get("ratio", {})
    shapes = {name: table for name, table in ratio.items() if isinstance(table, dict)}
    _refuse_unknown(found.get("swap_us", {}), SWAPS, f"{path}: swap_us")
    _refuse_unknown(found.get("difference", {}), (AGAINST,), f"{path}: difference")
    budget = Budget(
        where=str(path),
        max_ratio=max_ratio,
        ratios=_allowances({name: ratio[name] for name in ratio if name not in shapes}, f"{path}: ratio"),
        shape_ratios={_shape(name, path): _allowances(shapes[name], f'{path}: ratio."{name}"') for name in shapes},
        swap_us=_allowances(found.get("swap_us", {}), f"{path}: swap_us"),
        memory_mb={
            place: _allowances(found.get(name, {}), f"{path}: {name}")
            for place, name in (("process", "memory_mb"), ("device", "device_memory_mb"))
        },
        difference=_allowances(found.get("difference", {}), f"{path}: difference").get(AGAINST),
    )
    limits = (budget.ratios, *budget.shape_ratios.values(), budget.swap_us, *budget.memory_mb.values())
    if not any(limits) and budget.difference is None:
        raise InputRefused("The budget limits nothing", where=str(path), expected=", ".join(_SECTIONS))
    return budget


def _refuse_unknown(table: Mapping[str, object], known: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise InputRefused(
            "The budget has a key that means nothing", where=where, found=unknown[0], expected=", ".join(known)
        )


def _shape(name: str, path: Path) -> Shape:
    try:
        return parse_shape(name)
    except ValueError:
        raise InputRefused(
            "A table of ratios in the budget is named after no shape",
            where=f'{path}: ratio."{name}"',
            expected="BATCHxSEQUENCE or BATCHxSEQUENCE@PAST, such as 4x128",
        ) from None


def _allowances(table: Mapping[str, object], where: str) -> dict[str, float]:
    for name, value in table.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and value > 0):
            raise InputRefused(
                "An allowance in the budget is no positive number", where=f"{where}.{name}", found=repr(value)
            )
    return {name: float(value) for name, value in table.items()}
