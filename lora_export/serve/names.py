"""The `model` field of a request: the base, an adapter, or a blend of adapters such as `legal:0.7+medical:0.3`."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence

from lora_export.errors import nearest
from lora_export.serve.problems import Problem

# A blend costs the sum of its adapters' ranks.
MOST_OF_A_BLEND = 8
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def parse_model(model: str, base: str, adapters: Sequence[str]) -> Mapping[str, float]:
    """Weights by adapter name; none for the base.

    1. The base's name.
    2. An adapter's name, all of it.
    3. A blend: `name[:weight]`, joined by `+`. Without a weight, 1.

    Raises:
        Problem: 404 for a name that is not served, 400 for a blend that is none.
    """
    if model == base:
        return {}
    if model in adapters:
        return {model: 1.0}
    if ":" not in model and "+" not in model:
        raise unknown_model(model, base, adapters)
    parts = [_part(part, model) for part in model.split("+")]
    blend = dict(parts)
    for name in blend:
        if name not in adapters:
            raise unknown_model(name, base, adapters)
    if len(blend) < len(parts):
        raise _no_blend(model, "an adapter is in it twice")
    if len(parts) > MOST_OF_A_BLEND:
        raise _no_blend(model, f"it has {len(parts)} adapters; at most {MOST_OF_A_BLEND} are blended")
    return blend


def adapters_in(model: str, adapters: Collection[str]) -> list[str]:
    """The adapters that a request's `model` runs, of those that are served."""
    names = [model] if model in adapters else [part.rpartition(":")[0] or part for part in model.split("+")]
    return [name for name in names if name in adapters]


def _part(part: str, model: str) -> tuple[str, float]:
    name, separator, weight = part.rpartition(":")
    try:
        number = float(weight) if separator else 1.0
    except ValueError:
        raise _no_blend(model, f"{weight[:40]!r} is no weight") from None
    if not math.isfinite(number) or number == 0:
        raise _no_blend(model, f"the weight {number} is not a finite number other than 0")
    return (name if separator else part), number


def _no_blend(model: str, why: str) -> Problem:
    return Problem(400, f"{model[:200]!r} is no blend such as 'a:0.7+b:0.3': {why}", param="model", code="bad_blend")


def unknown_model(name: str, base: str, adapters: Sequence[str]) -> Problem:
    """The refusal of a name that is not served; it names what may have been meant."""
    hint = nearest(name, [base, *adapters])
    said = f"The model {name[:200]!r} is not served" + (f"; {hint}" if hint else "; GET /v1/models lists what is")
    return Problem(404, said, param="model", code="model_not_found")


def require_free_name(name: str, base: str) -> None:
    """Refuse a name for a new adapter that the `model` field could not say.

    Raises:
        Problem: 400.
    """
    if not _SAFE.fullmatch(name):
        raise Problem(
            400, "The name must be 1 to 100 letters, digits, dots, dashes or underscores, a letter or digit first",
            param="lora_name", code="bad_name",
        )  # fmt: skip
    if name == base:
        raise Problem(400, f"{name!r} is the base's name", param="lora_name", code="bad_name")
