"""`CapturedRuns`: runs of a session that are captured in CUDA graphs, one for each shape, and replayed.

A replay launches the captured kernels on the addresses of the capture, whatever is bound. So everything has a place of
its own: inputs, outputs, and the adapters of a number of rows. The adapters are picked into their place from the
device's bank (`device_rows`); heads are copied. A run writes its inputs and the adapters that changed, replays, and
copies the outputs.

A capture belongs to a bucket and to the places of the adapters. A bucket is the shapes of the inputs, and which outputs
are asked for. The adapters get other places when their largest rank changes. One run is under way at a time, as all
captures share the memory between inputs and outputs. ONNX Runtime keeps the captures of each thread apart.

Of a decoder whose cache is one buffer, steps of one new token a row are captured. A step's mask grows with its past,
and its length is a number on the CPU, which a capture keeps. So the mask is given for the whole buffer: ones for what a
row has, and a one in the last column for its new token. It makes no difference where the ones of the past stand, as
`graph/token_order.py` counts them. ONNX Runtime GenAI captures its steps in this way, too.

The buckets of a cache live as long as its buffers. The buffers go on to the next cache of their size, so the next text
replays what the text before it has captured.
"""

from __future__ import annotations

import itertools
import math
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort

from lora_export.contract import CacheLayout, GraphContract
from lora_export.errors import UsageProblem
from lora_export.runtime.arrays import numpy_dtype, to_ort_value
from lora_export.runtime.bank import Bank
from lora_export.runtime.batch import BatchRun, Runs, run_batch
from lora_export.runtime.cache import Buffers, Cache
from lora_export.runtime.captured_places import AdapterPlaces, Place
from lora_export.runtime.composition import Values
from lora_export.runtime.device_memory import views_of
from lora_export.runtime.host_inputs import MASK, TOKEN_IDS
from lora_export.runtime.positions import n_positions
from lora_export.runtime.session import ProviderChoice

# ONNX Runtime keeps a capture for as long as its session lives.
MOST_CAPTURES = 64
# A cache has room for a multiple of these tokens, so that texts of almost one length have captures in common.
_TOKENS_AT_ONCE = 256
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


@dataclass
class _Capture:
    """What a capture was bound to; its kernels write `outputs`."""

    binding: ort.IOBinding
    outputs: Mapping[str, ort.OrtValue]
    options: ort.RunOptions


@dataclass
class _Bucket:
    """Inputs of the same shapes: their places, and the captures by the places of adapters and the thread."""

    inputs: Mapping[str, Place]
    constants: Values
    captures: dict[tuple[int, object], _Capture] = field(default_factory=dict)


