"""Memory on a device, and rows of a table picked there by ONNX Runtime's Gather.

ONNX Runtime brings no copy from one place of a device to another, so a graph of one node does it. It is written here
byte by byte, as onnx need not be installed where an export runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import onnxruntime as ort

from lora_export.runtime.session import open_session

# The words in which rows are copied, the longest first, and ONNX's numbers of them (TensorProto.DataType).
_WORDS = {np.dtype(np.int64): 7, np.dtype(np.int32): 6, np.dtype(np.int16): 5}
# Places in a table are int64.
PLACE_BYTES = np.dtype(np.int64).itemsize
_INT64, _IR_VERSION, _OPSET = 7, 10, 20
# Gather on CUDA counts its blocks in float32, which is exact up to here, and reckons places in a table in int32
# (`GatherImpl` and `_GatherKernel` of ONNX Runtime's core/providers/cuda/tensor/gather_impl.cu).
_MOST_WORDS_AT_ONCE = 2**24
MOST_WORDS_OF_A_TABLE = 2**31 - 1


def word_of(row_bytes: int) -> np.dtype:
    """The longest word that rows of `row_bytes` are made of."""
    return next(word for word in _WORDS if row_bytes % word.itemsize == 0)


# What gives a part of a buffer as a value, from its first byte, shape and ONNX Runtime's element type.
Views = Callable[[int, Sequence[int], type | int], ort.OrtValue]


def allocate(n_bytes: int, provider: str) -> ort.OrtValue:
    """A buffer of `n_bytes`, more than 0, of any content, on `provider`'s device."""
    return ort.OrtValue.ortvalue_from_shape_and_type([n_bytes], np.uint8, provider, 0)


def views_of(memory: ort.OrtValue, provider: str, session: ort.InferenceSession) -> Views:
    """Parts of `memory`, which keep it alive.

    Args:
        session: Any that runs on `provider`: ONNX Runtime makes a value of an address for a binding only.
    """
    binding, start = session.io_binding(), memory.data_ptr()
    name = session.get_outputs()[0].name

    def view(first_byte: int, shape: Sequence[int], element_type: type | int) -> ort.OrtValue:
        binding.bind_output(name, provider, 0, element_type, shape, start + first_byte)
        (value,) = binding.get_outputs()
        value.memory = memory  # which the value itself does not own
        return value

    return view


class DeviceMemory:
    """Buffers on `provider`'s device; not for several threads at a time."""

    def __init__(self, provider: str) -> None:
        self._provider = provider
        self._sessions: dict[np.dtype, ort.InferenceSession] = {}

    def allocate(self, n_bytes: int) -> ort.OrtValue:
        """As `allocate`."""
        return allocate(n_bytes, self._provider)

    def views(self, memory: ort.OrtValue) -> Views:
        """As `views_of`."""
        return views_of(memory, self._provider, self._session(next(iter(_WORDS))))

    def gather(
        self, *, table: ort.OrtValue, row_bytes: int, places: ort.OrtValue, n: int, target: int, first: int = 0
    ) -> list[Callable[[], None]]:
        """Runs that copy rows of `table` one after another to the address `target`; they keep no memory alive.

        Args:
            table: As many rows of `row_bytes` as fit.
            places: int64: which rows; `n` of them from the `first`.

        Raises:
            ValueError: A row is longer than Gather copies without an error.
        """
        word = word_of(row_bytes)
        n_words, n_rows = row_bytes // word.itemsize, table.tensor_size_in_bytes() // row_bytes
        if n_words > _MOST_WORDS_AT_ONCE:
            raise ValueError(f"a row of {row_bytes:,} bytes is longer than ONNX Runtime's Gather copies")
        at_once, session, runs = _MOST_WORDS_AT_ONCE // n_words, self._session(word), []
        for done in range(0, n, at_once):
            m = min(at_once, n - done)
            binding = session.io_binding()
            where = (self._provider, 0)
            binding.bind_input("table", *where, word.type, [n_rows, n_words], table.data_ptr())
            binding.bind_input("places", *where, np.int64, [m], places.data_ptr() + (first + done) * PLACE_BYTES)
            binding.bind_output("rows", *where, word.type, [m, n_words], target + done * row_bytes)
            runs.append(functools.partial(session.run_with_iobinding, binding))
        return runs

    def _session(self, word: np.dtype) -> ort.InferenceSession:
        if word not in self._sessions:
            graph = gather_graph(_WORDS[word])
            self._sessions[word] = open_session(graph, self._provider, n_threads=1, stop_spinning=True)
        return self._sessions[word]


def gather_graph(element_type: int) -> bytes:
    """A serialized ModelProto: `rows [n, words] = Gather(table [table_rows, words], places [n])`.

    Args:
        element_type: Of table and rows, as TensorProto.DataType numbers it.
    """
    node = b"".join([_field(1, "table"), _field(1, "places"), _field(2, "rows"), _field(4, "Gather")])
    inputs = [_value("table", element_type, "table_rows", "words"), _value("places", _INT64, "n")]
    output = _value("rows", element_type, "n", "words")
    graph = [_field(1, node), _field(2, "rows"), *(_field(11, each) for each in inputs), _field(12, output)]
    return _field(1, _IR_VERSION) + _field(7, b"".join(graph)) + _field(8, _field(2, _OPSET))


def _value(name: str, element_type: int, *dims: str) -> bytes:
    """A ValueInfoProto."""
    shape = b"".join(_field(1, _field(2, dim)) for dim in dims)
    return _field(1, name) + _field(2, _field(1, _field(1, element_type) + _field(2, shape)))


def _field(number: int, content: int | str | bytes) -> bytes:
    """A field of a protobuf message: a number as a varint, all else with its length before it."""
    if isinstance(content, int):
        return _varint(number << 3) + _varint(content)
    data = content.encode() if isinstance(content, str) else content
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the highest bit says that more follow."""
    head = bytearray()
    while number > 127:
        head.append(number & 127 | 128)
        number >>= 7
    return bytes([*head, number])
