"""A weight of a quantized checkpoint whose numbers are even steps: integers, and a scale and a zero for each group.

    W[n, k] = (integers[n, k] − zeros[n, g]) · scales[n, g],    g the group of column k

So are those of GPTQ, AWQ, compressed-tensors' integers and 8-bit integers with a scale a row. (The 4-bit numbers of
bitsandbytes are places in a table whose steps are not even.) Such a weight can be read in floats, or its integers can
be taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Groups:
    """What turns the integers of a weight `[out, in]` into its numbers.

    Attributes:
        bits: Of an integer: 4 or 8.
        scales: `[out, groups]`, in a floating dtype.
        zeros: `[out, groups]`, integers as far from 0 as the weight's; None where each is `2**(bits − 1)`.
        of_column: The group of each column, `[in]`; None where groups are columns in order, each as long as the first.
    """

    bits: int
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    of_column: torch.Tensor | None = None

    def size(self, n_in: int) -> int:
        """How many columns are a group, where they are in order; the last may be shorter."""
        return -(-n_in // self.scales.shape[1])

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
