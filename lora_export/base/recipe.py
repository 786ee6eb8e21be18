"""How one stored weight is made from the base's parameters, as data.

A graph under construction holds no large weights. Each of its unbound initializers carries a `Recipe`: which
parameters of the base it is made of, in which order, transposed or not. A recipe is evaluated when the weight is
written, one tensor at a time.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

from lora_export.quantization import Method, Quantization

# Key of a recipe's JSON in an initializer's metadata.
RECIPE = "lora_export.base.recipe"


class Part(StrEnum):
    """Of a quantized weight, what a tensor holds."""

    INTEGERS = "integers"  # packed, uint8 `[out, blocks, bytes of a block]`
    SCALES = "scales"  # `[out, blocks]`
    ZEROS = "zeros"  # packed, uint8 `[out, bytes of a row of blocks]`; of HQQ floats `[out, blocks]`


@dataclass(frozen=True)
class Quantized:
    """The part of a weight `[in, out]` that is quantized in blocks along `in`.

    Attributes:
        dtype: Of the weight before, of the scales, and of zeros that are floats.
    """

    part: Part
    dtype: str
    bits: int
    block_size: int
    symmetric: bool
    method: Method

    @classmethod
    def of(cls, how: Quantization, part: Part, dtype: str) -> Quantized:
        return cls(part, dtype, how.bits, how.block_size, how.symmetric, how.method)


@dataclass(frozen=True)
class Recipe:
    """`concatenate([p.T if transposed else p for p in parameters], axis)`.

    Attributes:
        parameters: The parameters' paths in the traced model, e.g. `model.layers.0.mlp.up_proj.weight`.
        transposed: Whether each 2-D parameter `[out, in]` is stored as `[in, out]`.
        axis: The axis of the stored tensors along which several parameters are concatenated.
        quantized: Which part of the result, quantized, is stored; None for the result itself.
    """

    parameters: tuple[str, ...]
    transposed: bool = False
    axis: int = 0
    quantized: Quantized | None = None

    @property
    def before(self) -> Recipe:
        """That of the weight before it is quantized."""
        return replace(self, quantized=None)

    def to_json(self) -> str:
        fields = asdict(self)
        if self.quantized is None:
            del fields["quantized"]
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        fields = json.loads(text)
        quantized = fields.get("quantized")
        part = quantized and Quantized(
            **(quantized | {"part": Part(quantized["part"]), "method": Method(quantized["method"])})
        )
        return cls(tuple(fields["parameters"]), fields["transposed"], fields["axis"], part)
