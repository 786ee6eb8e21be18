"""Inputs of a given shape for timing: random tokens or pixels, every position real, a cache of a given length."""

from __future__ import annotations

import numpy as np

from lora_export.contract import GraphContract
from lora_export.runtime.arrays import numpy_dtype

_SEED = 0


def random_inputs(
    contract: GraphContract, vocabulary: int, batch: int, sequence: int, past: int
) -> dict[str, np.ndarray]:
    """The graph's own inputs by name, `batch` rows of `sequence` new tokens on `past` cached ones (or of images)."""
    rng = np.random.default_rng(_SEED)
    found = {}
    for spec in contract.inputs:
        dtype = numpy_dtype(spec.dtype)
        if spec.name == "input_ids":
            found[spec.name] = rng.integers(0, vocabulary, (batch, sequence))
        elif spec.name == "attention_mask":
            found[spec.name] = np.ones((batch, past + sequence), np.int64)
        elif spec.name == "position_ids":
            found[spec.name] = np.tile(np.arange(past, past + sequence), (batch, 1))
        elif spec.name.startswith("past_key_values."):
            found[spec.name] = rng.standard_normal((batch, spec.dims[1], past, spec.dims[3])).astype(dtype)
        elif spec.name == "pixel_values":
            found[spec.name] = rng.standard_normal((batch, *spec.dims[1:])).astype(dtype)
        else:
            found[spec.name] = np.zeros((batch, sequence), np.int64)
    return found
