"""Match the modules of a graph with the calls of PyTorch, and compare what they are given and give on one row."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_export.check.divergence_results import ComparedValue
from lora_export.check.judge.measures import scale_of
from lora_export.check.reference.module_calls import BASE, LORA_A, WHOLE, ModuleCall
from lora_export.graph.module_values import ModuleSite, WrittenGraph

INPUT = "input"


@dataclass(frozen=True)
class BatchRow:
    """Which numbers of an array are the row's.

    Attributes:
        index, n_rows: The row in the graph's batch; the reference runs it alone.
        real: Its real positions `[length]` in the reference; None where nothing is padded.
        n_last: How many positions, the last, the graph computes where the rest is in its cache; None for all.
        tokens_first: Whether the graph may compute the real positions before the others (`CacheLayout.TOKENS`).
    """

    index: int
    n_rows: int
    real: np.ndarray | None = None
    n_last: int | None = None
    tokens_first: bool = False

    def of_graph(self, array: np.ndarray) -> np.ndarray:
        """The row's part of a value of the graph: of a leading axis of the batch, or of batch and tokens in one."""
        if self.n_rows == 1 or array.ndim == 0 or array.shape[0] == 1 or array.shape[0] % self.n_rows:
            return array
        n_each = array.shape[0] // self.n_rows
        return array[n_each * self.index : n_each * (self.index + 1)]

    def of_reference(self, array: np.ndarray) -> np.ndarray:
        """What the graph computes of a tensor `[1, length, …]` or `[1, heads, length, …]` of the reference."""
        axis = self._position_axis(array)
        if self.n_last is None or axis is None:
            return array
        return np.take(array, range(array.shape[axis] - self.n_last, array.shape[axis]), axis)

    def orders(self) -> tuple[BatchRow, ...]:
        """The row in the orders of positions that a value of the graph may have."""
        if self.real is None or not self.tokens_first:
            return (self,)
        new = self.real if self.n_last is None else self.real[-self.n_last :]
        first = np.concatenate([self.real[: len(self.real) - len(new)], np.sort(new)[::-1]])
        return self, replace(self, real=first)

    def real_of(self, array: np.ndarray) -> np.ndarray:
        """The real positions of an array that has the reference's shape after `of_reference`.

        Of scores `[1, heads, length, length]`, those of real positions for real positions.
        """
        if self.real is None:
            return array
        for axis in range(int(array.ndim > 0 and array.shape[0] == 1), array.ndim):
            for real in (self.real, self.real if self.n_last is None else self.real[-self.n_last :]):
                if array.shape[axis] == len(real) and not real.all():
                    array = np.compress(real, array, axis)
                    break
        return array

    def _position_axis(self, array: np.ndarray) -> int | None:
        if self.real is None:
            return None
        # A tensor without a row axis (a bias by position) starts with the positions that are asked from.
        axes = (0,) if array.ndim and array.shape[0] > 1 else _POSITION_AXES.get(array.ndim, ())
        return next((axis for axis in axes if array.shape[axis] == len(self.real)), None)


# Where a tensor of so many axes has its positions: [1, length], [1, length, n], [1, heads, length, n], [1, length, …].
_POSITION_AXES = {2: (1,), 3: (1,), 4: (2, 1)}
# What masks use for "not at all": any number beyond stands for it.
_NEVER = 1e30


