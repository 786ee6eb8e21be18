"""Run a graph for values inside it: a model in memory whose weights stay in the export's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from lora_export.runtime.arrays import to_array, to_ort_value
from lora_export.runtime.session import open_session


def run_for_values(
    model: bytes, folder: Path, provider: str, feeds: Mapping[str, np.ndarray], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """The outputs `names` of `model` for `feeds`, as `AdapterSession.feeds` makes them.

    Args:
        model: A serialized model whose external weights lie in `folder`. Nothing is written.

    Raises:
        EnvironmentUnusable: The provider cannot run the model.
    """
    session = open_session(model, provider, weights=folder)
    held = {name: to_ort_value(array, provider) for name, array in feeds.items()}
    binding: ort.IOBinding = session.io_binding()
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for name in names:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    return {name: to_array(value) for name, value in zip(names, binding.get_outputs(), strict=True)}
