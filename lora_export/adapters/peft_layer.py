"""One adapted layer merged by PEFT's own code: for tuners and layer types that have no closed form here.

The layer was loaded on a weightless base. To merge, a copy of it is made whose base parameters have their real values,
and PEFT merges that in float32. So a model is merged one layer at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from lora_export.adapters.factors import LoraFactors
from lora_export.base.weightless import is_conv1d
from lora_export.compat import borrow
from lora_export.errors import refused_if_it_fails

_ADAPTER = "default"


@dataclass(frozen=True)
class PeftLayer:
    """A PEFT tuner layer as `factors.MergedLayer`.

    Attributes:
        layer: PEFT's layer, its base without weights; never changed.
        parameters: The names, within the module, of the base's parameters that it may change.
    """

    layer: torch.nn.Module
    parameters: tuple[str, ...]

    @classmethod
    def of(cls, layer: torch.nn.Module) -> PeftLayer:
        return cls(layer, tuple(_own_parameters(layer)))

    @property
    def is_convertible(self) -> bool:
        """Whether PEFT can turn the layer's delta into a LoRA pair."""
        supports = getattr(self.layer, "supports_lora_conversion", None)
        return supports is not None and supports(_ADAPTER)

    @torch.no_grad()
    def converted(self, module: str, base: Mapping[str, torch.Tensor], rank: float) -> LoraFactors:
        """The pair nearest to the layer's delta (a truncated SVD), computed by PEFT; scale 1.

        Args:
            module: The path to give the pair.
            base: The base's values of `parameters`.
            rank: An int, or a share of the energy below 1.
        """
        convert = borrow("_convert_module_to_lora")
        layer = self._with(base)
        is_in_out = is_conv1d(layer.get_base_layer())
        with refused_if_it_fails(
            "PEFT cannot convert a layer of this adapter to a pair", where=module, next_step="merge it exactly"
        ):
            a, b, _ = convert(layer, rank, _ADAPTER)
        return LoraFactors(module, a.detach().clone(), b.detach().clone(), 1.0, is_in_out)

    @torch.no_grad()
    def merged(self, base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`parameters` with the adapter merged, in float32, from the base's values in any dtype.

        Raises:
            InputRefused: PEFT cannot merge this layer.
        """
        layer = self._with(base)
        places = _own_parameters(layer)
        what, where = "PEFT cannot merge a layer of this adapter", type(layer).__name__
        with refused_if_it_fails(what, where=where, next_step="serve it with PEFT"):
            for each in _merge_order(layer):
                each.merge(adapter_names=[_ADAPTER])
        return {name: getattr(owner, attribute).detach() for name, (owner, attribute) in places.items()}

    def _with(self, base: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """A copy of the layer whose base parameters have the values of `base`, in float32."""
        real = {}
        for name, (owner, attribute) in _own_parameters(self.layer).items():
            value = base[name].to(torch.float32, copy=True)
            real[id(owner._parameters[attribute])] = torch.nn.Parameter(value, requires_grad=False)
        return copy.deepcopy(self.layer, real)


def _merge_order(layer: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """`layer`, and the wrappers of other parameters of the same module that are nested in it."""
    from peft.tuners.lora.layer import ParamWrapper

    while isinstance(layer, ParamWrapper):
        yield layer
        layer = layer.base_layer
    if hasattr(layer, "merged_adapters"):
        yield layer


def _own_parameters(layer: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, str]]:
    """The base's parameters of a layer: name within the module → (the module that holds it, its attribute there)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = layer.get_base_layer()
    found = {name: (base, name) for name, parameter in base._parameters.items() if parameter is not None}
    for child_name, child in base.named_children():
        # nn.MultiheadAttention: PEFT adapts its output projection as a part of it.
        if isinstance(child, BaseTunerLayer):
            inner = child.get_base_layer()
            found |= {f"{child_name}.{n}": (inner, n) for n, p in inner._parameters.items() if p is not None}
    return found
