"""`Cache`: the keys and values of the tokens that a decoder has seen, kept where its session runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from lora_export.contract import CacheLayout, GraphContract, TensorSpec, present_of
from lora_export.errors import UsageProblem
from lora_export.runtime.arrays import memory_of, numpy_dtype, onnx_element_type, run_bound


@dataclass(frozen=True, eq=False)
class Buffers:
    """Keys and values where a session runs, `[batch, kv_heads, room, head_size]` by input name; zeros at first.

    A cache that takes them over from another one finds there what that one wrote. Its own rows' masks leave that out.
    """

    values: Mapping[str, ort.OrtValue]
    batch: int
    room: int

    @classmethod
    def of(cls, contract: GraphContract, provider: str, *, batch: int, room: int) -> Buffers:
        return cls({spec.name: _zeros(spec, batch, room, provider=provider) for spec in contract.past}, batch, room)


class Cache:
    """What a decoder keeps of a batch's tokens between its runs.

    Where the graph allows it (`CacheLayout.TOKENS`), past and present are one buffer for `longest` tokens a row, and a
    run writes its new tokens into it. Otherwise the present of a run is kept as it is and is the past of the next.

    Args:
        batch: The number of rows.
        longest: The most tokens that a row will have, padding included.
        buffers: For `batch` rows of at least `longest` tokens, where past and present are one; None for new ones.

    Attributes:
        buffers: Where the rows lie.
        first_row: The first of them there.

    Raises:
        UsageProblem: The graph has no cache.
    """

    def __init__(
        self, contract: GraphContract, provider: str, batch: int, *, longest: int, buffers: Buffers | None = None
    ) -> None:
        if not contract.past:
            raise UsageProblem("The graph has no cache", expected="a decoder for text generation")
        self.batch, self.longest, self.length = batch, longest, 0
        self._provider, self._past = provider, contract.past
        self._is_shared = contract.cache_layout is CacheLayout.TOKENS
        self.buffers = buffers or Buffers.of(contract, provider, batch=batch, room=longest if self._is_shared else 0)
        self._values = self.buffers.values
        self.first_row = 0
        self._whole: Cache | None = None  # which this is a part of: while there is one, its buffers serve no other

    def by_row(self) -> list[Cache]:
        """Each row's part of a shared buffer, as a cache that goes on in it."""
        return [self.part(row, 1, self.length) for row in range(self.batch)]

    def part(self, first_row: int, n_rows: int, length: int) -> Cache:
        """Some rows of a shared buffer, as a cache of `length` tokens that goes on in it."""
        part = copy.copy(self)
        part.batch, part.first_row, part.length = n_rows, self.first_row + first_row, length
        part._whole = self
        return part

    def copy_row(self, source: int, target: int, n_tokens: int) -> None:
        """Copy the first `n_tokens` of row `source` of a shared buffer on the CPU to row `target`."""
        for value in self._values.values():
            rows = memory_of(value)
            rows[target, :, :n_tokens] = rows[source, :, :n_tokens]

    def run(
        self, session: ort.InferenceSession, values: Mapping[str, ort.OrtValue], names: Sequence[str], *, n_new: int
    ) -> dict[str, np.ndarray]:
        """The outputs `names` of a run with `n_new` new tokens a row, which this cache then has too.

        Raises:
            UsageProblem: There is no room for them.
        """
        self.require_room(n_new)
        binding = session.io_binding()
        for name in names:
            binding.bind_output(name)
        self.bind(binding)
        results = run_bound(session, binding, values, names=names)
        self.length += n_new
        if not self._is_shared:
            present = binding.get_outputs()[len(names) :]
            self._values = {spec.name: value for spec, value in zip(self._past, present, strict=True)}
        return results

    def require_room(self, n_new: int) -> None:
        """Refuse more new tokens a row than there is room for.

        Raises:
            UsageProblem: There is no room for them.
        """
        if self.length + n_new > self.longest:
            raise UsageProblem(
                "The cache has no room for the new tokens",
                expected=f"at most {self.longest} tokens a row, padding included",
                found=f"{self.length} and {n_new} new ones",
            )

    def bind(self, binding: ort.IOBinding) -> None:
        """Bind past and present of the next run."""
        for spec in self._past:
            self._bind(binding, spec)

    def _bind(self, binding: ort.IOBinding, spec: TensorSpec) -> None:
        value, present = self._values[spec.name], present_of(spec.name)
        if not self._is_shared:
            binding.bind_ortvalue_input(spec.name, value)
            binding.bind_output(present, self._provider)
            return
        shape = [self.batch, *value.shape()[1:]]
        n_bytes = numpy_dtype(spec.dtype).itemsize * math.prod(shape[1:])
        place = value.data_ptr() + self.first_row * n_bytes
        where = (self._provider, 0, onnx_element_type(spec.dtype), shape, place)
        binding.bind_input(spec.name, *where)
        binding.bind_output(present, *where)


def output_names(contract: GraphContract, cache: Cache | None) -> list[str]:
    """The outputs of a run but those that `cache` keeps."""
    held = set() if cache is None else {present_of(spec.name) for spec in contract.past}
    return [spec.name for spec in contract.outputs if spec.name not in held]


def with_room(inputs: Mapping[str, np.ndarray], contract: GraphContract) -> dict[str, np.ndarray]:
    """`inputs` of a run whose cache, if past and present may be one buffer, has slots for the new tokens too."""
    if contract.cache_layout is not CacheLayout.TOKENS:
        return dict(inputs)
    n_new = inputs["input_ids"].shape[1]
    room = [(0, 0), (0, 0), (0, n_new), (0, 0)]
    names = {spec.name for spec in contract.past}
    return {name: np.pad(array, room) if name in names else array for name, array in inputs.items()}


def written_in_place(contract: GraphContract, values: Mapping[str, ort.OrtValue]) -> dict[str, ort.OrtValue]:
    """The outputs of a run that are written into its inputs `values`, by name: the present, where past may hold it."""
    shared = contract.past if contract.cache_layout is CacheLayout.TOKENS else ()
    return {present_of(spec.name): values[spec.name] for spec in shared}


def _zeros(spec: TensorSpec, batch: int, n_slots: int, *, provider: str) -> ort.OrtValue:
    """`[batch, heads, n_slots, size]`."""
    shape = [batch, spec.dims[1], n_slots, spec.dims[3]]
    if spec.dtype == "bfloat16":
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, onnx_element_type(spec.dtype), provider, 0)
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, numpy_dtype(spec.dtype)), provider, 0)
