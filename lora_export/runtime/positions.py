"""How many tokens a text may have, by the configuration beside an export."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lora_export.errors import LoraExportError, UsageProblem
from lora_export.reading import CONFIG, model_settings, size_in
from lora_export.runtime.host_inputs import MASK, TOKEN_IDS

# What ONNX Runtime says of a table that has too few rows: inside the attention, of a lookup, and where it was cut.
_ROTARY = re.compile("cos_cache dimension 0 shall not be less")
_LOOKUP = re.compile("indices element out of data bounds")
_CUT = re.compile("Attempting to broadcast an axis by a dimension other than 1")


def n_positions(folder: Path) -> int | None:
    """The most tokens of a text that the model of the export in `folder` was made for; None if nothing says."""
    return size_in(model_settings(folder), "max_position_embeddings", "n_positions", where=folder / CONFIG)


@contextlib.contextmanager
def told_if_too_long(inputs: Mapping[str, np.ndarray], folder: Path) -> Iterator[None]:
    """Say so where ONNX Runtime fails because a batch is longer than a table of positions.

    No text is refused before it runs, as some graphs take longer ones than the configuration says.

    Raises:
        UsageProblem: It failed so.
    """
    try:
        yield
    except LoraExportError:
        raise
    except Exception as error:  # ONNX Runtime's errors have no class of their own
        mask = inputs.get(MASK)
        if mask is None or not _is_of_positions(str(error), inputs, folder):
            raise
        raise UsageProblem(
            "The texts are longer than the model has positions",
            where=MASK,
            expected=f"at most {n_positions(folder)} tokens, padding and what is cached included; some models keep the "
            "first positions for padding",
            found=f"{mask.shape[-1]} tokens",
        ) from error


def _is_of_positions(said: str, inputs: Mapping[str, np.ndarray], folder: Path) -> bool:
    """Whether ONNX Runtime says that a table has too few rows, and it is not that of the tokens."""
    if _ROTARY.search(said):
        return True
    ids = inputs.get(TOKEN_IDS)
    try:
        vocabulary, longest = size_in(model_settings(folder), "vocab_size", where=folder / CONFIG), n_positions(folder)
    except LoraExportError:  # a damaged configuration, which says nothing of this
        return False
    known = ids is not None and vocabulary is not None and ids.min() >= 0 and ids.max() < vocabulary
    if not known or longest is None:
        return False
    return bool(_LOOKUP.search(said) or (_CUT.search(said) and inputs[MASK].shape[-1] > longest))
