"""Adapters that are loaded and unloaded while other threads run: a run sees all of an adapter or none of it."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from interleave import WAIT_S, Pause, calling_at, during, under_load, versions_of
from references import inputs_for

from lora_export.errors import UsageProblem
from lora_export.runtime import bank as bank_module
from lora_export.runtime import composition, device_bank, host_rows
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.bank import Bank
from lora_export.runtime.generate import generate

INPUTS = inputs_for("bert", rows=4)
MIXED = ["topic", "kind", None, "topic"]
PROMPTS = [[20, 30, 40, 50], [99]]


@pytest.fixture(scope="module")
def bert(exports) -> Callable[[], AdapterSession]:
    """A session with adapters `topic` (3 classes) and `kind` (5)."""
    return lambda: AdapterSession(exports["bert-dynamic"], "cpu", n_threads=1, stop_spinning=True)


def replace_topic(session: AdapterSession) -> None:
    session.load(session.folder / "adapters" / "kind.onnx_adapter", "topic")


# A change between two steps of one run.


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("place", "function", "chosen"),
    [
        (composition, "value_of", "topic"),
        (host_rows, "value_of", MIXED),
        (device_bank, "value_of", MIXED),
        (bank_module, "classes_by_row", MIXED),
    ],
    ids=["takes one adapter", "stacks several", "fills a bank", "counts classes"],
)
@pytest.mark.parametrize("change", ["load", "unload"])
def test_a_change_in_the_middle_of_a_run(change, place, function, chosen, after, bert, monkeypatch):
    """The run ends with the old adapter, and the next one goes by the change: nothing of the old one was kept."""
    if place is device_bank:
        banked = functools.partial(composition.Compositions, banked=True)
        monkeypatch.setattr(bank_module, "Compositions", banked)
    session, changed = bert(), bert()
    old = session.run(INPUTS, chosen)["logits"]
    replace_topic(changed)
    new = changed.run(INPUTS, chosen)["logits"]
    assert old.shape != new.shape or np.abs(old - new).max() > 0.01

    session = bert()
    pause = Pause(getattr(place, function), after=after)
    monkeypatch.setattr(place, function, pause)
    act = {"load": lambda: replace_topic(session), "unload": lambda: session.unload("topic")}[change]
    np.testing.assert_array_equal(during(pause, lambda: session.run(INPUTS, chosen)["logits"], act), old)
    if change == "load":
        np.testing.assert_array_equal(session.run(INPUTS, chosen)["logits"], new)
    else:
        with pytest.raises(UsageProblem, match="No adapter 'topic' is loaded"):
            session.run(INPUTS, chosen)


def test_a_run_in_the_middle_of_another_sees_what_was_loaded(bert, monkeypatch):
    """And it still does when the other, which stacked the old adapter, is done."""
    session, changed, found = bert(), bert(), []
    replace_topic(changed)
    new = changed.run(INPUTS, "topic")["logits"]
    pause = Pause(composition.value_of, after=True)
    monkeypatch.setattr(composition, "value_of", pause)

    def load_and_run() -> None:
        replace_topic(session)
        found.append(session.run(INPUTS, "topic")["logits"])

    during(pause, lambda: session.run(INPUTS, "topic"), load_and_run)
    np.testing.assert_array_equal(found[0], new)
    np.testing.assert_array_equal(session.run(INPUTS, "topic")["logits"], new)


def test_two_threads_that_load_at_once_load_both(bert, monkeypatch):
    """Each makes its bank from the other's, not from the one before."""
    session = bert()
    file = session.folder / "adapters" / "topic.onnx_adapter"
    pause = Pause(Bank.with_adapter, after=True)
    monkeypatch.setattr(Bank, "with_adapter", lambda *args, **named: pause(*args, **named))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(session.load, file, "first")
        assert pause.reached.wait(WAIT_S)
        second = threading.Thread(target=session.load, args=(file, "second"))
        second.start()
        second.join(0.2)
        pause.resume.set()
        first.result(WAIT_S)
        second.join(WAIT_S)
    assert set(session.adapters) == {"topic", "kind", "first", "second"}


