"""The caches of a decoder's rows, which come and go one by one while others go on.

Two ways, by where a graph keeps a token (`CacheLayout`):

1. `SharedRows`, TOKENS: one buffer for all rows. A run takes rows that lie side by side, and writes into them. A row
   between them that has no new token runs as well, with a token that the row's next one overwrites. Steps that are
   captured in CUDA graphs take the first 1, 2, 4, 8, … rows, so that few captures are enough.
2. `LooseRows`, COLUMNS: a run returns the caches of its rows as new arrays. They are the past of the next run if that
   is of the same rows; else each row's part is copied to a new past, shorter rows filled up on the left.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from lora_export.contract import GATE_INPUT, LOGITS_TO_KEEP, CacheLayout, GraphContract, present_of
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.arrays import numpy_dtype
from lora_export.runtime.batch import BatchRun, mask_padded_classes
from lora_export.runtime.cache import Cache
from lora_export.runtime.host_inputs import completed_inputs, empty
from lora_export.runtime.stacking import RowSpec

_NO_ARRAYS: Mapping[str, np.ndarray] = MappingProxyType({})


@dataclass(frozen=True)
class NewTokens:
    """What a run adds to one row.

    Attributes:
        row: Its place.
        ids: One token or more.
        adapters: What the row runs.
        gate: Where the adapter is active, `[len(ids), 1]`; None where the graph has no gate.
    """

    row: int
    ids: Sequence[int]
    adapters: RowSpec
    gate: np.ndarray | None = None


class RowCache(ABC):
    """The caches of `n_rows` rows of at most `longest` tokens.

    Attributes:
        lengths: The tokens that each row has.
        can_move: Whether `move` works.
    """

    can_move = True

    def __init__(self, session: AdapterSession, n_rows: int, longest: int) -> None:
        self._session = session
        self.n_rows, self.longest = n_rows, longest
        self.lengths = [0] * n_rows

    @abstractmethod
    def run(self, new: Sequence[NewTokens]) -> np.ndarray:
        """The scores after each row's last new token, `[len(new), vocabulary]` in float32.

        Args:
            new: By row, from the lowest on. Several rows have one new token each, or all begin and lie side by side.
        """

    @abstractmethod
    def move(self, source: int, target: int) -> None:
        """Give what row `source` has to row `target`; `source` is free afterwards."""

    def free(self, row: int) -> None:
        self.lengths[row] = 0

    def _scores(
        self,
        new: Sequence[NewTokens | None],
        lengths: Sequence[int],
        rows: Sequence[RowSpec],
        *,
        cache: Cache | None = None,
        arrays: Mapping[str, np.ndarray] = _NO_ARRAYS,
    ) -> dict[str, np.ndarray]:
        """What the graph gives for one row for each of `new`; scores beyond a row's own classes are the lowest number.

        Args:
            new: None for a row that is run for its neighbours' sake.
            lengths: The tokens that each row has.
            cache: Their past; or else
            arrays: their past by input name, whose present is among the results.
        """
        session, bank = self._session, self._session.bank
        same = (rows[0],) if len(set(rows)) == 1 else tuple(rows)
        inputs = _inputs(session.contract, new, lengths, past=arrays)
        names = ["logits", *map(present_of, arrays)]
        results = session.runs.run(bank, BatchRun(inputs, same, names, cache))
        mask_padded_classes(results, session.contract, bank.classes(same))
        return results


class SharedRows(RowCache):
    """All rows in one buffer, written in place."""

    def __init__(self, session: AdapterSession, n_rows: int, longest: int) -> None:
        super().__init__(session, n_rows, longest)
        self._buffer = session.cache(n_rows, longest)
        self.can_move = session.provider == "cpu"
        # What a row last ran, so that a row that is run for its neighbours' sake changes no composition.
        self._adapters: list[RowSpec] = [()] * n_rows

    def run(self, new: Sequence[NewTokens]) -> np.ndarray:
        given = {each.row: each for each in new}
        span = self._span(new)
        for each in new:
            self._adapters[each.row] = each.adapters
        lengths = [self.lengths[row] for row in span]
        part = self._buffer.part(span[0], len(span), max(lengths))
        # A row that is free runs what another one does: it makes no mix of one adapter.
        is_free = [row not in given and not self.lengths[row] for row in span]
        adapters = [new[0].adapters if free else self._adapters[row] for row, free in zip(span, is_free, strict=True)]
        logits = self._scores([given.get(row) for row in span], lengths, adapters, cache=part)["logits"]
        for each in new:
            self.lengths[each.row] += len(each.ids)
        return logits[[each.row - span[0] for each in new], -1].astype(np.float32)

    def _span(self, new: Sequence[NewTokens]) -> range:
        """The rows to run: those from the first to the last, or a power of two of them where a step is captured."""
        first, end = new[0].row, new[-1].row + 1
        if self._session.runs.are_captured and all(len(each.ids) == 1 for each in new):
            return range(min(self.n_rows, 1 << (end - 1).bit_length()))
        return range(first, end)

    def move(self, source: int, target: int) -> None:
        self._buffer.copy_row(source, target, self.lengths[source])
        self._adapters[target], self.lengths[target] = self._adapters[source], self.lengths[source]
        self.free(source)

    def free(self, row: int) -> None:
        super().free(row)
        self._adapters[row] = ()


@dataclass(frozen=True)
class _Place:
    """Where a row's cache lies: the last columns of row `row` of `arrays`, `[batch, heads, columns, size]`."""

    arrays: dict[str, np.ndarray]
    row: int

    def last(self, name: str, n_columns: int) -> np.ndarray:
        array = self.arrays[name]
        return array[self.row, :, array.shape[2] - n_columns :]


