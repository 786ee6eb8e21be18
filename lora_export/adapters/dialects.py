"""LoRA adapters that were not saved by PEFT: recognised, resolved on the base, converted to an ordinary PEFT folder.

kohya       `lora_te_path_with_underscores.lora_down.weight`, `.lora_up.weight`, `.alpha`; scale alpha / rank, and
            alpha is the rank if it is missing or 0 (kohya-ss/sd-scripts, networks/lora.py)
diffusers   `path.lora.down.weight`, `path.lora.up.weight`, also `lora_linear_layer`; scale likewise
bare PEFT   `path.lora_A.weight`, `path.lora_B.weight` without `base_model.model.` or a config; scale likewise
            (where these three have no alpha beside a pair, the file's header may name it: `adapters.header`)
MLX         `path.lora_a` `[in, rank]`, `path.lora_b` `[rank, out]`, DoRA's magnitude `path.m`; the scale is absolute
            and stands in `adapter_config.json` (mlx-lm, tuner/lora.py, tuner/dora.py)

A name becomes a module of the base or the adapter is refused; nothing is guessed and nothing left over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from safetensors.torch import save_file

from lora_export.adapters.header import HeaderOptions
from lora_export.adapters.module_names import Place, resolve_all
from lora_export.adapters.peft_writer import PREFIX, WEIGHTS, write_config
from lora_export.base.stored import refuse_pickles
from lora_export.errors import InputRefused, some_of


class Dialect(StrEnum):
    KOHYA = "kohya"
    DIFFUSERS = "diffusers"
    BARE_PEFT = "bare PEFT"
    MLX = "MLX"


# What a key ends in, and which tensor of the pair it is.
_PARTS = {
    Dialect.KOHYA: {"lora_down.weight": "a", "lora_up.weight": "b", "alpha": "alpha"},
    Dialect.DIFFUSERS: {
        "lora.down.weight": "a",
        "lora.up.weight": "b",
        "lora_linear_layer.down.weight": "a",
        "lora_linear_layer.up.weight": "b",
        "alpha": "alpha",
    },
    Dialect.BARE_PEFT: {"lora_A.weight": "a", "lora_B.weight": "b", "alpha": "alpha"},
    Dialect.MLX: {"lora_a": "a", "lora_b": "b", "m": "magnitude"},
}


@dataclass(frozen=True)
class ForeignAdapter:
    """A file of one of these formats, and the settings that its format keeps beside it.

    Attributes:
        tensors: By module name as the file has it, then by part ("a", "b", "alpha", "magnitude").
        mlx: MLX's `adapter_config.json`; empty for the other formats.
        header: What the file's header says of the pairs.
    """

    dialect: Dialect
    file: Path
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    mlx: Mapping[str, object]
    header: HeaderOptions

    def rank(self, name: str) -> int:
        """The rank of one pair, as the file has it."""
        return self.tensors[name]["a"].shape[1 if self.dialect is Dialect.MLX else 0]


def recognise(keys: list[str]) -> Dialect | None:
    """The format that a file with these keys is written in; None for PEFT's own and for anything else."""
    if any(key.startswith(PREFIX) for key in keys):
        return None
    for dialect, parts in _PARTS.items():
        own = tuple(f".{ending}" for ending, part in parts.items() if part in ("a", "b"))
        if any(key.endswith(own) for key in keys):
            return dialect
    return None


