"""Find the modules of a base that an adapter from elsewhere names: exactly one for each name, or a refusal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_export.errors import InputRefused, some_of

# What other tools put before a module's path, to say which model of a pipeline it belongs to.
_COMPONENTS = re.compile(
    r"(lora_(?:te\d?|text_encoder(?:_\d)?|unet|transformer|llm|prior)(?=_)|lora(?=_)"
    r"|text_encoder(?:_\d)?(?=\.)|unet(?=\.)|diffusion_model(?=\.))[_.]"
)

_PEFT_FORM = "PEFT's form, base_model.model.<path>.lora_A.weight"


@dataclass(frozen=True)
class Place:
    """A module of the base that a pair may sit on; `kind` is its class's name."""

    path: str
    kind: str
    in_features: int
    out_features: int

    @property
    def is_embedding(self) -> bool:
        return self.kind == "Embedding"

    @property
    def is_conv1d(self) -> bool:
        return self.kind == "Conv1D"


def resolve_all(
    names: Sequence[str], places: Mapping[str, Place], prefix: str, *, where: str, underscored: bool
) -> dict[str, Place]:
    """The place of every name.

    A name fits a path that is equal to it, perhaps once a component before the name (`lora_te_`) is taken off, and the
    base's own prefix is added or taken off. Where dots were replaced by underscores, the two count as the same.

    Args:
        prefix: The base's own prefix (`model`, `bert`).
        underscored: Whether dots of the path were replaced by underscores.

    Raises:
        InputRefused: The names belong to several models, or one fits no path, or several, or two fit the same.
    """
    _refuse_several_models(names, where)
    paths: dict[str, list[Place]] = {}
    for place in places.values():
        for spelling in {place.path, f"{prefix}.{place.path}", place.path.removeprefix(f"{prefix}.")}:
            paths.setdefault(_flat(spelling) if underscored else spelling, []).append(place)
    found: dict[str, Place] = {}
    unknown = []
    for name in names:
        spellings = _without_component(_flat(name) if underscored else name)
        fitting = {place.path: place for spelling in spellings for place in paths.get(spelling, [])}
        # The path itself comes before one that only fits with the base's prefix added or taken off.
        exact = [place for path, place in fitting.items() if (_flat(path) if underscored else path) in spellings]
        candidates = exact or list(fitting.values())
        if len(candidates) > 1:
            raise InputRefused(
                "A name fits several modules of the base",
                where=f"{where}: {name}",
                found=", ".join(place.path for place in candidates),
                next_step=f"rename it to {_PEFT_FORM}, which says which one is meant",
            )
        if candidates:
            found[name] = candidates[0]
        else:
            unknown.append(name)
    twice = _fitting_twice(found)
    if unknown or twice:
        _refuse_unknown(unknown, names, places, where=where)
        raise InputRefused(
            "Two names of the file fit the same module",
            where=f"{where}: {' and '.join(twice)}",
            found=found[twice[0]].path,
            next_step="keep one of them",
        )
    return found


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _without_component(name: str) -> list[str]:
    """What may be the path in `name`: all of it, or what follows the model that it belongs to."""
    spellings = [name]
    if (match := _COMPONENTS.match(name)) is not None:
        spellings.append(name[match.end() :])
    if name.startswith("lora_"):
        spellings.append(name.removeprefix("lora_"))
    return spellings


def _fitting_twice(found: Mapping[str, Place]) -> tuple[str, str] | None:
    first: dict[str, str] = {}
    for name, place in found.items():
        if place.path in first:
            return first[place.path], name
        first[place.path] = name
    return None


def _refuse_several_models(names: Sequence[str], where: str) -> None:
    counts = Counter(match[1] for name in names if (match := _COMPONENTS.match(name)) is not None)
    del counts["lora"]  # says nothing of a model
    if len(counts) > 1:
        raise InputRefused(
            "The file holds adapters of several models",
            where=where,
            found=", ".join(f"{component} ({n} modules)" for component, n in sorted(counts.items())),
            next_step="split it by the beginning of its keys, and give each part with its own base",
        )


def _refuse_unknown(unknown: list[str], names: Sequence[str], places: Mapping[str, Place], *, where: str) -> None:
    if unknown:
        raise InputRefused(
            f"{len(unknown)} of {len(names)} names fit no Linear, Conv1D or Embedding module of the base",
            where=f"{where}: {some_of(unknown, 4)}",
            expected=f"one of {len(places)} paths, such as {', '.join(list(places)[:3])}",
            next_step="check that the base and the task (--task) are those it was trained on, or rename the keys "
            f"to {_PEFT_FORM}",
        )
