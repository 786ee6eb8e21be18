"""The integers of a quantized checkpoint in the graph, as they are: no number of a weight is rounded again.

`MatMulNBits` holds them where

1. the columns of a group lie together (GPTQ's `desc_act` scatters them);
2. a group is one of its blocks, or several, each with the group's scale and zero;
3. the graph's dtype has the scales exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from lora_export.base.conversion import Converted
from lora_export.base.groups import Groups
from lora_export.base.recipe import Part, Quantized
from lora_export.base.stored import SafetensorsFiles
from lora_export.base.weightless import TORCH_DTYPES, as_numpy
from lora_export.errors import InputRefused
from lora_export.export.integers import in_bytes
from lora_export.quantization import BLOCK_SIZES, Grid

# Blocks that a longer group is cut into: activations are rounded by block, so no longer ones than most methods have.
_PARTS_OF_A_GROUP = (128, 64, 32, 16)
_IS_IN_OUT = "it is stored [in, out], as a Conv1D is, and MatMulNBits reads rows of outputs"
_NO_STEPS = "the base does not store it as integers with a scale and a zero a group"


@dataclass(frozen=True)
class StoredGrids:
    """Which of a base's weights can be taken as they are stored.

    Attributes:
        grids: How the integers of each lie in the graph, by path.
        reasons: Why another stored as integers cannot, by path.
    """

    grids: Mapping[str, Grid] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def most(self) -> Grid | None:
        """The grid of most of them; None where there are none."""
        found = list(self.grids.values())
        return max(dict.fromkeys(found), key=found.count, default=None)

    @property
    def reason(self) -> str:
        """Why there is none, or not one more."""
        return next(iter(self.reasons.values()), _NO_STEPS)


def stored_grids(
    files: SafetensorsFiles,
    names: Mapping[str, str | Converted],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: str,
    in_out: Collection[str],
) -> StoredGrids:
    """What of the matrices `shapes` can be taken as it is stored; reads scales and zeros, no integers.

    Args:
        names: How the files hold each parameter.
        dtype: Of the graph.
        in_out: Paths of the linear maps that are stored `[in, out]`.

    Raises:
        InputRefused: A scale is not finite.
    """
    grids, reasons = {}, {}
    for path, name in names.items():
        groups = files.groups(name) if isinstance(name, str) and len(shapes.get(path, ())) == 2 else None
        if groups is not None:
            _require_finite(files, name, groups)
            grid = _IS_IN_OUT if path in in_out else grid_of(groups, shapes[path][1], dtype)
            (grids if isinstance(grid, Grid) else reasons)[path] = grid
    return StoredGrids(grids, reasons)


def _require_finite(files: SafetensorsFiles, name: str, groups: Groups) -> None:
    if not (n_bad := int((~torch.isfinite(groups.scales)).sum())):
        return
    raise InputRefused(
        "A weight is not finite",
        where=f"{files.tensors[name].file}: {name}",
        found=f"{n_bad} of its {groups.scales.numel()} scales are NaN or infinite",
        next_step="fetch the checkpoint again",
    )


def grid_of(groups: Groups, n_in: int, dtype: str) -> Grid | str:
    """How the integers of a weight of `n_in` columns lie in a graph of `dtype`; or why they cannot, in words."""
    ordered = groups.in_order(n_in)
    if ordered is None:
        return "the columns of its groups do not lie together, as GPTQ's desc_act scatters them"
    size, n_groups = ordered.size(n_in), groups.scales.shape[1]
    fits = [each for each in _PARTS_OF_A_GROUP if size % each == 0] or ([32] if n_groups == 1 else [])
    if size not in BLOCK_SIZES and not fits:
        return f"its groups of {size} columns are no blocks of MatMulNBits"
    scales = groups.scales.to(TORCH_DTYPES[dtype])
    if not torch.equal(scales.double(), groups.scales.double()):
        return f"{dtype} does not have its {str(groups.scales.dtype).removeprefix('torch.')} scales exactly"
    middle = 1 << (groups.bits - 1)
    is_symmetric = groups.zeros is None or bool((groups.zeros == middle).all())
    return Grid(groups.bits, size if size in BLOCK_SIZES else fits[0], is_symmetric)


def as_stored(groups: Groups, integers: torch.Tensor, how: Quantized) -> dict[Part, np.ndarray]:
    """The unsigned `integers` `[out, in]` as `MatMulNBits` reads them on the grid of `how`."""
    n_out, n_in = integers.shape
    blocks = -(-n_in // how.block_size)
    groups = groups.in_order(n_in)
    of_block = torch.arange(blocks) * how.block_size // groups.size(n_in)
    middle = 1 << (how.bits - 1)
    numbers = torch.nn.functional.pad(integers.to(torch.uint8), (0, blocks * how.block_size - n_in), value=middle)
    found = {
        Part.INTEGERS: in_bytes(numbers.numpy().reshape(n_out, blocks, how.block_size), how.bits),
        Part.SCALES: as_numpy(groups.scales[:, of_block].to(TORCH_DTYPES[how.dtype])),
    }
    if not how.symmetric:
        found[Part.ZEROS] = in_bytes(groups.zeros[:, of_block].to(torch.uint8).numpy(), how.bits)
    return found
