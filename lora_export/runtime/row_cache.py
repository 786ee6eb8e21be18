"""The caches of a decoder's rows, which come and go one by one while others go on.

Two ways, by where a graph keeps a token (`CacheLayout`):

1. `SharedRows`, TOKENS: one buffer for all rows. A run takes rows that lie side by side, and writes into them. A row
   between them that has no new token is run too, with a token that the row's next one writes over.
2. `LooseRows`, COLUMNS: a run returns the caches of its rows as new arrays. They are the past of the next run if that
   is of the same rows; else each row's part is copied to a new past, shorter rows filled up on the left.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_export.contract import GATE_INPUT, CacheLayout
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.arrays import lowest
from lora_export.runtime.batch import run_batch
from lora_export.runtime.cache import present_of
from lora_export.runtime.host_inputs import completed_inputs, empty
from lora_export.runtime.stacking import RowSpec


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

    def _scores(self, inputs: dict[str, np.ndarray], rows: tuple[RowSpec, ...], names: Sequence[str], cache=None):
        """What the graph gives for `inputs`; scores beyond a row's own classes are the lowest number."""
        session, bank = self._session, self._session.bank
        results = run_batch(session.session, bank, inputs, rows, names, cache=cache)
        for sizes in bank.classes(rows).values():
            for row, n_classes in enumerate(sizes):
                results["logits"][row, :, n_classes:] = lowest(results["logits"].dtype)
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
        span = range(new[0].row, new[-1].row + 1)
        for each in new:
            self._adapters[each.row] = each.adapters
        n_past = max(self.lengths[row] for row in span)
        n_new = max(len(each.ids) for each in new)
        ids = np.zeros((len(span), n_new), np.int64)
        mask = np.zeros((len(span), n_past + n_new), np.int64)
        gate = np.ones((len(span), n_new, 1), np.float32)
        for index, row in enumerate(span):
            tokens = given[row].ids if row in given else [0]
            ids[index, : len(tokens)] = tokens
            mask[index, : self.lengths[row]] = 1
            mask[index, n_past : n_past + len(tokens)] = 1
            if row in given and given[row].gate is not None:
                gate[index, : len(tokens)] = given[row].gate
        inputs = _own_inputs(self._session, {"input_ids": ids, "attention_mask": mask}, gate, n_past)
        rows = _one_if_equal([self._adapters[row] for row in span])
        part = self._buffer.part(span[0], len(span), n_past)
        logits = self._scores(inputs, rows, ["logits"], part)["logits"]
        for each in new:
            self.lengths[each.row] += len(each.ids)
        last = [logits[each.row - span[0], len(each.ids) - 1] for each in new]
        return np.stack(last).astype(np.float32)

    def move(self, source: int, target: int) -> None:
        self._buffer.copy_row(source, target, self.lengths[source])
        self._adapters[target] = self._adapters[source]
        self.lengths[target], self.lengths[source] = self.lengths[source], 0


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
        n_past = next(iter(past.values())).shape[2]
        n_new = max(len(each.ids) for each in new)
        ids = np.zeros((len(new), n_new), np.int64)
        mask = np.zeros((len(new), n_past + n_new), np.int64)
        gate = np.ones((len(new), n_new, 1), np.float32)
        for index, each in enumerate(new):
            ids[index, n_new - len(each.ids) :] = each.ids
            mask[index, n_past - self.lengths[each.row] : n_past] = 1
            mask[index, n_past + n_new - len(each.ids) :] = 1
            if each.gate is not None:
                gate[index, n_new - len(each.ids) :] = each.gate
        inputs = _own_inputs(self._session, {"input_ids": ids, "attention_mask": mask, **past}, gate)
        names = ["logits", *map(present_of, past)]
        results = self._scores(inputs, _one_if_equal([each.adapters for each in new]), names)
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


def _own_inputs(
    session: AdapterSession, given: dict[str, np.ndarray], gate: np.ndarray, n_cached: int | None = None
) -> dict[str, np.ndarray]:
    inputs = completed_inputs(given, session.contract, n_cached)
    if session.contract.gate is not None:
        inputs[GATE_INPUT] = gate.astype(session.contract.gate.dtype)
    return inputs


def _one_if_equal(rows: Sequence[RowSpec]) -> tuple[RowSpec, ...]:
    return (rows[0],) if len(set(rows)) == 1 else tuple(rows)
