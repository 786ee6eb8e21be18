"""A weight of a quantized checkpoint whose numbers are even steps: integers, and a scale and a zero for each group.

    W[n, k] = (integers[n, k] − zeros[n, g]) · scales[n, g],    g the group of column k

So are those of GPTQ, AWQ, compressed-tensors' integers and 8-bit integers with a scale a row. (The 4-bit numbers of
bitsandbytes are places in a table whose steps are not even.) Such a weight can be read in floats, or its integers can
be taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

Read = Callable[[str], torch.Tensor]
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Groups:
    """What turns the integers of a weight `[out, in]` into its numbers.

    Attributes:
        bits: Of an integer: 4 or 8.
        scales: `[out, groups]`, in a floating dtype.
        zeros: `[out, groups]`, integers as far from 0 as the weight's; None where each is `2**(bits − 1)`.
        columns: How many columns in order are a group, of which the last may be shorter; None for equal groups.
        of_column: The group of each column, `[in]`, where the checkpoint says; None where groups are columns in order.
    """

    bits: int
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    columns: int | None = None
    of_column: torch.Tensor | None = None

    def size(self, n_in: int) -> int:
        """How many columns are a group, where they are in order; the last may be shorter."""
        return self.columns or -(-n_in // self.scales.shape[1])

    def in_order(self, n_in: int) -> Groups | None:
        """The same with groups of columns in order; None where their columns do not lie together."""
        if self.of_column is None:
            return self
        of_column = self.of_column.long()
        columns = max(int((of_column == 0).sum()), 1)
        is_ordered = torch.equal(of_column, torch.arange(n_in) // columns)
        return replace(self, columns=columns, of_column=None) if is_ordered else None

    def values(self, integers: torch.Tensor) -> torch.Tensor:
        """The weight of unsigned `integers` `[out, in]`, in the scales' dtype: one rounding."""
        n_in = integers.shape[1]
        zeros = 1 << (self.bits - 1) if self.zeros is None else self._by_column(self.zeros, n_in)
        return (integers.to(torch.int16) - zeros).to(self.scales.dtype) * self._by_column(self.scales, n_in)

    def _by_column(self, of_groups: torch.Tensor, n_in: int) -> torch.Tensor:
        """`[out, groups]` as `[out, in]`."""
        if self.of_column is not None:
            return of_groups[:, self.of_column.long()]
        return of_groups.repeat_interleave(self.size(n_in), dim=1)[:, :n_in]


@dataclass(frozen=True)
class InGroups:
    """How the groups and the integers of a weight are read; the groups are small beside the integers.

    Attributes:
        groups: Reads what turns its integers into its numbers.
        integers: Reads them: unsigned, `[out, in]`.
    """

    groups: Callable[[Read], Groups]
    integers: Callable[[Read], torch.Tensor]

    def values(self, read: Read) -> torch.Tensor:
        """The weight `[out, in]`."""
        return self.groups(read).values(self.integers(read))


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The last axis of 32-bit words as one of unsigned integers, the lowest bits first."""
    numbers = torch.empty((*words.shape, 32 // bits), dtype=torch.uint8)
    for place in range(32 // bits):
        numbers[..., place] = (words >> (bits * place)) & ((1 << bits) - 1)
    return numbers.flatten(-2)


def unpacked_awq(words: torch.Tensor) -> torch.Tensor:
    """The same of 4 bits, in the order in which AWQ packs the eight of a word."""
    return unpacked(words, 4).unflatten(-1, (-1, 8))[..., list(_AWQ_ORDER)].flatten(-2)


def unsigned(integers: torch.Tensor) -> torch.Tensor:
    """8-bit integers whose zero is 0 as those whose zero is 128."""
    return (integers.to(torch.int16) + 128).to(torch.uint8)
