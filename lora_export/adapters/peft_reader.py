"""Read a trained adapter by letting PEFT load it onto a weightless base, then reading what PEFT resolved.

PEFT alone decides what `target_modules`, `rank_pattern`, key names and the rest mean. Ours are the checks around it:
every tensor of the file must arrive, be finite, and have the shape that the base has.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import safetensors
import torch

from lora_export.adapters.factors import Adapter, LoraFactors, MergedLayer, TokenRows
from lora_export.adapters.folder import WEIGHTS, AdapterFolder
from lora_export.adapters.initialization import changes_base
from lora_export.adapters.peft_keys import require_all_placed
from lora_export.adapters.peft_layer import PeftLayer
from lora_export.adapters.peft_pairs import convolution_pair_of, embedding_pair_of, pair_of
from lora_export.adapters.peft_sizes import refuse_other_sizes
from lora_export.errors import InputRefused, refused_if_it_fails, some_of

_PREFIX = "base_model.model."


def read_trained_adapter(folder: AdapterFolder, base: torch.nn.Module) -> Adapter:
    """The adapter in `folder`, resolved by PEFT on a copy of `base`, a weightless model.

    Raises:
        InputRefused: A tensor does not fit the base, is left over, missing or not finite; nothing is adapted.
    """
    return adapter_in(load_with_peft(folder, base), folder, base)


def adapter_in(model: torch.nn.Module, folder: AdapterFolder, base: torch.nn.Module) -> Adapter:
    """What PEFT resolved: the adapter of `folder` in `model`, which `load_with_peft` made of `base`.

    Raises:
        InputRefused: A tensor of the file is left over or not finite.
    """
    from peft import get_peft_model_state_dict

    found = _Found()
    for path, module in _adapted_modules(model.base_model.model):
        found.add(path, module)
    carried = {key: path for key, path in _base_parameters(folder, base).items() if path not in found.replaced}
    known = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    require_all_placed(folder, model, known | carried.keys(), next_step=_check_base(folder))
    require_finite(folder)
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
        found.convolutions,
    )


def _copy_of(base: torch.nn.Module) -> torch.nn.Module:
    """Modules of its own, as PEFT puts its layers and some of the adapter's tensors into them; the same tensors."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})


def load_with_peft(folder: AdapterFolder, base: torch.nn.Module) -> torch.nn.Module:
    """A copy of `base` with PEFT's layers, which have the tensors of `folder`.

    Raises:
        InputRefused: PEFT does not load it, or tensors that its options promise are missing.
    """
    from peft import PeftConfig, PeftModel

    base = _copy_of(base)
    what, where = "PEFT cannot load the adapter onto this base", str(folder.path)
    refused = refused_if_it_fails(what, where=where, next_step=_check_base(folder))
    with refused, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = PeftConfig.from_pretrained(str(folder.path))
        if changes_base(folder.config) or folder.config.get("init_lora_weights") is True:
            # A start that changes the base needs its weights: repeated when the pair is folded or packed.
            config.init_lora_weights = True
        try:
            # Where PyTorch has a GPU, PEFT would put the adapter there, and the base stays here.
            options = {"low_cpu_mem_usage": True, "torch_device": "cpu"}
            model = PeftModel.from_pretrained(base, folder.path, config=config, **options).eval()
        except RuntimeError as error:
            refuse_other_sizes(str(error), folder, _check_base(folder))
            raise
    missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message).lower()]
    unfilled = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing or unfilled:
        raise InputRefused(
            "The adapter's file lacks tensors that its config promises for this base",
            where=str(folder.path),
            found=" ".join(missing[0].split())[:600] if missing else some_of(unfilled, 6),
            next_step=_check_base(folder),
        )
    return model


def load_again(folder: AdapterFolder, model: torch.nn.Module) -> bool:
    """Give the layers of `model`, which `load_with_peft` made for an adapter of the same options and with tensors of
    the same names and shapes, the tensors of `folder`; whether each has found its place.

    Raises:
        InputRefused: PEFT does not load it.
    """
    what, where = "PEFT cannot load the adapter onto this base", str(folder.path)
    with refused_if_it_fails(what, where=where, next_step=_check_base(folder)):
        options = {"low_cpu_mem_usage": True, "torch_device": "cpu"}
        found = model.load_adapter(str(folder.path), "default", **options)
    return not found.missing_keys and not found.unexpected_keys


def _check_base(folder: AdapterFolder) -> str:
    return f"check that the base is the one it was trained on ({folder.base or 'not recorded'})"


def _base_parameters(folder: AdapterFolder, base: torch.nn.Module) -> dict[str, str]:
    """What the file holds of the base itself, key → path in the base.

    Biases (`bias="all"` or `"lora_only"`), and the weight of an adapted embedding or `lm_head`, or of a resized one.
    """
    known = dict(base.named_parameters(remove_duplicate=False))
    paths = {key: base_path_of(key) for key in folder.shapes}
    return {key: path for key, path in paths.items() if path in known}


def base_path_of(key: str) -> str:
    """The parameter of the base that a tensor of the file stands for as a whole, if it is one."""
    return key.removeprefix(_PREFIX).replace(".base_layer.", ".")


def require_finite(folder: AdapterFolder) -> None:
    """Refuse an adapter that holds numbers that are none.

    Raises:
        InputRefused: A tensor is not finite.
    """
    with safetensors.safe_open(folder.path / WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 not a dict
            tensor = file.get_tensor(name)
            # A sixth of the time of looking at each: a sum of finite float32 is finite in float64.
            is_finite = not tensor.is_floating_point() or math.isfinite(tensor.sum(dtype=torch.float64))
            if not is_finite and not bool(torch.isfinite(tensor).all()):
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
    convolutions: dict[str, LoraFactors] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    linear: list[str] = field(default_factory=list)

    def add(self, path: str, module: torch.nn.Module) -> None:
        """Sort in one of PEFT's layers.

        1. A wrapper or layer that holds whole tensors: `modules_to_save`, LN tuning.
        2. Replaced rows of an embedding.
        3. LoRA on a linear map, an embedding or a convolution, plain or (linear) DoRA: our own mathematics.
        4. Anything else: PEFT's own merge.
        """
        from peft.tuners.ln_tuning.layer import LNTuningLayer
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
        elif (pair := pair_of(path, module)) is not None:
            self.lora[path] = pair
        elif (pair := embedding_pair_of(path, module)) is not None:
            self.embeddings[path] = pair
        elif (pair := convolution_pair_of(path, module)) is not None:
            self.convolutions[path] = pair
        else:
            self.layers[path] = PeftLayer.of(module)

    def _replace(self, path: str, module: torch.nn.Module) -> None:
        self.replaced |= {_join(path, name): tensor.detach() for name, tensor in module.state_dict().items()}
        self.linear += [_join(path, n) for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)]

    def _add_rows(self, path: str, layer: torch.nn.Module) -> None:
        indices = torch.tensor(layer.token_indices["default"], dtype=torch.long)
        self.token_rows[f"{path}.weight"] = TokenRows(indices, layer.trainable_tokens_delta["default"].detach())


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if name else path