def group(
    dialect: Dialect, tensors: Mapping[str, torch.Tensor], mlx: Mapping, *, header: HeaderOptions
) -> ForeignAdapter:
    """Sort a file's tensors by module.

    Raises:
        InputRefused: A tensor is none of the format's, or a pair is not complete.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    left_over, file = [], header.file
    for key, tensor in tensors.items():
        ending = next((ending for ending in _PARTS[dialect] if key.endswith(f".{ending}")), None)
        if ending is None:
            left_over.append(key)
        else:
            found.setdefault(key.removesuffix(f".{ending}"), {})[_PARTS[dialect][ending]] = tensor
    if left_over:
        raise InputRefused(
            f"The adapter (format: {dialect}) holds tensors that are no plain LoRA",
            where=f"{file}: {some_of(left_over, 6)}",
            expected="keys that end in " + ", ".join(_PARTS[dialect]),
            next_step="LyCORIS (LoHa, LoKr, DoRA), CP and full differences are not read: merge it where it was trained "
            "and make an adapter of the result with `lora-export extract`",
        )
    halves = sorted(name for name, parts in found.items() if not {"a", "b"} <= parts.keys())
    if halves:
        raise InputRefused(
            "The adapter's file lacks one half of a pair",
            where=f"{file}: {some_of(halves, 6)}",
            expected="both halves",
            found=some_of([f"{name}: {'/'.join(sorted(found[name]))}" for name in halves], 3),
            next_step="save or fetch it again",
        )
    return ForeignAdapter(dialect, file, found, mlx, header)


def convert(adapter: ForeignAdapter, places: Mapping[str, Place], prefix: str, *, base: str, folder: Path) -> None:
    """Write the adapter as a PEFT folder whose ranks, scales and tensors are the file's.

    Args:
        places: The base's modules by path.
        prefix: The base's own prefix, which names may have or lack (`model`, `bert`).
        base: What to record as `base_model_name_or_path`.

    Raises:
        InputRefused: A name fits no module or several, a shape does not fit, a setting of the format is missing.
    """
    modules = resolve_all(
        list(adapter.tensors), places, prefix, where=str(adapter.file), underscored=adapter.dialect is Dialect.KOHYA
    )
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, place in modules.items():
        parts = adapter.tensors[name]
        a, b = _pair(adapter, name, place)
        ranks[place.path] = rank = a.shape[0]
        alphas[place.path] = _alpha(adapter, name, rank)
        key = f"{PREFIX}{place.path}"
        if place.is_embedding:
            tensors |= {f"{key}.lora_embedding_A": a, f"{key}.lora_embedding_B": b}
        else:
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        if "magnitude" in parts:
            tensors[f"{key}.lora_magnitude_vector"] = parts["magnitude"].contiguous()
    options = {
        "base_model_name_or_path": base,
        "fan_in_fan_out": any(place.is_conv1d for place in modules.values()),
        "use_dora": _uses_dora(adapter),
        "init_lora_weights": adapter.header.start,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_config(folder, ranks, alphas, everything=list(places), options=options)


def _pair(adapter: ForeignAdapter, name: str, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    """A `[rank, in]` and B `[out, rank]`."""
    a, b = adapter.tensors[name]["a"], adapter.tensors[name]["b"]
    if adapter.dialect is Dialect.MLX:
        a, b = a.T, b.T
    expected = f"A with {place.in_features} inputs, B with {place.out_features} outputs, of one rank"
    fits = a.ndim == b.ndim == 2 and (a.shape[1], b.shape[0]) == (place.in_features, place.out_features)
    if not fits or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise InputRefused(
            "A pair does not fit the base's module",
            where=f"{adapter.file}: {name} → {place.path}",
            expected=expected,
            found=f"{list(adapter.tensors[name]['a'].shape)} and {list(adapter.tensors[name]['b'].shape)}",
            next_step="check that the base is the one it was trained on; pairs of convolutions are not read",
        )
    return a.contiguous(), b.contiguous()


def _alpha(adapter: ForeignAdapter, name: str, rank: int) -> float:
    """PEFT's alpha of the pair `name`, whose scale is alpha / rank: the tensor's, else the header's, else the rank."""
    if adapter.dialect is not Dialect.MLX:
        alpha = adapter.tensors[name].get("alpha")
        said = adapter.header.alpha(name, rank, has_own=alpha is not None)
        if alpha is None:
            return float(rank) if said is None else said
        if alpha.numel() != 1 or not torch.isfinite(alpha).all():
            raise InputRefused("An alpha is no finite number", where=str(adapter.file), found=str(alpha.tolist()))
        stored = float(alpha) or float(rank)
        if said is not None and not math.isclose(stored, said, rel_tol=1e-3):
            raise InputRefused(
                "The alpha in the file's header is another than the tensor's",
                where=f"{adapter.file}: {name}",
                expected=f"{said:g}, as the header says",
                found=f"{stored:g}",
                next_step="save or fetch the file again; what scale it was trained with cannot be told",
            )
        return stored
    parameters = adapter.mlx.get("lora_parameters")
    settings = parameters if isinstance(parameters, Mapping) else {}
    scale, expected_rank = settings.get("scale"), settings.get("rank")
    if not isinstance(scale, int | float) or isinstance(scale, bool) or expected_rank != rank:
        raise InputRefused(
            "MLX keeps the scale and the rank in adapter_config.json; one is missing or another than the tensors'",
            where=f"{adapter.file.parent}/adapter_config.json: lora_parameters",
            expected=f"rank {rank} and a number as scale",
            found=repr(parameters),
            next_step="give the folder that mlx_lm.lora wrote, with its own adapter_config.json",
        )
    return float(scale) * rank


def _uses_dora(adapter: ForeignAdapter) -> bool:
    with_magnitude = [name for name, parts in adapter.tensors.items() if "magnitude" in parts]
    kind = adapter.mlx.get("fine_tune_type", "lora")
    if adapter.dialect is Dialect.MLX and (kind == "dora") != bool(with_magnitude):
        raise InputRefused(
            "MLX's fine_tune_type does not fit the file's tensors",
            where=f"{adapter.file.parent}/adapter_config.json: fine_tune_type",
            expected="dora, and `m` beside every pair, or lora without any",
            found=f"{kind!r}, {len(with_magnitude)} of {len(adapter.tensors)} modules with `m`",
        )
    if with_magnitude and len(with_magnitude) != len(adapter.tensors):
        raise InputRefused(
            "Some modules have a DoRA magnitude and some have none",
            where=f"{adapter.file}: {some_of(sorted(set(adapter.tensors) - set(with_magnitude)), 6)}",
        )
    return bool(with_magnitude)


def refuse_unreadable(path: Path) -> None:
    """Refuse a single file that is no safetensors file: a pickle, GGUF, or something else."""
    if path.suffix == ".gguf":
        raise InputRefused(
            "GGUF adapters are not read: their names and the layout of some weights are llama.cpp's",
            where=str(path),
            expected="the PEFT folder that it was converted from",
            next_step="export from that folder",
        )
    refuse_pickles(path, "adapter")
    if path.suffix != ".safetensors":
        raise InputRefused("The file is no adapter", where=str(path), expected="a folder, or a .safetensors file")
