"""How the weights of an export's linear maps are stored as small integers: what was asked for, and what was done.

ONNX Runtime's `MatMulNBits` reads a weight `W` `[in, out]` in blocks of `block_size` along `in`, each with a scale:

    W[k, n] ≈ scale[n, k // block_size] · (q[n, k] − zero)

`q` has `bits` bits; `zero` is `2**(bits − 1)`, or one a block where blocks are not symmetric: an integer of as many
bits, or a float. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

BLOCK_SIZES = (16, 32, 64, 128, 256)
# What `--quantize` calls a checkpoint's own integers.
AS_STORED = "as-stored"
# What MatMulNBits rounds its other operand to, at the least: 0 leaves it to the provider, 4 allows 8-bit integers.
ACCURACY_LEVELS = (0, 1, 2, 3, 4)
INT8_ACTIVATIONS = 4


class Method(StrEnum):
    """How scales are chosen."""

    RTN = "rtn"  # round to nearest, a block's range over that of the integers
    K_QUANT = "k_quant"  # of 21 ranges near the block's, the one with the least squares, large numbers weighing more
    HQQ = "hqq"  # the block's range, and a zero in floats that half-quadratic steps move to where most numbers fit
    AS_STORED = "as_stored"  # a quantized checkpoint's own
    GIVEN = "given"  # the tool that made a given graph chose them


@dataclass(frozen=True)
class Grid:
    """How the integers of one weight lie.

    Attributes:
        symmetric: Whether blocks have no zero of their own.
    """

    bits: int
    block_size: int
    symmetric: bool


@dataclass(frozen=True)
class Quantization:
    """How linear maps are stored.

    Attributes:
        bits, block_size, symmetric: The grid; of a checkpoint's own integers the one that most weights have, and in a
            request nothing. K_QUANT and HQQ always give blocks a zero of their own.
        accuracy_level: `MatMulNBits`' attribute of that name. 0 with HQQ: where zeros are floats, nothing is rounded.
        keep: Modules to leave in floats, by path or by its last parts.
        weights: The parameters that are stored so; empty in a request.
        quantizer: What computed it, with its version; empty in a request.
    """

    bits: int = 4
    block_size: int = 32
    symmetric: bool = True
    accuracy_level: int = INT8_ACTIVATIONS
    method: Method = Method.RTN
    keep: tuple[str, ...] = ()
    weights: tuple[str, ...] = field(default=())
    quantizer: str = ""

    def __post_init__(self) -> None:
        if self.method in (Method.K_QUANT, Method.HQQ):
            object.__setattr__(self, "symmetric", False)
        if self.method is Method.HQQ:
            object.__setattr__(self, "accuracy_level", 0)

    @property
    def has_float_zeros(self) -> bool:
        return self.method is Method.HQQ

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.block_size, self.symmetric)

    @property
    def name(self) -> str:
        is_known = self.method is not Method.AS_STORED or self.weights
        return f"int{self.bits}" if is_known else AS_STORED

    @property
    def described(self) -> str:
        """In words, such as "int4 (rtn, blocks of 32, symmetric, accuracy level 4)"."""
        if self.name == AS_STORED:
            return f"the base's own integers (accuracy level {self.accuracy_level})"
        kind = "symmetric" if self.symmetric else "asymmetric"
        how = (self.method, f"blocks of {self.block_size}", kind, f"accuracy level {self.accuracy_level}")
        return f"{self.name} ({', '.join(how)})"

    def on(self, grid: Grid) -> Quantization:
        """The same on another grid."""
        return replace(self, bits=grid.bits, block_size=grid.block_size, symmetric=grid.symmetric)

    def keeps(self, parameter: str) -> bool:
        """Whether `keep` names the module of `parameter`."""
        module = parameter.rpartition(".")[0]
        return any(module == name or module.endswith(f".{name}") for name in self.keep)

    def n_bytes(self, in_features: int, out_features: int, item: int) -> int:
        """Bytes of a weight: its integers, a scale of `item` bytes a block, and where blocks have one, the zero."""
        blocks = -(-in_features // self.block_size)
        zeros = 0 if self.symmetric else blocks * item if self.has_float_zeros else -(-blocks * self.bits // 8)
        return out_features * (blocks * (self.block_size * self.bits // 8 + item) + zeros)

    def grid_of(self, parameter: str) -> Grid | None:
        """How the integers of `parameter` are made; None for one that is kept in floats."""
        return None if self.keeps(parameter) else self.grid

    @classmethod
    def from_dict(cls, fields: Mapping) -> Quantization:
        lists = {name: tuple(fields[name]) for name in ("keep", "weights")}
        return cls(**{**fields, **lists, "method": Method(fields["method"])})


def requested_of(done: Quantization | None) -> Quantization | None:
    """What was asked for, of what was done; of a given graph, nothing."""
    return None if done is None or done.method is Method.GIVEN else replace(done, weights=(), quantizer="")
