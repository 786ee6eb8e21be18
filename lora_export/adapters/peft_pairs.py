"""The pairs in PEFT's own layers, as `LoraFactors`: which layers have one, and where PEFT keeps it."""

from __future__ import annotations

import torch

from lora_export.adapters.factors import LoraFactors
from lora_export.base.weightless import is_conv1d

# PEFT's variants of a LoRA layer that are a pair at inference: with a magnitude (DoRA), or for some tokens (aLoRA).
_PAIR_VARIANTS = (
    "", "DoraLinearVariant", "MiCALinearVariant", "VeloraLinearVariant", "BdLoraLinearVariant", "ALoraLinearVariant",
)  # fmt: skip


def pair_of(path: str, layer: torch.nn.Module) -> LoraFactors | None:
    """The pair of a linear map, plain, DoRA or AdaLoRA; None for any other layer."""
    from peft.tuners.adalora.layer import SVDLinear
    from peft.tuners.lora import layer as lora

    if type(layer) is lora.Linear and _variant(layer) in _PAIR_VARIANTS:
        return _linear_factors(path, layer)
    return _adalora_factors(path, layer) if type(layer) is SVDLinear else None


def embedding_pair_of(path: str, layer: torch.nn.Module) -> LoraFactors | None:
    """The pair of an embedding; None for any other layer, and for DoRA."""
    from peft.tuners.lora import layer as lora

    return _embedding_factors(path, layer) if type(layer) is lora.Embedding and _variant(layer) == "" else None


def convolution_pair_of(path: str, layer: torch.nn.Module) -> LoraFactors | None:
    """The pair of a convolution; None for any other layer, and for what only has a merged form."""
    from peft.tuners.lora import layer as lora

    is_plain = isinstance(layer, lora._ConvNd) and _is_plain_convolution(layer)
    return _convolution_factors(path, layer) if is_plain else None


def _variant(layer: torch.nn.Module) -> str:
    """The name of the LoRA variant that PEFT gave the layer, empty for plain LoRA."""
    variant = layer.lora_variant.get("default")
    return "" if variant is None else type(variant).__name__


def _is_plain_convolution(layer: torch.nn.Module) -> bool:
    """Whether the pair is a convolution like its base's, then a linear map: PEFT gives A no groups, dilation or mode of
    padding, so that where the base has one, only the merged form is what PEFT's authors mean."""
    base = layer.get_base_layer()
    return _variant(layer) == "" and base.groups == 1 and set(base.dilation) == {1} and base.padding_mode == "zeros"


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
    return is_conv1d(layer.get_base_layer())


def _adalora_factors(path: str, layer: torch.nn.Module) -> LoraFactors:
    """`B (A ∘ E)·s / (n + 1e-5)`, n the rank that AdaLoRA's budget left; Zhang et al. (arXiv 2303.10512), and PEFT."""
    a, b = layer.lora_A["default"].detach(), layer.lora_B["default"].detach()
    scale = float(layer.scaling["default"]) / (float(layer.ranknum["default"]) + 1e-5)
    return LoraFactors(path, a * layer.lora_E["default"].detach(), b, scale, weight_is_in_out=_is_in_out(layer))


def _embedding_factors(path: str, layer: torch.nn.Module) -> LoraFactors:
    a, b = layer.lora_embedding_A["default"].detach(), layer.lora_embedding_B["default"].detach()
    return LoraFactors(path, a, b, float(layer.scaling["default"]), weight_is_in_out=True)


def _convolution_factors(path: str, layer: torch.nn.Module) -> LoraFactors:
    """A's kernels `[rank, in, *kernel]` flattened, and B's of size 1 `[out, rank, 1, …]`."""
    b = layer.lora_B["default"]
    bias = None if b.bias is None else b.bias.detach()
    factors = layer.lora_A["default"].weight.detach().flatten(1), b.weight.detach().flatten(1)
    return LoraFactors(path, *factors, float(layer.scaling["default"]), weight_is_in_out=False, bias=bias)
