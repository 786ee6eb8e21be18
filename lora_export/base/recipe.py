"""How one stored weight is made from the base's parameters, as data.

A graph under construction holds no large weights. Each of its unbound initializers carries a `Recipe`: which
parameters of the base it is made of, in which order, transposed or not. A recipe is evaluated when the weight is
written, one tensor at a time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

# Key of a recipe's JSON in an initializer's metadata.
RECIPE = "lora_export.base.recipe"


@dataclass(frozen=True)
class Recipe:
    """`concatenate([p.T if transposed else p for p in parameters], axis)`.

    Attributes:
        parameters: The parameters' paths in the traced model, e.g. `model.layers.0.mlp.up_proj.weight`.
        transposed: Whether each 2-D parameter `[out, in]` is stored as `[in, out]`.
        axis: The axis of the stored tensors along which several parameters are concatenated.
    """

    parameters: tuple[str, ...]
    transposed: bool = False
    axis: int = 0

    def to_json(self) -> str:
        return json.dumps({"parameters": self.parameters, "transposed": self.transposed, "axis": self.axis})

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        fields = json.loads(text)
        return cls(tuple(fields["parameters"]), fields["transposed"], fields["axis"])