@pytest.mark.parametrize("method", ["feeds", "stacked"])
def test_arrays_for_another_runtime_are_of_one_moment(method, bert, monkeypatch):
    session = bert()
    ask = {"feeds": lambda: session.feeds(INPUTS, MIXED), "stacked": lambda: session.stacked(MIXED, 4)}[method]
    expected = ask()
    pause = Pause(bank_module.stack_rows, after=False)
    monkeypatch.setattr(bank_module, "stack_rows", pause)
    found = during(pause, ask, lambda: session.unload("topic"))
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_what_a_host_has_bound_outlives_its_bank(bert):
    session = bert()
    expected = session.run(INPUTS, "topic")["logits"]
    binding = session.session.io_binding()
    for name, array in INPUTS.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("logits")
    session.bind_adapters(binding, "topic", 4)
    replace_topic(session)
    gc.collect()
    session.run(INPUTS, MIXED)
    session.session.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.get_outputs()[0].numpy(), expected)


# Snapshots, and texts that are begun.


def test_a_snapshot_stays_as_it_is(bert):
    session = bert()
    snapshot = session.snapshot()
    assert snapshot.session is session.session
    old = session.run(INPUTS, "topic")["logits"]
    replace_topic(session)
    session.unload("kind")
    assert snapshot.adapters == ("topic", "kind")
    np.testing.assert_array_equal(snapshot.run(INPUTS, "topic")["logits"], old)
    snapshot.load(session.folder / "adapters" / "topic.onnx_adapter", "snapshot's own")
    assert session.adapters == ("topic",)


@pytest.mark.parametrize("change", ["load", "unload"])
def test_a_text_goes_on_with_the_adapters_that_it_was_begun_with(change, exports):
    def opened() -> AdapterSession:
        return AdapterSession(exports["llama-dynamic"], "cpu", n_threads=1, stop_spinning=True)

    def load(session: AdapterSession) -> None:
        session.load(session.folder / "adapters" / "code.onnx_adapter", "chat")

    def texts(session: AdapterSession) -> list[list[int]]:
        return generate(session, PROMPTS, "chat", max_new_tokens=8)

    changed, session = opened(), opened()
    load(changed)
    old, new = texts(session), texts(changed)
    assert [text[3:] for text in old] != [text[3:] for text in new]
    act = {"load": lambda: load(session), "unload": lambda: session.unload("chat")}[change]
    calling_at(session, 3, act)
    assert texts(session) == old
    if change == "load":
        assert texts(session) == new
    else:
        with pytest.raises(UsageProblem, match="No adapter 'chat' is loaded"):
            texts(session)


# Many runs under many changes.


def test_every_run_under_load_is_of_one_version(bert):
    session = bert()
    first, second = (session.read(session.folder / "adapters" / f"{name}.onnx_adapter") for name in ("topic", "kind"))
    old = session.run(INPUTS, MIXED)["logits"]
    session.hold("topic", second)
    versions = [old, session.run(INPUTS, MIXED)["logits"]]
    assert versions_of(old, versions) == [0]
    changes = [lambda: session.hold("topic", first), lambda: session.hold("topic", second)]
    results = under_load(lambda: session.run(INPUTS, MIXED)["logits"], changes)
    assert all(versions_of(result, versions) in ([0], [1]) for result in results)


def test_an_adapter_under_load_is_there_or_refused(bert):
    session = bert()
    tensors = session.read(session.folder / "adapters" / "kind.onnx_adapter")
    session.hold("guest", tensors)
    expected = session.run(INPUTS, "guest")["logits"]

    def run() -> np.ndarray | None:
        try:
            return session.run(INPUTS, "guest")["logits"]
        except UsageProblem:
            return None

    changes = [
        lambda: session.unload("guest"),
        lambda: session.hold("guest", tensors),
        lambda: session.run(INPUTS, "guest"),  # not refused: it starts after `hold` has returned
    ]
    found = [result for result in under_load(run, changes) if result is not None]
    assert all(versions_of(result, [expected]) == [0] for result in found)
