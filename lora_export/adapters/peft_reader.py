"""Read a trained adapter by letting PEFT load it onto a weightless base, then reading what PEFT resolved.

PEFT alone decides what `target_modules`, `rank_pattern`, key names and the rest mean. Ours are the checks around it:
every tensor of the file must arrive, be finite, and have the shape that the base has.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import safetensors
import torch

from lora_export.adapters.factors import Adapter, LoraFactors, MergedLayer, TokenRows
from lora_export.adapters.folder import WEIGHTS, AdapterFolder
from lora_export.adapters.initialization import changes_base
from lora_export.adapters.peft_layer import PeftLayer
from lora_export.errors import InputRefused

_PREFIX = "base_model.model."
# PEFT's variants of a LoRA layer that are a pair at inference, or, DoRA, a pair and a magnitude.
_PAIR_VARIANTS = ("", "DoraLinearVariant", "MiCALinearVariant", "VeloraLinearVariant", "BdLoraLinearVariant")


def read_adapter(folder: AdapterFolder, base: torch.nn.Module) -> Adapter:
    """The adapter in `folder`, resolved by PEFT on a copy of `base`, a weightless model.

    Raises:
        InputRefused: A tensor does not fit the base, is left over, missing or not finite; nothing is adapted.
    """
    from peft import get_peft_model_state_dict

    model = _load_with_peft(folder, _copy_of(base))
    found = _Found()
    for path, module in _adapted_modules(model.base_model.model):
        found.add(path, module)
    carried = {key: path for key, path in _base_parameters(folder, base).items() if path not in found.replaced}
    known = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    _require_all_placed(folder, known | carried.keys())
    _require_finite(folder)
    brought = {path: model.get_parameter(key).detach() for key, path in carried.items()}
    copies = {path: tensor for path, tensor in brought.items() if path.endswith(".weight")}
    biases = {path: tensor for path, tensor in brought.items() if path not in copies}
    return Adapter(
        folder.name,
        found.lora,
        found.replaced | biases,
        tuple(found.linear),
        folder.config,
        copies,
        found.embeddings,
        found.token_rows,
        found.layers,
    )


def _copy_of(base: torch.nn.Module) -> torch.nn.Module:
    """Modules of its own, as PEFT puts its layers and some of the adapter's tensors into them; the same tensors."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})


def _load_with_peft(folder: AdapterFolder, base: torch.nn.Module) -> torch.nn.Module:
    from peft import PeftConfig, PeftModel

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = PeftConfig.from_pretrained(str(folder.path))
            if changes_base(folder.config):
                config.init_lora_weights = True  # needs the base's weights: done when the pair is folded or packed
            model = PeftModel.from_pretrained(base, folder.path, config=config, low_cpu_mem_usage=True).eval()
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, re.error) as error:
        raise InputRefused(
            "PEFT cannot load the adapter onto this base",
            where=str(folder.path),
            found=" ".join(str(error).split())[:600],
            next_step=_check_base(folder),
        ) from error
    missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message).lower()]
    unfilled = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing or unfilled:
        raise InputRefused(
            "The adapter's file lacks tensors that its config promises for this base",
            where=str(folder.path),
            found=" ".join(missing[0].split())[:600] if missing else ", ".join(unfilled[:6]),
            next_step=_check_base(folder),
        )
    return model


def _check_base(folder: AdapterFolder) -> str:
    return f"check that the base is the one it was trained on ({folder.base or 'not recorded'})"


def _base_parameters(folder: AdapterFolder, base: torch.nn.Module) -> dict[str, str]:
    """What the file holds of the base itself, key → path in the base.

    Biases (`bias="all"` or `"lora_only"`), and the weight of an adapted embedding or `lm_head`, or of a resized one.
    """
    known = dict(base.named_parameters(remove_duplicate=False))
    paths = {key: key.removeprefix(_PREFIX).replace(".base_layer.", ".") for key in folder.shapes}
    return {key: path for key, path in paths.items() if path in known}


def _require_all_placed(folder: AdapterFolder, known: set[str]) -> None:
    left = sorted(key for key in folder.shapes if key not in known)
    if left:
        raise InputRefused(
            "The adapter's file holds tensors that have no place on this base",
            where=str(folder.path),
            expected=f"{len(folder.shapes) - len(left)} of its {len(folder.shapes)} tensors have one",
            found=", ".join(left[:6]) + (f" and {len(left) - 6} more" if len(left) > 6 else ""),
            next_step=_check_base(folder),
        )


def _require_finite(folder: AdapterFolder) -> None:
    with safetensors.safe_open(folder.path / WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 not a dict
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise InputRefused(
                    "The adapter holds numbers that are not finite",
                    where=f"{folder.path}: {name}",
                    found=f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} elements are NaN or infinite",
                    next_step="the training diverged; use an earlier checkpoint",
                )


