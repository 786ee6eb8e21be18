"""Inputs of a given shape for timing: random tokens or pixels, every position real, a cache of a given length."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from lora_export.bench.shapes import Shape
from lora_export.contract import DECODER_WITH_PAST, ENCODER, LOGITS_TO_KEEP, PAST, SINGLE, GraphContract, TensorSpec
from lora_export.runtime.arrays import numpy_dtype

_SEED = 0
_CHOICES = 4
# Images and sounds: every axis but the rows is the graph's own, or as long as the shape says.
DENSE = ("pixel_values", "input_values", "input_features")


def size_of(spec: TensorSpec, shape: Shape) -> tuple[int | str, ...]:
    """The size of the array for an input of a graph; of multiple choice, four endings each."""
    batch, sequence, past = shape
    if spec.name == LOGITS_TO_KEEP:
        return spec.dims
    if spec.name == "attention_mask" and past:
        return (batch, past + sequence)
    if spec.name.startswith(PAST):
        # As many heads, of the size, as the graph says; one that does not say is left as it is.
        _, heads, _, head_size = spec.dims if len(spec.dims) == 4 else ("", "", "", "")
        return (batch, heads, past, head_size)
    if spec.name in DENSE:
        return (batch, *(dim if isinstance(dim, int) else sequence for dim in spec.dims[1:]))
    return (batch, _CHOICES, sequence) if len(spec.dims) == 3 else (batch, sequence)


def random_inputs(contract: GraphContract, vocabulary: int, shape: Shape) -> dict[str, np.ndarray]:
    """The graph's own inputs by name, `batch` rows of `sequence` new tokens on `past` cached ones (or of images, or
    of as many samples).

    An input of a name has the same values in every graph, in the dtype that the graph takes.
    """
    return {
        spec.name: _values(spec, size_of(spec, shape), vocabulary=vocabulary, shape=shape).astype(
            numpy_dtype(spec.dtype)
        )
        for spec in contract.inputs
    }


def _values(spec: TensorSpec, size: tuple[int, ...], *, vocabulary: int, shape: Shape) -> np.ndarray:
    _, sequence, past = shape
    rng = np.random.default_rng([_SEED, zlib.crc32(spec.name.encode())])
    if spec.name == "input_ids":
        return rng.integers(0, vocabulary, size)
    if spec.name == "attention_mask":
        return np.ones(size, np.int64)
    if spec.name == "position_ids":
        return np.broadcast_to(np.arange(past, past + sequence), size)
    if spec.name.startswith(PAST) or spec.name in DENSE:
        return rng.standard_normal(size)
    return np.zeros(size, np.int64)


def workload_inputs(
    graphs: Mapping[str, GraphContract], vocabulary: int, shape: Shape
) -> dict[str, dict[str, np.ndarray]]:
    """The inputs of one run by graph: of an encoder-decoder, the encoder over `batch` sources of `sequence` tokens, and
    one step of the decoder on `past` targets."""
    if SINGLE in graphs:
        return {SINGLE: random_inputs(graphs[SINGLE], vocabulary, shape)}
    batch, sequence, past = shape
    rng = np.random.default_rng(_SEED)
    lengths = {"encoder_sequence_length": sequence, "past_decoder_sequence_length": past, "decoder_sequence_length": 1}
    sizes = lengths | {"batch_size": batch}
    found: dict[str, dict[str, np.ndarray]] = {}
    for graph in (ENCODER, DECODER_WITH_PAST):
        found[graph] = {}
        for spec in graphs[graph].inputs:
            dims = [dim if isinstance(dim, int) else sizes[dim] for dim in spec.dims]
            if spec.name == "input_ids":
                array = rng.integers(0, vocabulary, dims)
            elif spec.name.endswith("attention_mask"):
                array = np.ones(dims, np.int64)
            else:
                array = rng.standard_normal(dims).astype(numpy_dtype(spec.dtype))
            found[graph][spec.name] = array
    return found


def source_length(graphs: Mapping[str, GraphContract], sequence: int) -> int:
    """The encoder's length for a source of `sequence` tokens: the model's own where it is fixed (speech)."""
    length = graphs[ENCODER].outputs[0].dims[1] if ENCODER in graphs else sequence
    return length if isinstance(length, int) else sequence
