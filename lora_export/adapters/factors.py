"""A trained adapter as values, and its mathematics on one page.

Source: Hu et al., LoRA (arXiv 2106.09685), section 4.1, `h = W0 x + ΔW x` with `ΔW = s·B·A`, `s = α/r`; Kalajdzievski,
rsLoRA (arXiv 2312.03732), `s = α/√r`; Liu et al., DoRA (arXiv 2402.09353), `W' = m ⊙ (W0 + ΔW) / ‖W0 + ΔW‖`, the norm
over the inputs of each output. PEFT's files hold A as `[rank, in_features]` and B as `[out_features, rank]`.
All sums are taken in float32 and rounded once, to the dtype that is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch

# Rows folded at a time: the float32 sum of a block stays in the processor's cache, and never exists for a whole weight.
_FOLD_ROWS = 256


@dataclass(frozen=True)
class LoraFactors:
    """The pair of one module: a linear map, an embedding, which is one of one-hot inputs, or a convolution, which is
    one of the `in_channels·∏kernel` numbers under its kernel.

    Attributes:
        module: The module's path in the base model.
        a: `[rank, in_features]`; of an embedding `[rank, vocabulary]`.
        b: `[out_features, rank]`.
        scale: `s`, as PEFT resolved it for this module.
        weight_is_in_out: True if the base's weight is stored `[in_features, out_features]`: Conv1D, embeddings.
        magnitude: DoRA's `m`, `[out_features]`; None for a plain pair.
        bias: lora_bias's `b`, `[out_features]`, which adds `s·b` to the module's bias; None without.
    """

    module: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    weight_is_in_out: bool
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding (and of a head tied to it) that an adapter replaces (`trainable_token_indices`).

    Attributes:
        indices: `[n]`, int64, token ids.
        rows: `[n, embedding_dim]`, the replacement itself, although PEFT calls it a delta.
    """

    indices: torch.Tensor
    rows: torch.Tensor


class MergedLayer(Protocol):
    """A layer whose adapter has no closed form here; PEFT's own code merges it (see `peft_layer`)."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names, within the module, of the base's parameters that the layer changes."""

    def merged(self, base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All `parameters` with the adapter merged, in float32, from the base's."""


@dataclass(frozen=True)
class Adapter:
    """A trained adapter, resolved on its base.

    Attributes:
        name: The name it is served under.
        lora: Pairs on linear maps, by module path.
        replaced: Whole tensors it brings, by parameter path: `modules_to_save` (`classifier.weight`), trained biases.
        replaced_modules: The Linear modules among them, `[out, in]` weights, by path.
        config: Its `adapter_config.json`.
        base_copies: What the file also holds of the base, by parameter path: PEFT saves the weight of an adapted
            embedding or `lm_head` beside the pair.
        embeddings: Pairs on embeddings, by module path.
        convolutions: Pairs on convolutions, kernels flattened, by module path.
        token_rows: Replaced rows, by the path of the embedding's weight; a tied head's weight has the same entry.
        layers: Everything else that PEFT can merge, by module path.
        conversion_errors: Where another tuner was converted to pairs: `‖ΔW − BA‖ / ‖ΔW‖` by module path.
    """

    name: str
    lora: Mapping[str, LoraFactors]
    replaced: Mapping[str, torch.Tensor]
    replaced_modules: tuple[str, ...]
    config: Mapping[str, object]
    base_copies: Mapping[str, torch.Tensor] = field(default_factory=dict)
    embeddings: Mapping[str, LoraFactors] = field(default_factory=dict)
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)
    layers: Mapping[str, MergedLayer] = field(default_factory=dict)
    convolutions: Mapping[str, LoraFactors] = field(default_factory=dict)
    conversion_errors: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def pairs(self) -> Mapping[str, LoraFactors]:
        """All pairs, by module path."""
        return {**self.lora, **self.embeddings, **self.convolutions}

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({pair.rank for pair in self.pairs.values()}))

    @property
    def invocation_tokens(self) -> tuple[int, ...] | None:
        """The tokens from whose last occurrence on it is active (activated LoRA); None for all tokens."""
        tokens = self.config.get("alora_invocation_tokens")
        return tuple(tokens) if tokens else None

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules it adapts, other than by replacing them."""
        rows = (path.removesuffix(".weight") for path in self.token_rows)
        return tuple(dict.fromkeys([*self.pairs, *self.layers, *rows]))


def delta(pair: LoraFactors) -> torch.Tensor:
    """`ΔW = s·B·A` in float32, in the layout of the base's weight (`[out, in]`, or `[in, out]` for Conv1D)."""
    product = (pair.b.float() * pair.scale) @ pair.a.float()
    return product.T if pair.weight_is_in_out else product