@dataclass(frozen=True)
class Match:
    """A value of the graph, with another added to it if need be, and the tensor that it should hold; `call` is the
    module's, `terms` the size of what one number of `expected` is the sum of (None where that is unknown)."""

    call: ModuleCall
    what: str
    value: str
    expected: np.ndarray
    addend: str | None = None
    terms: float | None = None

    @property
    def values(self) -> tuple[str, ...]:
        return (self.value,) if self.addend is None else (self.value, self.addend)

    def found(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        first, *more = (values[name] for name in self.values)
        return sum((array.astype(np.float32) for array in more), first)


def match(sites: Sequence[ModuleSite], calls: Sequence[ModuleCall], available: Mapping[str, object]) -> list[Match]:
    """Match the uses of modules in a graph with their calls, in the order of the calls.

    The n-th use of a module is its n-th call. A weight that is tied has one name in the graph: a lookup is of an
    embedding, a product of another module with the same weight.

    Args:
        available: Values of the graph (its inputs and those of its nodes).
    """
    by_module = defaultdict(list)
    for call in calls:
        by_module[call.module, call.part].append(call)
    uses: Counter[str] = Counter()
    order = {id(call): index for index, call in enumerate(calls)}
    found: list[tuple[int, int, Match]] = []
    for site in sites:
        module = _called(site, by_module)
        if module is None:
            continue
        number = uses[module]
        uses[module] += 1
        wholes = by_module[module, WHOLE]
        if number >= len(wholes) or (not site.named and wholes[number].weight is None):
            continue
        call = wholes[number]
        rank = order[id(call)]
        expected = call.output - call.bias if site.bias_is_pending and call.bias is not None else call.output
        expected = expected if site.scale == 1 else expected * np.float32(site.scale)
        if site.input in available and not call.is_lookup and _is_floating(call.input):
            found.append((rank, 0, Match(call, INPUT, site.input, call.input)))
        # Of a merged module the product alone is no longer the base's, nor is it of a pair that is served otherwise.
        served = site.parts if site.has_pair and by_module.get((module, LORA_A)) else {}
        for place, (part, value) in enumerate(served.items(), 1):
            parts = by_module[module, part]
            if len(parts) == len(wholes):
                inside = parts[number]
                is_later = part == BASE and inside.bias is not None and not site.base_has_bias
                tensor = inside.output - inside.bias if is_later else inside.output
                found.append((rank, place, Match(call, part, value, tensor, terms=inside.terms)))
        found.append((rank, 9, Match(call, WHOLE, site.output, expected, site.addend, call.terms)))
    return [each for _, _, each in sorted(found, key=lambda entry: entry[:2])]


def _called(site: ModuleSite, by_module: Mapping[tuple[str, str], list[ModuleCall]]) -> str | None:
    """The path of the module that `site` is a use of: its own, or that of a module with the same weight."""
    paths = (site.module, site.named)
    named = [by_module[path, WHOLE][0] for path in paths if by_module.get((path, WHOLE))]
    if named and (not site.named or named[0].is_lookup == site.is_lookup):
        return named[0].module
    weights = {call.weight for call in named} - {None}
    for (path, part), calls in by_module.items():
        if part == WHOLE and calls and calls[0].weight in weights and calls[0].is_lookup == site.is_lookup:
            return path
    return None


def _is_floating(array: np.ndarray | None) -> bool:
    return array is not None and np.issubdtype(array.dtype, np.floating)


def compare_values(
    graph: WrittenGraph,
    stem: str,
    matches: Iterable[Match],
    *,
    values: Mapping[str, np.ndarray],
    row: BatchRow,
    limit: float,
) -> list[ComparedValue]:
    """Compare each match on `row`; more than `limit`, relative to the reference's size (`scale_of`), diverges."""
    return [
        compare_value(
            graph,
            stem,
            p.call.module,
            what=p.what,
            value=p.value,
            expected=p.expected,
            found=p.found(values),
            row=row,
            limit=limit,
            terms=p.terms,
        )
        for p in matches
    ]


def compare_value(
    graph: WrittenGraph,
    stem: str,
    module: str,
    *,
    what: str,
    value: str,
    expected: np.ndarray,
    found: np.ndarray,
    row: BatchRow,
    limit: float,
    terms: float | None,
) -> ComparedValue:
    """Compare one value of the graph with its tensor of the reference, up to reshape.

    Args:
        terms: The size of the terms that one number of `expected` is the sum of; None where that is unknown.
    """
    expected, found = row.of_reference(expected), row.of_graph(found)
    node = graph.node_of(value)
    shapes = tuple(found.shape), tuple(expected.shape)
    error, relative = difference(expected, _brought_to(expected, found, what), row, terms=terms)
    names = (node.name, node.op_type) if node else ("", "")
    return ComparedValue(stem, module, what, value, *names, *shapes, error, relative, not relative <= limit)


def _brought_to(expected: np.ndarray, found: np.ndarray, what: str) -> np.ndarray:
    """`found` without what a mixed batch pads it with: the ranks of a pair, the classes of a head."""
    n = expected.shape[-1] if expected.ndim else 0
    if (
        found.size == expected.size
        or not found.ndim
        or found.shape[-1] <= n
        or found.size * n != (expected.size * found.shape[-1])
    ):
        return found
    rest = found[..., n:].astype(np.float32)
    is_padding = not rest.any() if what == LORA_A else bool((rest < -1e4).all())
    return found[..., :n] if is_padding else found


def difference(
    expected: np.ndarray, found: np.ndarray, row: BatchRow, *, terms: float | None = None
) -> tuple[float, float]:
    """The largest absolute difference over real positions, and that over the expected values' size (`scale_of`).

    Infinite where the sizes differ; NaN where a number is NaN, infinite or a mask's lowest number on one side only.
    """
    if expected.size != found.size:
        return float("inf"), float("inf")
    a = row.real_of(expected).astype(np.float64)
    arranged = [order.real_of(found.reshape(expected.shape)).astype(np.float64) for order in row.orders()]
    errors = [_difference(a, b, terms) for b in arranged]
    return min(errors, key=lambda error: error[1] if error[1] == error[1] else np.inf)


def _difference(a: np.ndarray, b: np.ndarray, terms: float | None) -> tuple[float, float]:
    plain = np.abs(a) < _NEVER
    if not (_special(a[~plain]) == _special(b[~plain])).all() or not (np.abs(b[plain]) < _NEVER).all():
        return float("nan"), float("nan")
    a, b = a[plain], b[plain]
    error = float(np.abs(a - b).max(initial=0))
    return error, error / max(scale_of(a, terms), float(np.finfo(np.float32).tiny))


def _special(array: np.ndarray) -> np.ndarray:
    """0 for NaN, and for what is beyond all scores its sign."""
    return np.where(np.isnan(array), 0.0, np.where(np.abs(array) < _NEVER, np.inf, np.sign(array)))