def _adapted_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """PEFT's outermost layers and wrappers in `model`, by the path of the base's module that they stand for."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not path.startswith(inside):
            inside = (*inside, f"{path}.")
            yield path, module


@dataclass
class _Found:
    """Collects what the layers hold, by kind; see `Adapter`."""

    lora: dict[str, LoraFactors] = field(default_factory=dict)
    embeddings: dict[str, LoraFactors] = field(default_factory=dict)
    token_rows: dict[str, TokenRows] = field(default_factory=dict)
    layers: dict[str, MergedLayer] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    linear: list[str] = field(default_factory=list)

    def add(self, path: str, module: torch.nn.Module) -> None:
        """Sort in one of PEFT's layers.

        1. A wrapper or layer that holds whole tensors: `modules_to_save`, LN tuning.
        2. Replaced rows of an embedding.
        3. LoRA on a linear map or an embedding, plain or (linear) DoRA: our own mathematics.
        4. Anything else: PEFT's own merge.
        """
        from peft.tuners.adalora.layer import SVDLinear
        from peft.tuners.ln_tuning.layer import LNTuningLayer
        from peft.tuners.lora import layer as lora
        from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
        from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

        if isinstance(module, ModulesToSaveWrapper):
            self._replace(path, module.modules_to_save["default"])
        elif isinstance(module, LNTuningLayer):
            self._replace(path, module.ln_tuning_layers["default"])
        elif isinstance(module, TrainableTokensWrapper):
            self._add_rows(path, module.token_adapter)
        elif isinstance(module, TrainableTokensLayer):
            self._add_rows(path, module)
        elif type(module) is lora.Linear and _variant(module) in _PAIR_VARIANTS:
            self.lora[path] = _linear_factors(path, module)
        elif type(module) is SVDLinear:
            self.lora[path] = _adalora_factors(path, module)
        elif type(module) is lora.Embedding and _variant(module) == "":
            self.embeddings[path] = _embedding_factors(path, module)
        else:
            self.layers[path] = PeftLayer.of(module)

    def _replace(self, path: str, module: torch.nn.Module) -> None:
        self.replaced |= {_join(path, name): tensor.detach() for name, tensor in module.state_dict().items()}
        self.linear += [_join(path, n) for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)]

    def _add_rows(self, path: str, layer: torch.nn.Module) -> None:
        indices = torch.tensor(layer.token_indices["default"], dtype=torch.long)
        self.token_rows[f"{path}.weight"] = TokenRows(indices, layer.trainable_tokens_delta["default"].detach())


def _variant(layer: torch.nn.Module) -> str:
    """The name of the LoRA variant that PEFT gave the layer, empty for plain LoRA."""
    variant = layer.lora_variant.get("default")
    return "" if variant is None else type(variant).__name__


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if name else path


def _linear_factors(path: str, layer: torch.nn.Module) -> LoraFactors:
    is_dora = "default" in layer.lora_magnitude_vector
    bias = getattr(layer.lora_B["default"], "bias", None)
    return LoraFactors(
        path,
        _dense(layer.lora_A["default"]),
        _dense(layer.lora_B["default"]),
        float(layer.scaling["default"]),
        weight_is_in_out=_is_in_out(layer),
        magnitude=layer.lora_magnitude_vector["default"].weight.detach() if is_dora else None,
        bias=None if bias is None else bias.detach(),
    )


def _dense(module: torch.nn.Module) -> torch.Tensor:
    """The weight of A or B, multiplied out where it is block-diagonal."""
    from peft.tuners.lora.variants import BlockDiagonalLinear

    if isinstance(module, BlockDiagonalLinear):
        return module.weight_as_blockdiagonal_matrix().detach()
    return module.weight.detach()


def _is_in_out(layer: torch.nn.Module) -> bool:
    return type(layer.get_base_layer()).__name__ == "Conv1D"


def _adalora_factors(path: str, layer: torch.nn.Module) -> LoraFactors:
    """`B (A ∘ E)·s / (n + 1e-5)`, n the rank that AdaLoRA's budget left; Zhang et al. (arXiv 2303.10512), and PEFT."""
    a, b = layer.lora_A["default"].detach(), layer.lora_B["default"].detach()
    scale = float(layer.scaling["default"]) / (float(layer.ranknum["default"]) + 1e-5)
    return LoraFactors(path, a * layer.lora_E["default"].detach(), b, scale, weight_is_in_out=_is_in_out(layer))


def _embedding_factors(path: str, layer: torch.nn.Module) -> LoraFactors:
    a, b = layer.lora_embedding_A["default"].detach(), layer.lora_embedding_B["default"].detach()
    return LoraFactors(path, a, b, float(layer.scaling["default"]), weight_is_in_out=True)
