"""An adapter's folder on disk, headers only: what can be known without a base and before any work."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors

from lora_export.adapters.header import HeaderOptions
from lora_export.base.stored import refuse_pickles
from lora_export.errors import InputRefused, some_of
from lora_export.reading import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")
_TOKENS = ("alora_invocation_tokens",)
_TYPES = {
    "peft_type": ((str,), "a name"),
    "task_type": ((str,), "a name, or null"),
    "base_model_name_or_path": ((str,), "a folder or a hub id, or null"),
    "revision": ((str,), "a name, or null"),
    "r": ((int,), "a whole number"),
    "lora_alpha": ((int, float), "a number"),
    "rank_pattern": ((dict,), "an object of ranks by pattern"),
    "alpha_pattern": ((dict,), "an object of alphas by pattern"),
    "modules_to_save": ((list,), "a list of names, or null"),
    "target_modules": ((str, list), "a pattern, or a list of names"),
    "exclude_modules": ((str, list), "a pattern, or a list of names"),
    "alora_invocation_tokens": ((list,), "a list of token ids, or null"),
    "init_lora_weights": ((bool, str), "true, false, or a name"),
}
# What some tuners keep beside their floats: which elements or rows they are for.
_INDICES = ("I64", "I32", "BOOL")

_BASE_FIRST = "this is a base: name the base first, then the adapters: BASE ADAPTER…"


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk, headers only: what can be known without a base.

    Attributes:
        config: `adapter_config.json`.
        shapes: Shape of every tensor in the file, by PEFT key.
    """

    name: str
    path: Path
    given: str
    config: dict
    shapes: dict[str, tuple[int, ...]]

    @property
    def base(self) -> str | None:
        return self.config.get("base_model_name_or_path") or None

    @property
    def labels(self) -> dict[int, str] | None:
        """`id2label` of a `config.json` beside the adapter, if its trainer saved one."""
        try:
            raw = json.loads((self.path / "config.json").read_text(encoding="utf-8")).get("id2label")
            return {int(key): str(value) for key, value in raw.items()} if isinstance(raw, dict) else None
        except (FileNotFoundError, ValueError, AttributeError, RecursionError):
            return None


def usable_name(path: Path) -> str:
    """The name of an adapter's folder or file, with '-' for what may not stand in one; `adapter` if nothing is left."""
    stem = path.stem if path.is_file() else path.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "adapter"


def open_adapter(path: Path, given: str, name: str | None = None) -> AdapterFolder:
    """Read the headers of the adapter in folder `path`.

    Raises:
        InputRefused: No config, only pickled weights, truncated, quantized or foreign files, a header that contradicts
            the config, or a name unusable as a file name.
    """
    name = name or path.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputRefused(
            "An adapter's name becomes a file name",
            where=str(path),
            expected="letters, digits, '.', '_' and '-'",
            found=repr(name),
            next_step="give a name with --name",
        )
    if not (path / CONFIG).is_file():
        raise InputRefused(
            "The folder holds no PEFT adapter",
            where=str(path),
            expected="adapter_config.json and adapter_model.safetensors",
            found=some_of(sorted(p.name for p in path.iterdir()), 8) or "an empty folder",
            next_step=_BASE_FIRST if (path / "config.json").is_file() else None,
        )
    config = read_json(path / CONFIG)
    _require_types(config, path / CONFIG)
    shapes, metadata = _read_header(path)
    HeaderOptions.of(path / WEIGHTS, metadata).require_agreement(config)
    return AdapterFolder(name, path, given, config, shapes)


def _require_types(config: Mapping[str, object], file: Path) -> None:
    """Refuse options of another type than `LoraConfig` says, which PEFT does not look at when it reads them.

    Only those whose value decides something before PEFT has loaded the adapter.
    """
    for name, (types, expected) in _TYPES.items():
        value = config.get(name)
        fits = value is None or (isinstance(value, types) and (bool in types or not isinstance(value, bool)))
        if fits and name in _TOKENS and value is not None:
            fits = all(isinstance(token, int) and 0 <= token < 2**31 for token in value)
        if not fits:
            raise InputRefused(
                "An option of the adapter is not what it should be",
                where=f"{file}: {name}",
                expected=expected,
                found=repr(value)[:200],
                next_step="fetch or save the adapter again",
            )


def _read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by key, and the header's free text."""
    file = path / WEIGHTS
    if not file.exists():
        refuse_pickles(path, "adapter")
        raise InputRefused("The adapter has no weights", where=str(path), expected=WEIGHTS)
    try:
        with safetensors.safe_open(file, framework="pt") as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 not a dict
            require_floats({key: part.get_dtype() for key, part in slices.items()}, file)
            return {key: tuple(part.get_shape()) for key, part in slices.items()}, handle.metadata() or {}
    except safetensors.SafetensorError as error:
        raise InputRefused(
            "The file is truncated or not safetensors",
            where=str(file),
            found=str(error),
            next_step="fetch or save the adapter again",
        ) from error


def require_floats(dtypes: Mapping[str, str], file: Path) -> None:
    """Refuse an adapter's file whose numbers mean nothing without a scale beside them.

    Args:
        dtypes: By key, in safetensors' spelling.

    Raises:
        InputRefused: A tensor is neither a float of at least 16 bits nor an index.
    """
    wrong = [key for key, dtype in dtypes.items() if dtype not in _FLOATS + _INDICES]
    if wrong:
        raise InputRefused(
            "The adapter's numbers are stored in a dtype that is not read",
            where=f"{file}: {some_of(wrong, 3)}",
            expected="float32, float16 or bfloat16",
            found=", ".join(sorted({dtypes[key] for key in wrong})),
            next_step="save the adapter again in one of these, as it was before it was quantized",
        )
