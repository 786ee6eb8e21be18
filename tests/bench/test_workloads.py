"""What is timed has the shapes of the graph's inputs, whatever they are."""

from __future__ import annotations

import numpy as np

from lora_export.bench.workloads import random_inputs
from lora_export.contract import GraphContract, TensorSpec


def inputs_of(*specs: TensorSpec, sequence: int) -> dict[str, np.ndarray]:
    return random_inputs(GraphContract(specs, (), ()), 50, (2, sequence, 0))


def test_endings_have_an_axis_of_their_own():
    dims = ("batch_size", "num_choices", "sequence_length")
    names = ("input_ids", "attention_mask", "token_type_ids")
    found = inputs_of(*(TensorSpec(name, "int64", dims) for name in names), sequence=7)
    assert {name: array.shape for name, array in found.items()} == dict.fromkeys(names, (2, 4, 7))
    assert found["attention_mask"].all() and not found["token_type_ids"].any() and found["input_ids"].max() < 50


def test_sounds_are_as_many_samples():
    found = inputs_of(TensorSpec("input_values", "float32", ("batch_size", "num_samples")), sequence=900)
    assert found["input_values"].shape == (2, 900) and found["input_values"].dtype == np.float32
    fixed = inputs_of(TensorSpec("input_values", "float16", ("batch_size", 64, 16)), sequence=900)
    assert fixed["input_values"].shape == (2, 64, 16) and fixed["input_values"].dtype == np.float16
