"""The graphs of an encoder-decoder take an adapter together, and a target keeps to those that it was begun with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from interleave import Pause, calling_at, during, under_load, versions_of
from tiny import VOCABULARY

from lora_export.contract import DECODER, DECODER_WITH_PAST, ENCODER
from lora_export.errors import UsageProblem
from lora_export.runtime.bank import Bank
from lora_export.runtime.seq2seq_session import Seq2SeqSession


@pytest.fixture(scope="module")
def bart(exports) -> Callable[[], Seq2SeqSession]:
    """A session with adapters `bart-all` and `bart-attention`, which both change the encoder and the decoder."""
    return lambda: Seq2SeqSession(exports["bart-dynamic"], "cpu", n_threads=1, stop_spinning=True)


def sources() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(7).integers(4, VOCABULARY, (2, 9))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


TARGETS = sources() | {"decoder_input_ids": np.array([[2, 9, 40], [2, 8, 50]])}


def replace_all(session: Seq2SeqSession) -> None:
    session.load(session.folder / "adapters" / "bart-attention", "bart-all")


@pytest.mark.parametrize("change", ["load", "unload"])
def test_the_decoder_runs_with_the_adapters_of_its_encoder(change, bart):
    session = bart()
    old = session.run(TARGETS, "bart-all")["logits"]
    act = {"load": lambda: replace_all(session), "unload": lambda: session.unload("bart-all")}[change]
    calling_at(session.sessions[ENCODER], 1, act)
    np.testing.assert_array_equal(session.run(TARGETS, "bart-all")["logits"], old)


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_run_in_the_middle_of_a_load_sees_none_of_it(nth, bart, monkeypatch):
    session, found = bart(), []
    old = session.run(TARGETS, "bart-all")["logits"]
    pause = Pause(Bank.with_adapter, after=True, nth=nth)
    monkeypatch.setattr(Bank, "with_adapter", lambda *args, **named: pause(*args, **named))
    during(pause, lambda: replace_all(session), lambda: found.append(session.run(TARGETS, "bart-all")["logits"]))
    np.testing.assert_array_equal(found[0], old)
    assert np.abs(session.run(TARGETS, "bart-all")["logits"] - old).max() > 0.01


def test_one_graphs_session_changes_its_graph_alone(bart):
    """`session.sessions` are live: both see what the other loads."""
    session = bart()
    encoder = session.sessions[ENCODER]
    old = session.run(TARGETS, "bart-all")["logits"]
    encoder.load(session.folder / "adapters" / f"bart-attention.{ENCODER}.onnx_adapter", "bart-all")
    assert np.abs(session.run(TARGETS, "bart-all")["logits"] - old).max() > 0.001
    session.load(session.folder / "adapters" / "bart-attention", "later")
    assert "later" in encoder.adapters
    for input_name, array in encoder.stacked("bart-all", 1).items():
        np.testing.assert_array_equal(encoder.stacked("later", 1)[input_name], array)


def test_a_snapshot_of_three_graphs_stays_as_it_is(bart):
    session = bart()
    snapshot = session.snapshot()
    old = session.run(TARGETS, "bart-all")["logits"]
    replace_all(session)
    session.unload("bart-attention")
    assert (session.adapters, snapshot.adapters) == (("bart-all",), ("bart-attention", "bart-all"))
    np.testing.assert_array_equal(snapshot.run(TARGETS, "bart-all")["logits"], old)
    assert np.abs(session.run(TARGETS, "bart-all")["logits"] - old).max() > 0.01
    snapshot.unload("bart-all")
    assert session.adapters == ("bart-all",)


@pytest.mark.parametrize("graph", [ENCODER, DECODER, DECODER_WITH_PAST])
@pytest.mark.parametrize("change", ["load", "unload"])
def test_a_target_goes_on_with_the_adapters_that_it_was_begun_with(change, graph, bart):
    def targets(session: Seq2SeqSession) -> list[list[int]]:
        return session.generate(sources(), "bart-all", max_new_tokens=8, eos_ids=frozenset())

    changed, session = bart(), bart()
    replace_all(changed)
    old, new = targets(session), targets(changed)
    assert old != new
    act = {"load": lambda: replace_all(session), "unload": lambda: session.unload("bart-all")}[change]
    calling_at(session.sessions[graph], 1, act)
    assert targets(session) == old
    if change == "load":
        assert targets(session) == new
    else:
        with pytest.raises(UsageProblem, match="No adapter 'bart-all' is loaded"):
            targets(session)


def test_a_state_goes_on_with_the_adapters_that_it_was_begun_with(bart):
    session, step = bart(), np.array([[30], [40]])
    _, state = session.begin(TARGETS, "bart-all")
    expected, _ = session.advance(state, step)
    replace_all(session)
    found, after = session.advance(state, step)
    np.testing.assert_array_equal(found, expected)
    session.unload("bart-all")
    session.advance(after, step)


def test_every_graph_under_load_is_of_one_version(bart):
    session = bart()
    folder: Path = session.folder / "adapters"
    old = session.run(TARGETS, "bart-all")["logits"]
    replace_all(session)
    versions = [old, session.run(TARGETS, "bart-all")["logits"]]
    assert versions_of(old, versions) == [0]
    changes = [lambda: session.load(folder / "bart-all"), lambda: replace_all(session)]
    results = under_load(lambda: session.run(TARGETS, "bart-all")["logits"], changes)
    assert all(versions_of(result, versions) in ([0], [1]) for result in results)


def test_every_target_under_load_is_of_one_version(bart):
    def target() -> list[list[int]]:
        return session.generate(sources(), "bart-all", max_new_tokens=6, eos_ids=frozenset())

    session = bart()
    folder: Path = session.folder / "adapters"
    versions = [target()]
    replace_all(session)
    versions.append(target())
    changes = [lambda: session.load(folder / "bart-all"), lambda: replace_all(session)]
    assert all(found in versions for found in under_load(target, changes, n_runs=5))
