"""`CapturedRuns`: runs of a session that are captured in CUDA graphs, one for each shape, and replayed.

A replay launches the captured kernels on the addresses that they were captured with, whatever is bound. So everything
has a place of its own: inputs, outputs, and the adapters of a number of rows. Those are picked into it from the
device's bank (`device_rows`); heads are copied. A run writes its inputs and what is other of its adapters, replays, and
copies the outputs.

A capture is of a bucket, which is the shapes of the inputs and the outputs that are asked for, and of the places of the
adapters, which are others when their largest rank is another. One run is under way at a time: captures share the memory
of what lies between inputs and outputs.

Of a decoder whose cache is one buffer, steps of one new token a row are captured. A step's mask grows with its past,
and the length of the mask is a number on the CPU, which a capture keeps. So the mask is given for the whole buffer:
ones for what a row has, and a one in the last column for its new token. Where the ones of the past stand makes no
difference (`graph/token_order.py` counts them). ONNX Runtime GenAI captures its steps in this way, too.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnxruntime as ort

from lora_export.contract import CacheLayout, GraphContract
from lora_export.errors import UsageProblem
from lora_export.runtime.arrays import numpy_dtype, onnx_element_type, to_array, to_ort_value
from lora_export.runtime.bank import Bank
from lora_export.runtime.batch import BatchRun, run_batch
from lora_export.runtime.cache import Cache
from lora_export.runtime.composition import Stack, Values
from lora_export.runtime.device_bank import is_head
from lora_export.runtime.device_memory import allocate, views_of
from lora_export.runtime.host_inputs import MASK, TOKEN_IDS
from lora_export.runtime.session import ProviderChoice
from lora_export.runtime.stacking import RowSpec

# ONNX Runtime keeps a capture for as long as its session lives.
MOST_CAPTURES = 64
# The run option that names a capture, and its value for a run that is not captured.
GRAPH_ID, NOT_CAPTURED = "gpu_graph_id", "-1"


def refuse_capture(contract: GraphContract, choice: ProviderChoice) -> None:
    """Refuse what is known not to be captured.

    Raises:
        UsageProblem: The provider is not CUDA, or the graph returns a cache of another length at every step.
    """
    if choice.name != "cuda":
        raise UsageProblem(
            "A CUDA graph is captured on the CUDA provider only",
            where="cuda_graph",
            found=f"{choice.name}, {choice.reason}",
            next_step="leave out cuda_graph",
        )
    if contract.past and contract.cache_layout is not CacheLayout.TOKENS:
        raise UsageProblem(
            "A decoder whose past and present are no single buffer is not captured in a CUDA graph",
            where="cuda_graph",
            found="each of its steps returns another, longer cache",
            next_step="leave out cuda_graph",
        )


def step_mask(mask: np.ndarray, longest: int) -> np.ndarray:
    """The mask `[batch, longest]` of a step of one new token a row, for `mask` `[batch, past + 1]`."""
    whole = np.zeros((len(mask), longest), mask.dtype)
    whole[:, : mask.shape[1] - 1], whole[:, -1] = mask[:, :-1], mask[:, -1]
    return whole


class _Place:
    """A place on the device for arrays of one shape and dtype."""

    def __init__(self, array: np.ndarray, provider: str, session: ort.InferenceSession) -> None:
        view = views_of(allocate(max(1, array.nbytes), provider), provider, session)
        self.value = view(0, array.shape, onnx_element_type(array.dtype.name))
        self._bytes = view(0, [array.nbytes], np.uint8) if array.nbytes else None

    def write(self, array: np.ndarray) -> None:
        if self._bytes is not None:
            self._bytes.update_inplace(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


@dataclass
class _Capture:
    """What a capture was bound to; its kernels write `outputs`."""

    binding: ort.IOBinding
    outputs: Mapping[str, ort.OrtValue]
    options: ort.RunOptions


@dataclass
class _Adapters:
    """The adapters of a number of rows: their places on the device, and a number for these places."""

    stack: Stack
    values: Values
    places: int


@dataclass
class _Bucket:
    """Inputs of the same shapes: their places, and the captures by the places of adapters and cache."""

    inputs: Mapping[str, _Place]
    constants: Values
    captures: dict[tuple, _Capture] = field(default_factory=dict)


class CapturedRuns:
    """The runs of `session`, which captures; any thread may ask.

    Args:
        session: Opened with `cuda_graph`, of the graph of `contract`.

    Attributes:
        n_captures: How many there are.

    Raises:
        UsageProblem: Its runs cannot be captured.
    """

    def __init__(self, session: ort.InferenceSession, contract: GraphContract, choice: ProviderChoice) -> None:
        refuse_capture(contract, choice)
        self._session, self._provider = session, choice.name
        self._uncaptured = _Uncaptured(session)
        self._running = threading.Lock()
        self._buckets: dict[tuple, _Bucket] = {}
        self._adapters: dict[int, _Adapters] = {}  # by the number of rows
        self._heads: dict[tuple, _Place] = {}
        self._places: dict[tuple, int] = {(): 0}
        self.n_captures = 0

    def run(self, bank: Bank, asked: BatchRun) -> dict[str, np.ndarray]:
        """As `run_batch`.

        Raises:
            UsageProblem: ONNX Runtime cannot capture the graph, or the cache has no room for the new tokens.
        """
        with self._running:
            cache = asked.cache
            is_step = cache is not None and asked.inputs[TOKEN_IDS].shape[1] == 1
            capture = self._written(bank, asked) if is_step or not bank.contract.past else None
            if capture is None:
                return run_batch(self._uncaptured, bank, asked)
            self._session.run_with_iobinding(capture.binding, capture.options)
            if cache is not None:
                cache.length += 1
            return self._copied(capture.outputs)

    def _written(self, bank: Bank, asked: BatchRun) -> _Capture | None:
        """The capture for a run, all of whose inputs are in their places; None if there are enough others."""
        inputs, names, cache = asked.inputs, asked.names, asked.cache
        if cache is not None:
            cache.require_room(1)
            inputs = {**inputs, MASK: step_mask(inputs[MASK], cache.longest)}
        is_full = self.n_captures >= MOST_CAPTURES
        bucket = self._bucket_of(inputs, names, is_full=is_full)
        if bucket is None:
            return None
        for name, place in bucket.inputs.items():
            place.write(inputs[name])
        adapters, number = self._placed(bank, asked.rows)
        key = (number, cache and cache.address)
        if key not in bucket.captures:
            if is_full:
                return None
            fed = {**adapters, **bucket.constants, **{name: place.value for name, place in bucket.inputs.items()}}
            bucket.captures[key] = self._captured(fed, names, cache)
        return bucket.captures[key]

    def _bucket_of(self, inputs: Mapping[str, np.ndarray], names: Sequence[str], *, is_full: bool) -> _Bucket | None:
        # What has no axis is a number that shapes are made of, on the CPU: it is part of a capture.
        numbers = {name: array for name, array in inputs.items() if not array.ndim}
        tensors = {name: array for name, array in inputs.items() if array.ndim}
        shapes = tuple((name, array.shape, array.dtype.name) for name, array in tensors.items())
        key = (shapes, tuple((name, array.item()) for name, array in numbers.items()), tuple(names))
        if key not in self._buckets and not is_full:
            places = {name: _Place(array, self._provider, self._session) for name, array in tensors.items()}
            constants = {name: to_ort_value(array.copy(), "cpu") for name, array in numbers.items()}
            self._buckets[key] = _Bucket(places, constants)
        return self._buckets.get(key)

    def _placed(self, bank: Bank, rows: tuple[RowSpec, ...]) -> tuple[Values, int]:
        """The adapters of `rows` in their places, and these places' number."""
        if not any(rows):
            return bank.constant_inputs, 0
        found = self._adapters.get(len(rows))
        if found is None:
            found = self._adapters[len(rows)] = _Adapters(bank.compositions.new_stack(heads_on="cpu"), {}, 0)
        if found.stack.rows != rows or not found.places:
            found.places = 0  # until all is written
            found.stack.write(rows)
            heads = {entry.name for entry in bank.contract.adapter_inputs if is_head(entry)}
            written = found.stack.values
            values = {name: self._head(name, value) if name in heads else value for name, value in written.items()}
            found.values = {**bank.constant_inputs, **values}
            key = tuple((name, value.data_ptr(), *value.shape()) for name, value in values.items())
            found.places = self._places.setdefault(key, len(self._places))
        return found.values, found.places

    def _head(self, name: str, value: ort.OrtValue) -> ort.OrtValue:
        array = to_array(value)
        key = (name, array.shape)
        if key not in self._heads:
            self._heads[key] = _Place(array, self._provider, self._session)
        self._heads[key].write(array)
        return self._heads[key].value

    def _captured(self, fed: Values, names: Sequence[str], cache: Cache | None) -> _Capture:
        """A capture of a run of `fed`, which was run."""
        binding = self._session.io_binding()
        for name, value in fed.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, self._provider)
        if cache is not None:
            cache.bind(binding)
        # A run that is not captured says how large the outputs are, and makes the places for them.
        self._uncaptured.run_with_iobinding(binding)
        outputs = dict(zip(names, binding.get_outputs()[: len(names)], strict=True))
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        self.n_captures += 1
        options = _options(str(self.n_captures))
        try:
            self._session.run_with_iobinding(binding, options)
        except RuntimeError as error:
            raise UsageProblem(
                "ONNX Runtime cannot capture this graph in a CUDA graph",
                where="cuda_graph",
                found=str(error).splitlines()[0],
                next_step="leave out cuda_graph",
            ) from error
        return _Capture(binding, outputs, options)

    def _copied(self, outputs: Mapping[str, ort.OrtValue]) -> dict[str, np.ndarray]:
        """Outputs as arrays that no later run changes."""
        found = {}
        for name, value in outputs.items():
            if value.data_type() == "tensor(bfloat16)":
                raw = views_of(value, self._provider, self._session)(0, value.shape(), np.int16).numpy()
                array = raw.view(numpy_dtype("bfloat16"))
            else:
                array = value.numpy()
            found[name] = array.copy() if self._provider == "cpu" else array
        return found


class _Uncaptured:
    """A session that captures, as one that does not."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session, self._options = session, _options(NOT_CAPTURED)

    def io_binding(self) -> ort.IOBinding:
        return self._session.io_binding()

    def run_with_iobinding(self, binding: ort.IOBinding) -> None:
        self._session.run_with_iobinding(binding, self._options)


def _options(graph_id: str) -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry(GRAPH_ID, graph_id)
    return options
