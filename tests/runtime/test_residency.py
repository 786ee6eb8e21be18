"""Adapters in bounded memory: those not used the longest go, and come back from their files as they were."""

from __future__ import annotations

import numpy as np
import pytest
from interleave import under_load, versions_of
from references import inputs_for

from lora_export.errors import InputRefused, UsageProblem
from lora_export.runtime import adapter_file
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.residency import Residency
from lora_export.runtime.seq2seq_session import Seq2SeqSession

INPUTS = inputs_for("bert", rows=2)


@pytest.fixture(scope="module")
def answers(exports) -> dict[str | None, np.ndarray]:
    session = AdapterSession(exports["bert-dynamic"], "cpu", n_threads=1, stop_spinning=True)
    names = ("topic", "kind", None)
    return {name: session.run(INPUTS, name)["logits"] for name in names} | {"sizes": sizes_of(session)}


def sizes_of(session: AdapterSession) -> dict[str, int]:
    return {name: held.n_bytes for name, held in session.bank.adapters.items()}


def bounded(folder, max_bytes: int | Residency) -> AdapterSession:
    return AdapterSession(folder, "cpu", n_threads=1, stop_spinning=True, max_bytes=max_bytes)


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The adapters whose files are read."""
    found, read = [], adapter_file.read_adapter
    monkeypatch.setattr(adapter_file, "read_adapter", lambda path: found.append(path.stem) or read(path))
    return found


def test_answers_are_those_without_a_bound(exports, answers, reads):
    session = bounded(exports["bert-dynamic"], max(answers["sizes"].values()))
    reads.clear()
    for name in ("topic", "kind", "topic", None, "topic", "kind"):
        np.testing.assert_array_equal(session.run(INPUTS, name)["logits"], answers[name])
        assert session.residency.n_bytes <= max(answers["sizes"].values())
    assert reads == ["topic", "kind", "topic", "kind"]
    assert session.adapters == ("topic", "kind")


def test_the_one_not_used_the_longest_goes(exports, answers, reads):
    sizes = answers["sizes"]
    session = bounded(exports["bert-dynamic"], 2 * sizes["topic"] + sizes["kind"])
    files = session.folder / "adapters"
    session.load(files / "topic.onnx_adapter", "second")
    session.run(INPUTS, "topic")
    session.load(files / "topic.onnx_adapter", "third")  # `kind` goes: the others were used later
    reads.clear()
    for name in ("topic", "second", "third"):
        session.run(INPUTS, name)
    assert reads == []
    session.run(INPUTS, "kind")
    assert reads == ["kind"]


def test_a_pinned_adapter_stays(exports, answers, reads):
    sizes = answers["sizes"]
    session = bounded(exports["bert-dynamic"], sum(sizes.values()))
    session.residency.pin("topic")
    session.run(INPUTS, "topic")
    session.load(session.folder / "adapters" / "topic.onnx_adapter", "second")
    reads.clear()
    session.run(INPUTS, "topic")
    assert reads == []
    session.residency.unpin("topic")
    session.run(INPUTS, "second")
    session.run(INPUTS, "kind")
    session.run(INPUTS, "topic")
    assert "topic" in reads


def test_what_does_not_fit_is_refused(exports, answers):
    sizes = answers["sizes"]
    with pytest.raises(UsageProblem, match="does not fit into the adapters' memory") as refused:
        bounded(exports["bert-dynamic"], sizes["topic"] - 1)
    assert refused.value.expected == f"at most {sizes['topic'] - 1:,} bytes"
    session = bounded(exports["bert-dynamic"], max(sizes.values()))
    tensors = session.read(session.folder / "adapters" / "topic.onnx_adapter")
    session.hold("guest", tensors)  # has no file, so it stays
    with pytest.raises(UsageProblem, match="Adapter 'kind' does not fit"):
        session.run(INPUTS, "kind")
    session.unload("guest")
    np.testing.assert_array_equal(session.run(INPUTS, "kind")["logits"], answers["kind"])
    with pytest.raises(UsageProblem, match="no number of bytes"):
        Residency(-1)


def test_a_file_that_changed_is_refused_when_it_is_read_again(exports, own, answers):
    session = bounded(own(exports["bert-dynamic"]), max(answers["sizes"].values()))
    session.run(INPUTS, "topic")
    files = session.folder / "adapters"
    (files / "kind.onnx_adapter").write_bytes((files / "topic.onnx_adapter").read_bytes())
    with pytest.raises(InputRefused, match="changed after it was loaded"):
        session.run(INPUTS, "kind")
    np.testing.assert_array_equal(session.run(INPUTS, "topic")["logits"], answers["topic"])


def test_what_is_unloaded_counts_no_longer(exports, answers):
    session = bounded(exports["bert-dynamic"], 10 * sum(answers["sizes"].values()))
    for _ in range(50):
        session.load(session.folder / "adapters" / "topic.onnx_adapter", "guest")
    assert session.residency.n_bytes == sum(answers["sizes"].values()) + answers["sizes"]["topic"]
    session.unload("guest")
    assert session.residency.n_bytes == sum(answers["sizes"].values())


def test_threads_that_drop_each_other_s_adapters_get_their_answers(exports, answers):
    session = bounded(exports["bert-dynamic"], max(answers["sizes"].values()))
    turns = iter(range(10**6))

    def run() -> tuple[str, np.ndarray]:
        name = ("topic", "kind")[next(turns) % 2]
        return name, session.run(INPUTS, name)["logits"]

    for name, found in under_load(run, [lambda: session.run(INPUTS, "topic")], n_runs=8, n_rounds=5):
        assert versions_of(found, [answers[name]]) == [0]
    assert session.residency.n_bytes <= max(answers["sizes"].values())


def test_the_graphs_of_an_encoder_decoder_share_a_bound(exports):
    free = Seq2SeqSession(exports["t5-dynamic"], "cpu", n_threads=1, stop_spinning=True)
    n_bytes = sum(held.n_bytes for one in free.sessions.values() for held in one.bank.adapters.values())
    session = Seq2SeqSession(exports["t5-dynamic"], "cpu", n_threads=1, stop_spinning=True, max_bytes=n_bytes // 2)
    inputs = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)}
    for name in ("t5-all", "t5-attention", "t5-all", None):
        found = session.generate(inputs, name, max_new_tokens=4)
        assert found == free.generate(inputs, name, max_new_tokens=4)
        assert session.residency.n_bytes <= n_bytes // 2
