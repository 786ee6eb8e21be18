"""Rows of different lengths, so that there is padding to get wrong."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def ragged(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`inputs` of texts padded on the left, each row cut to another length: the first to a share, the last not.

    Long texts are all cut to the same length, and a batch of those has no padding to get wrong.
    """
    mask = inputs["attention_mask"].copy()
    n_rows, length = mask.shape
    for row in range(n_rows):
        mask[row, : length - max(1, length * (row + 1) // n_rows)] = 0
    found = dict(inputs) | {"attention_mask": mask}
    if "position_ids" in inputs:
        found["position_ids"] = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return found