class CapturedRuns(Runs):
    """The runs of `session`, which captures; any thread may ask.

    Args:
        session: Opened with `cuda_graph`, of the graph of `contract`.
        folder: The export's.

    Attributes:
        n_captures: How many were made.

    Raises:
        UsageProblem: Its runs cannot be captured.
    """

    are_captured = True

    def __init__(
        self, session: ort.InferenceSession, contract: GraphContract, choice: ProviderChoice, *, folder: Path
    ) -> None:
        refuse_capture(contract, choice)
        super().__init__(session, contract, choice)
        self.alone = threading.Lock()
        self._most_tokens = n_positions(folder)
        self._uncaptured = _Uncaptured(session)
        # By whose captures they are: a cache's buffers, or this.
        self._buckets: weakref.WeakKeyDictionary[object, dict[tuple, _Bucket]] = weakref.WeakKeyDictionary()
        self._adapters = AdapterPlaces(self._provider, session)
        self._idle: deque[Buffers] = deque(maxlen=1)  # of the cache that went last
        self._numbers, self._own, self._is_said = itertools.count(1), threading.local(), False
        self.n_captures = 0

    def cache(self, batch: int, longest: int) -> Cache:
        """A cache for `batch` rows of at most `longest` tokens, in the buffers of one that is gone if these suffice."""
        most = math.inf if self._most_tokens is None else self._most_tokens
        room = int(max(longest, min(math.ceil(longest / _TOKENS_AT_ONCE) * _TOKENS_AT_ONCE, most)))
        with self.alone:
            buffers = self._idle.pop() if self._idle else None
            if buffers is not None and (buffers.batch < batch or not room <= buffers.room <= max(room, most)):
                buffers = None  # given back before others are asked for
            if buffers is None and self._contract.past:
                buffers = Buffers.of(self._contract, self._provider, batch=batch, room=room)
            cache = Cache(self._contract, self._provider, batch, longest=longest, buffers=buffers)
        weakref.finalize(cache, self._idle.append, cache.buffers).atexit = False
        return cache

    def run(self, bank: Bank, asked: BatchRun) -> dict[str, np.ndarray]:
        """As `run_batch`, captured and replayed.

        Raises:
            UsageProblem: ONNX Runtime cannot capture the graph, or the cache has no room for the new tokens.
        """
        with self.alone:
            cache = asked.cache
            is_step = cache is not None and asked.inputs[TOKEN_IDS].shape[1] == 1
            capture = self._written(bank, asked) if is_step or not bank.contract.past else None
            if capture is None:
                return run_batch(self._uncaptured, bank, asked)
            self.session.run_with_iobinding(capture.binding, capture.options)
            if cache is not None:
                cache.length += 1
            return copies(capture.outputs, self._provider, self.session)

    def _written(self, bank: Bank, asked: BatchRun) -> _Capture | None:
        """The capture for a run, all of whose inputs are in their places; None if there are enough others."""
        inputs, cache = asked.inputs, asked.cache
        if cache is not None:
            cache.require_room(1)
            inputs = {**inputs, MASK: step_mask(inputs[MASK], cache.buffers.room)}
        buckets = self._buckets.setdefault(self if cache is None else cache.buffers, {})
        key = _bucket_key(inputs, asked)
        bucket = buckets.get(key)
        if bucket is None:
            if not self._may_capture():
                return None
            bucket = self._bucket(inputs)
        else:
            for name, place in bucket.inputs.items():
                place.write(inputs[name])
        adapters, number = self._adapters.write(bank, asked.rows)
        capture = bucket.captures.get((number, self._thread()))
        if capture is None:
            if not self._may_capture():
                return None
            fed = {**adapters, **bucket.constants, **{name: place.value for name, place in bucket.inputs.items()}}
            capture = self._captured(fed, asked.names, cache)
            # Kept once it is captured: a run that fails leaves nothing.
            bucket.captures[number, self._thread()] = capture
            buckets[key] = bucket
        return capture

    def _may_capture(self) -> bool:
        if self.n_captures < MOST_CAPTURES:
            return True
        if not self._is_said:
            self._is_said = True
            what = f"A session has {MOST_CAPTURES} CUDA graphs, which is the most: other shapes run without, and slower"
            warnings.warn(what, RuntimeWarning, stacklevel=2)
        return False

    def _thread(self) -> object:
        """What stands for the thread that asks; the system's numbers of threads are used again."""
        if not hasattr(self._own, "token"):
            self._own.token = object()
        return self._own.token

    def _bucket(self, inputs: Mapping[str, np.ndarray]) -> _Bucket:
        # What has no axis is a number that shapes are made of, on the CPU: it is part of a capture.
        numbers = {name: to_ort_value(array.copy(), "cpu") for name, array in inputs.items() if not array.ndim}
        tensors = {name: array for name, array in inputs.items() if array.ndim}
        places = {name: Place(array, self._provider, self.session) for name, array in tensors.items()}
        for name, place in places.items():
            place.write(tensors[name])
        return _Bucket(places, numbers)

    def _captured(self, fed: Values, names: Sequence[str], cache: Cache | None) -> _Capture:
        """A capture of a run of `fed`, which was run."""
        binding = self.session.io_binding()
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
        options = _options(str(next(self._numbers)))
        try:
            self.session.run_with_iobinding(binding, options)
        except RuntimeError as error:  # the same run has just worked uncaptured
            raise UsageProblem(
                "ONNX Runtime did not capture a run in a CUDA graph",
                where="cuda_graph",
                found=str(error).splitlines()[0],
                next_step="let nothing else use the GPU while a shape runs for the first time, or leave out cuda_graph",
            ) from error
        self.n_captures += 1
        return _Capture(binding, outputs, options)


def copies(outputs: Values, provider: str, session: ort.InferenceSession) -> dict[str, np.ndarray]:
    """Outputs on `provider`'s device as arrays that no later run changes; `session` is any that runs there."""
    found = {}
    for name, value in outputs.items():
        if value.data_type() == "tensor(bfloat16)":
            raw = views_of(value, provider, session)(0, value.shape(), np.int16).numpy()
            array = raw.view(numpy_dtype("bfloat16"))
        else:
            array = value.numpy()
        found[name] = array.copy() if provider == "cpu" else array
    return found


def _bucket_key(inputs: Mapping[str, np.ndarray], asked: BatchRun) -> tuple:
    """What the runs of a bucket have in common: shapes, numbers on the CPU, outputs, and rows of the cache."""
    shapes = tuple((name, array.shape, array.dtype.name) for name, array in inputs.items() if array.ndim)
    numbers = tuple((name, array.item()) for name, array in inputs.items() if not array.ndim)
    first_row = asked.cache.first_row if asked.cache is not None else 0
    return shapes, numbers, tuple(asked.names), first_row


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