class LooseRows(RowCache):
    """Each row's cache is a part of what the last run of the row returned."""

    def __init__(self, session: AdapterSession, n_rows: int, longest: int) -> None:
        super().__init__(session, n_rows, longest)
        nothing = {spec.name: empty(spec, 1) for spec in session.contract.past}
        self._nothing = _Place(nothing, 0)
        self._places = [self._nothing] * n_rows

    def run(self, new: Sequence[NewTokens]) -> np.ndarray:
        past = self._past([each.row for each in new])
        lengths = [self.lengths[each.row] for each in new]
        results = self._scores(new, lengths, [each.adapters for each in new], arrays=past)
        present = {name: results[present_of(name)] for name in past}
        for index, each in enumerate(new):
            self.lengths[each.row] += len(each.ids)
            self._places[each.row] = _Place(present, index)
        return results["logits"][:, -1].astype(np.float32)

    def _past(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """The caches of `rows` in one batch, each at the end of the columns."""
        places, lengths = [self._places[row] for row in rows], [self.lengths[row] for row in rows]
        first, longest = places[0].arrays, max(lengths)
        is_whole = all(place.arrays is first and place.row == index for index, place in enumerate(places))
        if is_whole and next(iter(first.values())).shape[:3:2] == (len(rows), longest):
            return first
        past = {}
        for name, array in self._nothing.arrays.items():
            _, heads, _, size = array.shape
            past[name] = np.zeros((len(rows), heads, longest, size), array.dtype)
            for index, (place, length) in enumerate(zip(places, lengths, strict=True)):
                past[name][index, :, longest - length :] = place.last(name, length)
        return past

    def move(self, source: int, target: int) -> None:
        self._places[target], self.lengths[target] = self._places[source], self.lengths[source]
        self.free(source)

    def free(self, row: int) -> None:
        super().free(row)
        self._places[row] = self._nothing


def rows_for(session: AdapterSession, n_rows: int, longest: int) -> RowCache:
    """The caches of `n_rows` rows in the way of the session's graph."""
    shared = session.contract.cache_layout is CacheLayout.TOKENS
    return (SharedRows if shared else LooseRows)(session, n_rows, longest)


def _inputs(
    contract: GraphContract, new: Sequence[NewTokens | None], lengths: Sequence[int], *, past: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The graph's own inputs: what a row has, and its new tokens, at the right of its columns."""
    n_past, n_new = max(lengths), max(len(each.ids) for each in new if each is not None)
    ids = np.zeros((len(new), n_new), np.int64)
    mask = np.zeros((len(new), n_past + n_new), np.int64)
    gate = np.ones((len(new), n_new, 1), np.float32)
    for row, (each, length) in enumerate(zip(new, lengths, strict=True)):
        tokens = [0] if each is None else each.ids
        mask[row, n_past - length : n_past] = mask[row, n_past + n_new - len(tokens) :] = 1
        ids[row, n_new - len(tokens) :] = tokens
        if each is not None and each.gate is not None:
            gate[row, n_new - len(tokens) :] = each.gate
    given = {"input_ids": ids, "attention_mask": mask, **past}
    if any(spec.name == LOGITS_TO_KEEP for spec in contract.optional_inputs):
        given[LOGITS_TO_KEEP] = np.array(1)
    inputs = completed_inputs(given, contract, None if past else n_past)
    if contract.gate is not None:
        inputs[GATE_INPUT] = gate.astype(numpy_dtype(contract.gate.dtype))
    return inputs
