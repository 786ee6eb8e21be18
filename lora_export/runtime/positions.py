"""How many tokens a text may have, by the configuration beside an export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lora_export.errors import UsageProblem
from lora_export.reading import CONFIG, model_settings, size_in
from lora_export.runtime.host_inputs import MASK


def n_positions(folder: Path) -> int | None:
    """The most tokens of a text that the model of the export in `folder` was made for; None if nothing says."""
    return size_in(model_settings(folder), "max_position_embeddings", "n_positions", where=folder / CONFIG)


@contextlib.contextmanager
def told_if_too_long(inputs: Mapping[str, np.ndarray], folder: Path) -> Iterator[None]:
    """Where ONNX Runtime fails on a batch that is longer than the model's positions, say so.

    Some graphs take a longer text all the same, so it is not refused before.

    Raises:
        UsageProblem: It failed, and the attention mask `[batch, total]` is longer.
    """
    try:
        yield
    except Exception as error:  # ONNX Runtime's errors have no class of their own
        mask, longest = inputs.get(MASK), n_positions(folder)
        if mask is None or longest is None or mask.shape[-1] <= longest:
            raise
        raise UsageProblem(
            "The texts are longer than the model's positions",
            where=MASK,
            expected=f"at most {longest} tokens, padding and what is cached included",
            found=str(mask.shape[-1]),
        ) from error
