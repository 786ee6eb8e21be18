"""Run a graph for values inside it: a model in memory whose weights stay in the export's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lora_export.runtime.arrays import run_arrays
from lora_export.runtime.session import open_session


def run_for_values(
    model: bytes, folder: Path, provider: str, *, feeds: Mapping[str, np.ndarray], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """The outputs `names` of `model` for `feeds`, as `AdapterSession.feeds` makes them.

    Args:
        model: A serialized model whose external weights lie in `folder`. Nothing is written.

    Raises:
        EnvironmentUnusable: The provider cannot run the model.
    """
    session = open_session(model, provider, weights=folder)
    return run_arrays(session, provider, feeds, names=names)
