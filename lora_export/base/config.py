"""A base's `config.json`: compared with the checkpoint's headers, then read by Transformers.

A config decides how many modules are built and how large they are, so its numbers are limited by what the checkpoint
holds before Transformers sees them: N tensors are no more than N layers, and no more labels than rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lora_export.base.stored import SafetensorsFiles
from lora_export.errors import InputRefused, refused_if_it_fails

# How configs call their numbers of layers: num_hidden_layers, n_layer, encoder_layers, num_decoder_layers, depth.
_LAYERS = re.compile(r"(?:(?:num|n|encoder|decoder|hidden)_)+layers?|layers|depth")
_WIDTHS = ("vocab_size", "hidden_size", "d_model", "n_embd", "intermediate_size", "d_ff", "ffn_dim", "num_labels")
# What every config may say, however small the checkpoint: a head and its labels may come from the adapter, and a
# vocabulary may be one that the model does not have (BEiT's visual tokens).
_FEW = 4096
_FEW_NAMED = 2**17
_MEND = "mend the field, or fetch the base's config.json again"


def refuse_unsafe_or_unknown(fields: Mapping[str, object], folder: Path) -> None:
    """Refuse a base that Transformers has no code of its own for, and fields of a type that the tool reads itself.

    Args:
        fields: `config.json` of `folder`.

    Raises:
        InputRefused: No such `model_type`, `auto_map` without one, or another file of weights.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    file = folder / "config.json"
    explicit = fields.get("transformers_weights")
    if explicit not in (None, "model.safetensors"):
        raise InputRefused(
            "The base's config names the file of its weights, which is not read yet",
            where=f"{file}: transformers_weights",
            found=repr(explicit),
            next_step="load the base in Transformers, save it again, and export that",
        )
    names = fields.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        _refuse(file, "architectures", "a list of class names", found=names)
    for name in ("auto_map", "id2label", "label2id"):
        if fields.get(name) is not None and not isinstance(fields[name], Mapping):
            _refuse(file, name, "an object", found=fields[name])
    model_type = fields.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING_NAMES:
        return
    if "auto_map" in fields:
        raise InputRefused(
            "The base needs code from its own folder (trust_remote_code), which is never run",
            where=f"{file}: auto_map",
            found=f"model_type {model_type!r}, {fields['auto_map']}",
            next_step="use a checkpoint of an architecture that Transformers carries itself",
        )
    raise InputRefused(
        "Transformers does not know this base's architecture",
        where=f"{file}: model_type",
        found=repr(model_type),
        next_step="check that the folder is a Transformers checkpoint; a newer transformers may know it",
    )


def require_headers(fields: Mapping[str, object], files: SafetensorsFiles, folder: Path) -> None:
    """Compare the numbers of a config, and of those inside it, with the headers of the checkpoint's `files`.

    Raises:
        InputRefused: It has more layers than the checkpoint has tensors, or a width or a vocabulary larger than all of
            its dimensions; the field is named.
    """
    n_tensors = len(files.tensors)
    largest = max((max(info.shape, default=1) for info in files.tensors.values()), default=1)
    n_elements = sum(math.prod(info.shape) for info in files.tensors.values())
    for path, name, value in _numbers(fields):
        inner = "." in path
        if _LAYERS.fullmatch(name):
            _require_at_most(
                value, n_tensors, f"layers, as the checkpoint has {n_tensors} tensors", folder=folder, path=path
            )
        elif name in _WIDTHS:
            # The config of another part of the model may stand here, whose tensors this checkpoint lacks.
            few = _FEW_NAMED if name in ("num_labels", "vocab_size") else _FEW
            most = max(n_elements if inner else largest, few)
            _require_at_most(value, most, "as no dimension of the checkpoint is larger", folder=folder, path=path)


def _numbers(fields: Mapping[str, object], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, str, object]]:
    """(Path, name, value) of the numbers in a config and in the configs inside it."""
    for name, value in fields.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, name, value
        elif isinstance(value, Mapping) and depth < 4:
            yield from _numbers(value, f"{prefix}{name}.", depth + 1)


def _require_at_most(value: float, most: int, why: str, *, folder: Path, path: str) -> None:
    if not 0 <= value <= most:
        raise InputRefused(
            "The base's config does not fit its checkpoint",
            where=f"{folder}/config.json: {path}",
            expected=f"0 to {most}, {why}" if most not in (_FEW, _FEW_NAMED) else f"0 to {most}",
            found=repr(value),
            next_step="fetch the base again; its config.json and its weights are of different models",
        )


def _refuse(file: Path, name: str, expected: str, *, found: object) -> None:
    raise InputRefused(
        "A field of the base's config is not what it should be",
        where=f"{file}: {name}",
        expected=expected,
        found=repr(found)[:200],
        next_step=_MEND,
    )


def read_config(fields: dict, folder: Path, **overrides: object):
    """The `PretrainedConfig` of a base, from its folder alone, never running code that it carries.

    Args:
        fields: Its `config.json`, which has passed the checks above.
        overrides: Fields to set.

    Raises:
        InputRefused: Transformers cannot read it; the field is named.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = CONFIG_MAPPING[fields["model_type"]]
    file = folder / "config.json"
    fields = {name: value for name, value in fields.items() if name != "auto_map"}  # names code that is never run

    def where() -> str:
        name = field_at_fault(fields, lambda rest: kind.from_dict(rest))
        return f"{file}: {name}" if name else str(file)

    what = f"Transformers cannot read the config of this {fields['model_type']} base"
    with refused_if_it_fails(what, where=where, next_step=_MEND):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **overrides)
    if "quantization_config" not in fields and hasattr(config, "quantization_config"):
        del config.quantization_config  # of a base whose weights are read in floats
    return config


def field_at_fault(fields: Mapping[str, object], attempt: Callable[[dict], object]) -> str | None:
    """The field without which `attempt` succeeds, or the part of it that matters; None if no field alone does it."""

    def works(rest: dict) -> bool:
        try:
            attempt(rest)
        except Exception:  # whatever it is: without this field it still fails
            return False
        return True

    if works(dict(fields)):
        return None
    for name, value in fields.items():
        if name == "model_type" or not works({key: fields[key] for key in fields if key != name}):
            continue
        if isinstance(value, Mapping):
            for inner in value:
                rest = {key: value[key] for key in value if key != inner}
                if works({**fields, name: rest}):
                    return f"{name}.{inner}"
        return name
    return None
