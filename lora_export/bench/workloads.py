"""Inputs of a given shape for timing: random tokens or pixels, every position real, a cache of a given length."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lora_export.bench.shapes import Shape
from lora_export.contract import DECODER_WITH_PAST, ENCODER, SINGLE, GraphContract
from lora_export.runtime.arrays import numpy_dtype

_SEED = 0
_CHOICES = 4


def random_inputs(contract: GraphContract, vocabulary: int, shape: Shape) -> dict[str, np.ndarray]:
    """The graph's own inputs by name, `batch` rows of `sequence` new tokens on `past` cached ones (or of images, or
    of as many samples); of multiple choice, four endings each."""
    batch, sequence, past = shape
    rng = np.random.default_rng(_SEED)
    found = {}
    for spec in contract.inputs:
        dtype = numpy_dtype(spec.dtype)
        of_tokens = (batch, _CHOICES, sequence) if len(spec.dims) == 3 else (batch, sequence)
        if spec.name == "input_ids":
            found[spec.name] = rng.integers(0, vocabulary, of_tokens)
        elif spec.name == "attention_mask" and past == 0:
            found[spec.name] = np.ones(of_tokens, np.int64)
        elif spec.name == "attention_mask":
            found[spec.name] = np.ones((batch, past + sequence), np.int64)
        elif spec.name == "position_ids":
            found[spec.name] = np.tile(np.arange(past, past + sequence), (batch, 1))
        elif spec.name.startswith("past_key_values."):
            found[spec.name] = rng.standard_normal((batch, spec.dims[1], past, spec.dims[3])).astype(dtype)
        elif spec.name in ("pixel_values", "input_values"):
            sizes = (dim if isinstance(dim, int) else sequence for dim in spec.dims[1:])
            found[spec.name] = rng.standard_normal((batch, *sizes)).astype(dtype)
        else:
            found[spec.name] = np.zeros(of_tokens, np.int64)
    return found


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
