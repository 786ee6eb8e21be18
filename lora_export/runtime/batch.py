"""Run one batch on a session: at once, or row by row where its graph takes several new tokens of one row only."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from lora_export.contract import CacheLayout, GraphContract
from lora_export.errors import UsageProblem
from lora_export.runtime.arrays import lowest, run_values, to_ort_value
from lora_export.runtime.bank import Bank
from lora_export.runtime.cache import Cache
from lora_export.runtime.session import ProviderChoice
from lora_export.runtime.stacking import RowSpec


@dataclass(frozen=True)
class BatchRun:
    """What is asked of a graph for one batch.

    Attributes:
        inputs: All of the graph's inputs but its adapters', `[batch, …]`, and its past where `cache` holds that.
        rows: What each row runs; one entry serves every row.
        names: The outputs that are asked for.
        cache: The past of these rows, which the run adds its tokens to.
    """

    inputs: Mapping[str, np.ndarray]
    rows: tuple[RowSpec, ...]
    names: Sequence[str]
    cache: Cache | None = None


def run_batch(session: ort.InferenceSession, bank: Bank, asked: BatchRun) -> dict[str, np.ndarray]:
    """The outputs of a batch by name."""
    inputs, rows, cache = asked.inputs, asked.rows, asked.cache
    n_rows = len(next(iter(inputs.values())))
    if n_rows == 1 or not _goes_on_with_several(inputs, bank.contract):
        return _run(session, bank, asked)
    parts = [None] * n_rows if cache is None else cache.by_row()
    found = []
    for row, part in enumerate(parts):
        own = {
            name: array[row : row + 1] if array.ndim and len(array) == n_rows else array
            for name, array in inputs.items()
        }
        found.append(_run(session, bank, BatchRun(own, (rows[row % len(rows)],), asked.names, part)))
    if cache is not None:
        cache.length = parts[0].length
    return {name: np.concatenate([each[name] for each in found]) for name in asked.names}


class Runs:
    """The runs of a graph's session, as they come; any thread may ask.

    Attributes:
        session: ONNX Runtime's.
        alone: Held by whoever uses the device, where only one may.
        are_captured: Whether a shape that ran once is fast, and another one slow.
    """

    are_captured = False

    def __init__(self, session: ort.InferenceSession, contract: GraphContract, choice: ProviderChoice) -> None:
        self.session = session
        self._contract, self._choice, self._provider = contract, choice, choice.name
        self.alone: contextlib.AbstractContextManager = contextlib.nullcontext()

    def on(self, session: ort.InferenceSession) -> Runs:
        """The same on another session of the graph."""
        return Runs(session, self._contract, self._choice)

    def cache(self, batch: int, longest: int) -> Cache:
        """An empty cache for `batch` rows of at most `longest` tokens, padding included.

        Raises:
            UsageProblem: The graph has no cache.
        """
        return Cache(self._contract, self._provider, batch, longest=longest)

    def run(self, bank: Bank, asked: BatchRun) -> dict[str, np.ndarray]:
        """As `run_batch`."""
        return run_batch(self.session, bank, asked)


def _goes_on_with_several(inputs: Mapping[str, np.ndarray], contract: GraphContract) -> bool:
    """Whether each row goes on with several new tokens at once, which a `CacheLayout.TOKENS` graph takes of one row."""
    if contract.cache_layout is not CacheLayout.TOKENS or inputs["input_ids"].shape[1] == 1:
        return False
    return inputs["attention_mask"].shape[1] > inputs["input_ids"].shape[1]


def _run(session: ort.InferenceSession, bank: Bank, asked: BatchRun) -> dict[str, np.ndarray]:
    # Held until the run is over: on the CPU a binding reads the arrays' own memory.
    given = {name: to_ort_value(array, bank.provider) for name, array in asked.inputs.items()}
    with bank.lent(asked.rows) as lent:
        values = {**lent, **given}  # a host may feed an adapter input itself
        if asked.cache is None:
            return run_values(session, values, asked.names)
        return asked.cache.run(session, values, asked.names, n_new=asked.inputs["input_ids"].shape[1])


def require_equal_rows(inputs: Mapping[str, np.ndarray], rows: Sequence[RowSpec]) -> None:
    """A dual encoder's texts and images may differ in number, but not where each row has an adapter of its own."""
    sizes = {name: len(array) for name, array in inputs.items() if array.ndim}
    if len(rows) > 1 and len(set(sizes.values())) > 1:
        raise UsageProblem(
            "Adapters that differ by row need as many rows in every input",
            found=", ".join(f"{name}: {size}" for name, size in sizes.items()),
            next_step="name one adapter for the whole batch, or repeat the shorter input",
        )


def mask_padded_classes(
    results: Mapping[str, np.ndarray], contract: GraphContract, sizes: Mapping[str, Sequence[int]]
) -> None:
    """Set scores beyond a row's own classes, of which `sizes` are by the name of the size, to the lowest number."""
    for spec in contract.outputs:
        if spec.name in results and spec.dims[-1] in sizes:
            array = results[spec.name]
            for row, n_classes in enumerate(sizes[spec.dims[-1]]):
                array[row, ..., n_classes:] = lowest(array.dtype)
