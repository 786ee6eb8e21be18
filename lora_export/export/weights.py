"""Where an export's numbers come from: the checkpoint's tensors with the merged adapters folded in, one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NoReturn

import numpy as np
import torch

from lora_export.adapters.factors import Adapter
from lora_export.adapters.merging import apply_changes, change_of
from lora_export.base.checkpoint import Checkpoint
from lora_export.base.conversion import Converted
from lora_export.base.recipe import Part, Quantized, Recipe
from lora_export.base.weightless import TORCH_DTYPES, as_numpy
from lora_export.errors import InputRefused
from lora_export.export.as_stored import StoredGrids, as_stored
from lora_export.export.integers import as_served
from lora_export.quantization import Grid, Method, Quantization


@dataclass(frozen=True)
class Parameters:
    """Every parameter of the exported model, by its path, made on request.

    Attributes:
        stored_names: Model path → checkpoint name or conversion, for what the checkpoint holds.
        aliases: Model path → all paths of the same (tied) tensor.
        shapes: Model path → shape.
        adapters: Adapters to fold in, each with its weight in the sum.
        zeros_for: Paths that may be missing from the checkpoint: the default of a head that the base never had.
        computed: What no checkpoint need hold, such as sinusoidal positions, by path.
        in_out: Paths of the linear maps that are stored `[in, out]` (`Conv1D` of GPT-2).
        embeddings: Paths of the tables of embeddings.
        quantization: How a dynamic graph stores linear maps, and which; None for floats.
        own: What can be taken as the checkpoint stores it, where that was asked for.
        dtype: Of the graph.
    """

    checkpoint: Checkpoint
    stored_names: Mapping[str, str | Converted]
    aliases: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    adapters: Sequence[tuple[Adapter, float]] = ()
    zeros_for: frozenset[str] = frozenset()
    computed: Mapping[str, torch.Tensor] = field(default_factory=dict)
    in_out: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()
    quantization: Quantization | None = None
    own: StoredGrids = field(default_factory=StoredGrids)
    dtype: str = "float32"

    def stored_name(self, path: str) -> str | Converted | None:
        """How the checkpoint holds `path` or a tensor it is tied to; None if it has neither."""
        for alias in (path, *self.aliases.get(path, ())):
            if alias in self.stored_names:
                return self.stored_names[alias]
        return None

    def stores(self, path: str, tensor: torch.Tensor) -> bool:
        """Whether the checkpoint holds exactly `tensor` at `path`, as far as its dtype tells."""
        name = self.stored_name(path)
        stored = None if name is None else self.checkpoint.read(name)
        return stored is not None and stored.shape == tensor.shape and torch.equal(stored.to(tensor.dtype), tensor)

    def parameter(self, path: str, dtype: torch.dtype, *, transposed: bool = False) -> torch.Tensor:
        """The parameter at `path` with adapters folded in, in the layout of the model or, a matrix, transposed.

        Raises:
            InputRefused: The checkpoint lacks it, or it is not finite, or overflows `dtype`.
        """
        found = (change_of(adapter, weight, path, read=self.base) for adapter, weight in self.adapters)
        changes = [change for change in found if change is not None]
        brought = [adapter.replaced[path] for adapter, _ in self.adapters if path in adapter.replaced]
        lacks = bool(brought) and self.stored_name(path) is None
        weight = torch.zeros(brought[0].shape) if lacks else self.base(path)
        result = apply_changes(weight, changes, dtype, transposed=transposed)
        if result.is_floating_point() and not all_finite(result):
            self._refuse_not_finite(path, result)
        return result

    def base(self, path: str) -> torch.Tensor:
        """The base's own parameter at `path`, as it is stored.

        Raises:
            InputRefused: The checkpoint lacks it.
        """
        if (name := self.stored_name(path)) is not None:
            return self.checkpoint.read(name)
        if path in self.computed:
            return self.computed[path]
        if path in self.zeros_for:
            return torch.zeros(self.shapes[path])
        raise InputRefused(
            "The base has no tensor for a parameter of this task's model, and no adapter brings it",
            where=f"{self.checkpoint.path}: {path}",
            next_step="export the task the checkpoint was saved for (--task), or add the adapter with the head",
        )

    def grid_of(self, path: str) -> Grid | None:
        """How the integers of a linear map's weight lie; None for one that stays in floats."""
        grid = None if self.quantization is None else self.quantization.grid_of(path)
        if grid is None or self.quantization.method is not Method.AS_STORED:
            return grid
        return next((self.own.grids[each] for each in self.aliases.get(path, (path,)) if each in self.own.grids), None)

    def may_pack(self, paths: Iterable[str]) -> bool:
        """Whether weights may lie side by side in one that is quantized: those of the one grid that most have."""
        return self.quantization is None or all(self.grid_of(path) == self.quantization.grid for path in paths)

    def own_integers(self, path: str, how: Quantized) -> dict[Part, np.ndarray]:
        """The parameter at `path` as the checkpoint stores it, as `MatMulNBits` reads it."""
        name = self.stored_name(path)
        return as_stored(self.checkpoint.files.groups(name), self.checkpoint.files.integers(name), how)

    def served(self, path: str) -> torch.Tensor:
        """The base's parameter at `path` as the graph multiplies by it: where it is quantized, with its rounding.

        Raises:
            InputRefused: The checkpoint lacks it.
        """
        if self.quantization is None or path not in self.quantization.weights:
            return self.base(path)
        if self.quantization.method is Method.GIVEN:
            return self.base(path)  # nothing that is packed depends on it: see `given_graph._require_served`
        if self.quantization.method is Method.AS_STORED:
            files, name = self.checkpoint.files, self.stored_name(path)
            groups = files.groups(name)
            return replace(groups, scales=groups.scales.float()).values(files.integers(name))
        how = Quantized.of(self.quantization, Part.INTEGERS, self.dtype)
        weight = self.base(path).to(TORCH_DTYPES[self.dtype])
        is_in_out = path in self.in_out
        found = torch.from_numpy(as_served(as_numpy((weight if is_in_out else weight.T).contiguous()), how))
        return found if is_in_out else found.T

    def _refuse_not_finite(self, path: str, result: torch.Tensor) -> NoReturn:
        n_bad = int((~torch.isfinite(result)).sum())
        stored = self.stored_name(path) is None or bool(torch.isfinite(self.base(path)).all())
        raise InputRefused(
            f"A weight overflows {str(result.dtype).removeprefix('torch.')}" if stored else "A weight is not finite",
            where=f"{self.checkpoint.path}: {path}",
            found=f"{n_bad} of {result.numel()} elements are NaN or infinite",
            next_step="export with --dtype float32, or bfloat16 for --provider cuda"
            if stored
            else "fetch the checkpoint again",
        )

    def make_weight(self, recipe: Recipe, dtype: str) -> np.ndarray:
        """Evaluate `recipe`: a C-contiguous array of NumPy dtype `dtype`."""
        if dtype not in TORCH_DTYPES:  # an integer table
            return self.parameter(recipe.parameters[0], torch.float32).numpy()
        make = partial(self.parameter, dtype=TORCH_DTYPES[dtype], transposed=recipe.transposed)
        parts = [make(path) for path in recipe.parameters]
        return as_numpy((parts[0] if len(parts) == 1 else torch.cat(parts, dim=recipe.axis)).contiguous())

    def small_parameters(self, dtype: str, *, without: frozenset[str]) -> dict[str, np.ndarray]:
        """All parameters of at most one axis (norms, biases), by path, but those in `without`."""
        paths = [path for path, shape in self.shapes.items() if len(shape) <= 1 and path not in without]
        return {path: self.make_weight(Recipe((path,)), dtype) for path in paths}


# The bits of an exponent that is all ones, which only infinities and NaN have; and the integer type to read them in.
_EXPONENT_BITS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
}
_CHUNK_ELEMENTS = 1 << 22


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite, read off the exponents' bits a chunk at a time: several times as fast as
    `torch.isfinite(…).all()`, and without its temporaries, which for an embedding are the peak of an export."""
    integer, exponent = _EXPONENT_BITS[tensor.dtype]
    bits = tensor.contiguous().view(integer).reshape(-1)
    return all(int((chunk & exponent).max()) != exponent for chunk in bits.split(_CHUNK_ELEMENTS) if chunk.numel())


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 over names and bytes, in the order given."""
    state = hashlib.sha256()
    for name, array in arrays.items():
        state.update(name.encode())
        state.update(array.tobytes())
    return state.hexdigest()
