"""Compositions kept from run to run are what stacking anew gives, and no run sees another's rows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interleave import under_load
from references import inputs_for

from lora_export.contract import AdapterInput, AdapterInputKind, GraphContract
from lora_export.errors import UsageProblem
from lora_export.runtime import bank as bank_module
from lora_export.runtime import host_rows as module
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.composition import Compositions
from lora_export.runtime.held_adapter import HeldAdapter
from lora_export.runtime.stacking import stack_rows

IN, OUT = 4, 3
Q_A, Q_B, V_A, V_B = "q.lora_A.weight", "q.lora_B.weight", "v.lora_A.weight", "v.lora_B.weight"
GAIN, HEAD, HEAD_BIAS = "q.lora_magnitude", "head.weight", "head.bias"
IDS, DELTA = "emb.token_ids", "emb.token_delta"
DEFAULTS = {HEAD: np.full((1, OUT, 2), 7, np.float32), HEAD_BIAS: np.full((1, 1, 2), 8, np.float32)}


def _contract() -> GraphContract:
    def entry(name: str, kind: AdapterInputKind, *dims, dtype: str = "float32") -> AdapterInput:
        return AdapterInput(name, name.partition(".")[0], kind, dtype, ("rows", *dims))

    kinds = AdapterInputKind
    return GraphContract((), (), (
        entry(Q_A, kinds.LORA_A, IN, "q.rank"), entry(Q_B, kinds.LORA_B, "q.rank", OUT), entry(GAIN, kinds.GAIN, 1, OUT),
        entry(V_A, kinds.LORA_A, IN, "v.rank"), entry(V_B, kinds.LORA_B, "v.rank", OUT),
        entry(HEAD, kinds.WEIGHT, OUT, "head.out_features"), entry(HEAD_BIAS, kinds.BIAS, 1, "head.out_features"),
        entry(IDS, kinds.TOKEN_IDS, "n_tokens", dtype="int64"), entry(DELTA, kinds.TOKEN_DELTA, "n_tokens", IN),
    ))  # fmt: skip


CONTRACT = _contract()
# The rank's axis, or that of the tokens, may be longer than the rows need.
AXES = {Q_A: 2, Q_B: 1, V_A: 2, V_B: 1, IDS: 1, DELTA: 1}


def adapter(name: str, seed: int, *, q: int = 0, v: int = 0, gain: bool = False, head: int = 0, n_tokens: int = 0):
    rng = np.random.default_rng(seed)

    def drawn(*shape: int) -> np.ndarray:
        return rng.standard_normal((1, *shape)).astype(np.float32)

    tensors = {}
    for rank, names in ((q, (Q_A, Q_B)), (v, (V_A, V_B))):
        if rank:
            tensors |= dict(zip(names, (drawn(IN, rank), drawn(rank, OUT)), strict=True))
    if gain:
        tensors[GAIN] = drawn(1, OUT)
    if head:
        tensors |= {HEAD: drawn(OUT, head), HEAD_BIAS: drawn(1, head)}
    if n_tokens:
        tensors |= {IDS: rng.integers(0, 9, (1, n_tokens)), DELTA: drawn(n_tokens, IN)}
    return HeldAdapter(name, tensors)


ADAPTERS = [
    adapter("r1", 1, q=1), adapter("r5", 2, q=5, v=2, gain=True), adapter("v3", 3, v=3), adapter("head", 4, q=2, head=4),
    adapter("one class", 5, head=1), adapter("tokens", 6, n_tokens=3, q=1), adapter("r2", 7, q=2, v=2), adapter("none", 8),
]  # fmt: skip
PAIRS = [each for each in ADAPTERS if HEAD not in each.names]
ROW = st.one_of(
    st.just(()),
    st.sampled_from(ADAPTERS).map(lambda one: ((one, 1.0),)),
    st.lists(st.tuples(st.sampled_from(PAIRS), st.sampled_from([0.5, -2.0])), unique_by=lambda part: part[0].name, max_size=2).map(tuple),
)  # fmt: skip
BATCHES = st.lists(st.lists(ROW, min_size=1, max_size=5), min_size=1, max_size=8)


def stacked(rows) -> dict[str, np.ndarray]:
    tensors = {each: each.tensors for row in rows for each, _ in row}
    return stack_rows(CONTRACT, tensors, rows, defaults=DEFAULTS)


def require_equal(found: Mapping, rows) -> None:
    expected = stacked(rows)
    arrays = {name: value.numpy() for name, value in found.items()}
    for name, array in expected.items():
        given = arrays.pop(name)
        assert given.dtype == array.dtype
        if name in AXES:
            n = array.shape[AXES[name]]
            given, rest = np.split(given, [n], AXES[name])
            assert (rest == (-1 if name == IDS else 0)).all()
        np.testing.assert_array_equal(given, array)
    # Rank 0 for every row that is left of a larger one is as good as no input.
    assert all(name in AXES and (array == (-1 if name == IDS else 0)).all() for name, array in arrays.items())


# In place on the host, and picked from a bank as on another device.
WAYS = pytest.mark.parametrize("banked", [False, True], ids=["host", "bank"])


@WAYS
@given(batches=BATCHES)
@settings(max_examples=100, deadline=None)
def test_one_composition_after_another_is_as_stacked_anew(banked, batches):
    made = Compositions(CONTRACT, "cpu", DEFAULTS, banked=banked)
    for rows in batches:
        with made.of(tuple(rows)) as values:
            require_equal(values, rows)


@WAYS
@given(batches=BATCHES, data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_composition_that_is_read_is_not_written(banked, batches, data):
    """Runs begin and end in any order; each sees its rows until its end."""
    made, running = Compositions(CONTRACT, "cpu", DEFAULTS, banked=banked), []
    for rows in batches:
        context = contextlib.ExitStack()
        running.append((rows, context, context.enter_context(made.of(tuple(rows)))))
        for begun, _, values in running:
            require_equal(values, begun)
        if data.draw(st.booleans()):
            running.pop(data.draw(st.integers(0, len(running) - 1)))[1].close()
    for _, context, _ in running:
        context.close()
    assert len(made._stacks) <= 2


@pytest.fixture
def blendings(monkeypatch) -> list:
    """The rows that are made, and for which input."""
    found, value_of = [], module.value_of

    def counted(entry, row, default):
        found.append((entry.name, row))
        return value_of(entry, row, default)

    monkeypatch.setattr(module, "value_of", counted)
    return found


def row(index: int, weight: float = 1.0):
    return ((ADAPTERS[index], weight),)


def test_only_the_row_that_changed_is_written(blendings):
    made = Compositions(CONTRACT, "cpu", DEFAULTS)
    for rows, written in (
        ((row(1), row(6), row(6), ()), 5 * 4),
        ((row(1), row(6), row(6), ()), 0),
        ((row(1), row(6), row(0), ()), 2 + 2),  # the gain is at its default in both
        ((row(1), row(6), row(0)), 0),
        ((row(1), row(6), row(0), ()), 0),
        ((row(6), row(6), row(0), ()), 4),  # no row has a gain any more
        ((row(1), row(6), row(0), ()), 4),  # whose buffer still has it
        ((row(1), row(6), row(2), ()), 2 + 2 * 4),  # a larger rank
    ):
        blendings.clear()
        with made.of(rows) as values:
            require_equal(values, rows)
        assert len(blendings) == written, rows


@WAYS
def test_one_adapter_for_the_batch_is_fed_as_it_is_held(banked):
    made = Compositions(CONTRACT, "cpu", DEFAULTS, banked=banked)
    for _ in range(2):
        with made.of((row(1),)) as values:
            assert values[Q_A].data_ptr() == ADAPTERS[1].tensors[Q_A].ctypes.data
    assert not made._stacks


@WAYS
def test_a_hundred_mixes_in_turn_go_through_the_same_memory(banked):
    made, places = Compositions(CONTRACT, "cpu", DEFAULTS, banked=banked), set()
    rng = np.random.default_rng(0)
    with made.of((row(1),) * 3 + ((),)):
        pass
    for _ in range(100):
        rows = tuple(row(int(index)) for index in rng.permutation([0, 1, 2, 6]))
        with made.of(rows) as values:
            require_equal(values, rows)
            places.add(values[Q_A].data_ptr())
    assert len(places) <= 2


@WAYS
def test_a_large_rank_is_forgotten_after_a_while(banked):
    made = Compositions(CONTRACT, "cpu", DEFAULTS, banked=banked)
    with made.of((row(0), row(1))):
        pass
    ranks = []
    for n in range(70):
        with made.of((row(0), row(0, 1 + n))) as values:
            ranks.append(values[Q_A].numpy().shape[2])
    assert ranks[0] == 5 and ranks[-1] == 1 and sorted(ranks, reverse=True) == ranks


@WAYS
def test_a_blend_that_is_refused_leaves_nothing_behind(banked):
    made = Compositions(CONTRACT, "cpu", DEFAULTS, banked=banked)
    first = (row(1), row(3), row(6))
    wrong = (row(6), ((ADAPTERS[3], 0.5), (ADAPTERS[4], 0.5)), row(0))
    with made.of(first):
        pass
    for rows in (first, wrong, first, (row(6), row(3), row(0)), first):
        if rows is wrong:
            with pytest.raises(UsageProblem, match="heads of different sizes"), made.of(rows):
                pass
        else:
            with made.of(rows) as values:
                require_equal(values, rows)


@WAYS
def test_memory_of_its_own_is_not_written(banked):
    made = Compositions(CONTRACT, "cpu", DEFAULTS, banked=banked)
    values = made.alone((row(1), row(6)))
    for rows in ((row(6), row(1)), (row(2), row(0))):
        with made.of(rows):
            require_equal(values, (row(1), row(6)))


@WAYS
def test_every_thread_gets_the_answer_of_its_own_rows(banked, exports, monkeypatch):
    """Each thread asks for another mix in turn, on one session, and threads switch as often as they can."""
    monkeypatch.setattr(bank_module, "Compositions", functools.partial(Compositions, banked=banked))
    session = AdapterSession(exports["bert-dynamic"], "cpu", n_threads=1, stop_spinning=True)
    inputs = inputs_for("bert", rows=4)
    mixes = [["topic", "kind", None, "topic"], ["kind", None, "topic", {"kind": 0.5}], "topic", [None, "kind", "kind", None],
             ["topic", "kind", None, "kind"], ["kind", "topic", None, "kind"], None]  # fmt: skip
    expected = [session.run(inputs, mix)["logits"] for mix in mixes]
    turns = iter(range(10**6))

    def run() -> tuple[int, np.ndarray]:
        turn = next(turns) % len(mixes)
        return turn, session.run(inputs, mixes[turn])["logits"]

    tensors = session.read(session.folder / "adapters" / "topic.onnx_adapter")
    results = under_load(run, [lambda: session.hold("topic", tensors)], n_runs=10, n_rounds=6)
    assert len({turn for turn, _ in results}) == len(mixes)
    for turn, found in results:
        np.testing.assert_allclose(found, expected[turn], atol=1e-5)