def fold(
    weight: torch.Tensor, pairs: Sequence[LoraFactors], dtype: torch.dtype, *, in_place: bool = False
) -> torch.Tensor:
    """`W0 + Σ s·B·A`, summed in float32, rounded once to `dtype`.

    Args:
        in_place: Overwrite `weight` if it has that dtype; otherwise it is left as it was.
    """
    if not pairs:
        return weight.to(dtype)
    if weight.ndim > 2:  # a convolution's kernels
        return fold(weight.flatten(1), pairs, dtype, in_place=in_place).view(weight.shape)
    factors = [
        (pair.a.T.float(), pair.b.T.float(), pair.scale)
        if pair.weight_is_in_out
        else (pair.b.float(), pair.a.float(), pair.scale)
        for pair in pairs
    ]
    folded = weight if in_place and weight.dtype is dtype else torch.empty(weight.shape, dtype=dtype)
    for start in range(0, len(weight), _FOLD_ROWS):
        rows = slice(start, start + _FOLD_ROWS)
        total = weight[rows].to(torch.float32, copy=True)
        for left, right, scale in factors:
            total.addmm_(left[rows], right, alpha=scale)
        folded[rows] = total
    return folded


def dora_gain(weight: torch.Tensor, pair: LoraFactors) -> torch.Tensor:
    """DoRA's `g = m / ‖W0 + s·B·A‖`, float32 `[out_features]`: `W' = g ⊙ (W0 + s·B·A)`, as PEFT computes it.

    Args:
        weight: The base's, in the layout that the pair names.
    """
    squares = torch.zeros(pair.b.shape[0])
    rows_are_outputs = not pair.weight_is_in_out
    for start in range(0, len(weight), _FOLD_ROWS):
        rows = slice(start, start + _FOLD_ROWS)
        total = weight[rows].to(torch.float32, copy=True)
        left, right = (pair.b[rows], pair.a) if rows_are_outputs else (pair.a.T[rows], pair.b.T)
        total.addmm_(left.float(), right.float(), alpha=pair.scale)
        if rows_are_outputs:
            squares[rows] = total.square().sum(dim=1)
        else:
            squares += total.square().sum(dim=0)
    return pair.magnitude.float() / squares.sqrt()


def fold_dora(weight: torch.Tensor, pair: LoraFactors) -> torch.Tensor:
    """`g ⊙ (W0 + s·B·A)` in float32, in the layout of `weight`."""
    gain = dora_gain(weight, pair)
    return fold(weight, [pair], torch.float32) * (gain if pair.weight_is_in_out else gain[:, None])


def served_pair(pair: LoraFactors, gain: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair as a dynamic graph takes it, float32: A `[in, rank]`, B `[rank, out]` with the scale folded in.

    `y = (W x) ⊙ g + (x A) B`, so A is PEFT's transposed, and so is B; DoRA's `gain` `[out]` multiplies B as it
    multiplies W. All products are taken before the one rounding, to the dtype of the graph's inputs.
    """
    b = (pair.b.float() * pair.scale).T
    return pair.a.float().T, b if gain is None else b * gain
