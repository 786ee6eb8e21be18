"""Read a trained adapter by letting PEFT load it onto a weightless base, then reading what PEFT resolved.

PEFT alone decides what `target_modules`, `rank_pattern`, key names and the rest mean. Ours are the checks around it:
every tensor of the file must arrive, be finite, and have the shape that the base has.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch

from lora_export.adapters.factors import Adapter, LoraFactors
from lora_export.errors import InputRefused

_WEIGHTS = "adapter_model.safetensors"


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
        except (FileNotFoundError, json.JSONDecodeError, AttributeError):
            return None
        return {int(key): str(value) for key, value in raw.items()} if isinstance(raw, dict) else None


def open_adapter(path: Path, given: str, name: str | None = None) -> AdapterFolder:
    """Read the headers of the adapter in folder `path`.

    Raises:
        InputRefused: No config, only pickled weights, truncated or foreign files, or a name unusable as a file name.
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
    config_file = path / "adapter_config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputRefused(
            "The folder holds no PEFT adapter",
            where=str(path),
            expected="adapter_config.json and adapter_model.safetensors",
            found=", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty folder",
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputRefused("adapter_config.json is not valid JSON", where=str(config_file), found=str(error)) from error
    if not isinstance(config, dict):
        raise InputRefused("adapter_config.json holds no JSON object", where=str(config_file))
    return AdapterFolder(name, path, given, config, _read_shapes(path))


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    file = path / _WEIGHTS
    if not file.exists():
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise InputRefused(
                "The adapter's weights are pickled; a pickle can run code, so it is never read",
                where=str(path),
                expected=_WEIGHTS,
                found=", ".join(pickles),
                next_step="load it where you trust it and save again with save_pretrained (safetensors is the default)",
            )
        raise InputRefused("The adapter has no weights", where=str(path), expected=_WEIGHTS)
    try:
        with safetensors.safe_open(file, framework="pt") as handle:
            return {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118 not a dict
    except safetensors.SafetensorError as error:
        raise InputRefused(
            "The file is truncated or not safetensors",
            where=str(file),
            found=str(error),
            next_step="fetch or save the adapter again",
        ) from error


def read_adapter(folder: AdapterFolder, base: torch.nn.Module) -> Adapter:
    """The adapter in `folder`, resolved by PEFT on `base`, a weightless model that is left as it was.

    Raises:
        InputRefused: A tensor does not fit the base, is left over, missing or not finite; nothing is adapted.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    # PEFT puts these into the base itself, which others read after this adapter.
    own = {path: base.get_parameter(path) for path in _base_copies(folder, base)}
    model = _load_with_peft(PeftModel, folder, base)
    try:
        lora: dict[str, LoraFactors] = {}
        replaced: dict[str, torch.Tensor] = {}
        linear: list[str] = []
        originals: dict[str, torch.nn.Module] = {}
        for path, module in model.base_model.model.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                originals[path] = module.original_module
                saved = module.modules_to_save["default"]
                replaced |= {_join(path, name): tensor.detach() for name, tensor in saved.state_dict().items()}
                linear += [_join(path, n) for n, m in saved.named_modules() if isinstance(m, torch.nn.Linear)]
            elif isinstance(module, LoraLayer) and "default" in module.scaling:
                lora[path] = _factors(path, module)
    finally:
        model.base_model.unload()
        for path, original in originals.items():  # where PEFT leaves the adapter's own module
            base.set_submodule(path, original)
        copies = {path: base.get_parameter(path).detach() for path in own}
        for path, parameter in own.items():
            module, _, name = path.rpartition(".")
            setattr(base.get_submodule(module), name, parameter)
    _require_sound(folder, lora, replaced, copies)
    return Adapter(folder.name, lora, replaced, tuple(linear), folder.config, copies)


def _base_copies(folder: AdapterFolder, base: torch.nn.Module) -> list[str]:
    """The base's parameters that the file also holds: PEFT's default for an adapted embedding or `lm_head`."""
    names = (re.fullmatch(r"base_model\.model\.(.+)\.base_layer\.(weight|bias)", key) for key in folder.shapes)
    paths = (f"{name[1]}.{name[2]}" for name in names if name)
    known = dict(base.named_parameters(remove_duplicate=False))
    return [path for path in paths if path in known]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if name else path


def _factors(path: str, layer) -> LoraFactors:
    base = layer.get_base_layer()
    if not isinstance(base, torch.nn.Linear) and type(base).__name__ != "Conv1D":
        raise InputRefused(
            "The adapter targets a module that is no linear map",
            where=path,
            expected="nn.Linear or Conv1D",
            found=type(base).__name__,
            next_step="merge it in PEFT (merge_and_unload), save the model, and export that as a base without adapters",
        )
    return LoraFactors(
        path,
        layer.lora_A["default"].weight.detach(),
        layer.lora_B["default"].weight.detach(),
        float(layer.scaling["default"]),
        weight_is_in_out=type(base).__name__ == "Conv1D",
    )


def _load_with_peft(peft_model: type, folder: AdapterFolder, base: torch.nn.Module):
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = peft_model.from_pretrained(base, folder.path, low_cpu_mem_usage=True).eval()
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, re.error) as error:
        raise InputRefused(
            "PEFT cannot load the adapter onto this base",
            where=str(folder.path),
            found=" ".join(str(error).split())[:600],
            next_step=f"check that the base is the one it was trained on ({folder.base or 'not recorded'})",
        ) from error
    missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message).lower()]
    if missing:
        raise InputRefused(
            "The adapter's file lacks tensors that its config promises for this base",
            where=str(folder.path),
            found=" ".join(missing[0].split())[:600],
            next_step=f"check that the base is the one it was trained on ({folder.base or 'not recorded'})",
        )
    return model


def _require_sound(
    folder: AdapterFolder,
    lora: dict[str, LoraFactors],
    replaced: dict[str, torch.Tensor],
    copies: dict[str, torch.Tensor],
) -> None:
    n_expected, n_found = len(folder.shapes), 2 * len(lora) + len(replaced) + len(copies)
    if n_expected != n_found:
        raise InputRefused(
            "The adapter's file holds tensors that have no place on this base",
            where=str(folder.path),
            expected=f"{n_found} tensors ({len(lora)} pairs, {len(replaced)} replaced)",
            found=f"{n_expected} tensors",
            next_step=f"check that the base is the one it was trained on ({folder.base or 'not recorded'})",
        )
    tensors = {f"{path}.lora_{side}": getattr(pair, side.lower()) for path, pair in lora.items() for side in "AB"}
    for name, tensor in (tensors | replaced | copies).items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputRefused(
                "The adapter holds numbers that are not finite",
                where=f"{folder.path}: {name}",
                found=f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} elements are NaN or infinite",
                next_step="the training diverged; use an earlier checkpoint",
            )
