"""Rows are cut to different lengths, on the left."""

from __future__ import annotations

import numpy as np

from lora_export.check.inputs.ragged import ragged


def test_rows_of_one_length_are_cut_to_different_ones_on_the_left():
    mask = np.ones((4, 8), np.int64)
    inputs = {"input_ids": np.arange(32).reshape(4, 8), "attention_mask": mask, "position_ids": mask.cumsum(axis=1) - 1}
    found = ragged(inputs)
    assert found["attention_mask"].sum(axis=1).tolist() == [2, 4, 6, 8]
    assert found["position_ids"][0].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    assert (found["input_ids"] == inputs["input_ids"]).all() and mask.all(), "the inputs are left as they were"


def test_a_row_that_is_short_already_keeps_its_tokens():
    mask = np.array([[0, 0, 0, 1], [1, 1, 1, 1]])
    assert ragged({"attention_mask": mask})["attention_mask"].tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]
    assert ragged({"attention_mask": np.ones((3, 2), np.int64)})["attention_mask"].sum(axis=1).tolist() == [1, 1, 2]
