"""`AdapterSession` as a host uses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from references import decoder_feeds, inputs_for

from lora_export import AdapterSession
from lora_export.artifact import read_manifest
from lora_export.errors import InputRefused, UsageProblem


@pytest.fixture(scope="module")
def bert(exports) -> AdapterSession:
    return AdapterSession(exports["bert-dynamic"], "cpu")


INPUTS = inputs_for("bert", rows=4)


def one_row(row: int) -> dict[str, np.ndarray]:
    return {name: value[row : row + 1] for name, value in INPUTS.items()}


def write_adapter(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    adapter = ort.AdapterFormat()
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()})
    adapter.export_adapter(str(path))
    return path


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    adapter = ort.AdapterFormat.read_adapter(str(path))
    return {name: value.numpy().copy() for name, value in adapter.get_parameters().items()}


def test_the_exports_adapters_are_loaded(bert):
    assert bert.adapters == ("topic", "kind")
    assert (bert.provider, bert.provider_reason) == ("cpu", "asked for")


def test_rows_of_unequal_heads_keep_to_themselves(bert):
    """topic has 3 classes, kind 5, the base none (its config says 2, all zeros)."""
    found = bert.run(INPUTS, ["topic", "kind", None, "topic"])["logits"]
    lowest = np.finfo(np.float32).min
    assert found.shape == (4, 5)
    assert (found[[0, 3], 3:] == lowest).all() and (found[2, 2:] == lowest).all()
    assert np.isfinite(found).all()
    assert set(found.argmax(axis=-1)[[0, 3]]) <= {0, 1, 2}
    for row, name in [(0, "topic"), (1, "kind"), (3, "topic")]:
        alone = bert.run(one_row(row), name)["logits"]
        np.testing.assert_allclose(found[row : row + 1, : alone.shape[1]], alone, atol=2e-6)


def test_one_entry_serves_every_row(bert):
    each = bert.run(INPUTS, ["topic"] * 4)["logits"]
    for entry in ("topic", ["topic"] * 4, {"topic": 1.0}, [{"topic": 1}] * 4):
        assert np.array_equal(bert.run(INPUTS, entry)["logits"], each), entry


def test_a_weight_of_zero_is_the_base(exports):
    session = AdapterSession(exports["classifier-dynamic"], "cpu")
    inputs = inputs_for("classifier", rows=2)
    base = session.run(inputs)["logits"]
    for entry in ({}, {"plain": 0.0}, [None, {"plain": 0}]):
        assert np.array_equal(session.run(inputs, entry)["logits"], base)


def test_a_slider_moves_between_the_base_and_the_adapter(exports):
    """Through the adapter's B only, so a weight of 2 on it equals its pairs twice."""
    session = AdapterSession(exports["llama-dynamic"], "cpu")
    inputs = decoder_feeds(inputs_for("llama", rows=2), session.manifest.contract)
    twice = session.stacked({"chat": 2.0}, 2)
    once = session.stacked("chat", 2)
    assert set(twice) == set(once)
    for name, array in once.items():
        factor = 2 if name.endswith("lora_B.weight") else 1
        np.testing.assert_allclose(twice[name], factor * array, rtol=1e-6)
    halves = session.run(inputs, {"chat": 1.0})["logits"]
    assert np.array_equal(session.run(inputs, "chat")["logits"], halves)


def test_a_blend_is_the_merged_sum(exports):
    dynamic = AdapterSession(exports["llama-dynamic"], "cpu")
    merged = AdapterSession(exports["llama-sum"], "cpu")
    inputs = decoder_feeds(inputs_for("llama", rows=3), dynamic.manifest.contract)
    found = dynamic.run(inputs, {"chat": 1.0, "code": 1.0})["logits"]
    np.testing.assert_allclose(found, merged.run(inputs)["logits"], atol=1e-4)


def test_changing_adapters_leaves_no_trace(exports):
    """A → B → A → none, bit for bit as in a fresh session each."""
    folder = exports["llama-dynamic"]
    session = AdapterSession(folder, "cpu")
    inputs = decoder_feeds(inputs_for("llama"), session.manifest.contract)
    for entry in ("chat", "code", "chat", None, ["chat", "code", None, "chat", "code"], "chat", {"code": 0.5}, None):
        found = session.run(inputs, entry)
        fresh = AdapterSession(folder, "cpu").run(inputs, entry)
        for name, array in fresh.items():
            assert np.array_equal(found[name], array), (entry, name)


def test_compositions_are_not_confused_when_there_are_many(bert):
    entries = [[("topic", "kind")[(n >> row) & 1] for row in range(4)] for n in range(16)]
    first = [bert.run(INPUTS, entry)["logits"] for entry in entries]
    for entry, expected in zip(entries, first, strict=True):
        assert np.array_equal(bert.run(INPUTS, entry)["logits"], expected), entry


def test_outputs_can_be_chosen(exports):
    session = AdapterSession(exports["features-dynamic"], "cpu")
    inputs = inputs_for("bert", rows=2)
    assert set(session.run(inputs)) == {"last_hidden_state", "pooler_output"}
    assert set(session.run(inputs, outputs=["pooler_output"])) == {"pooler_output"}


def test_outputs_are_the_callers_own(bert):
    first = bert.run(INPUTS, "topic")["logits"]
    kept = first.copy()
    bert.run(INPUTS, "kind")
    assert np.array_equal(first, kept), "a later run wrote into an earlier result"


def test_inputs_need_not_be_contiguous_and_are_not_changed(bert):
    wide = {name: np.asfortranarray(value) for name, value in INPUTS.items()}
    before = {name: value.copy() for name, value in wide.items()}
    assert np.array_equal(bert.run(wide, "topic")["logits"], bert.run(INPUTS, "topic")["logits"])
    for name, value in wide.items():
        assert np.array_equal(value, before[name])


def test_load_and_unload(exports, tmp_path):
    session = AdapterSession(exports["bert-dynamic"], "cpu")
    file = exports["bert-dynamic"] / "adapters" / "topic.onnx_adapter"
    expected = session.run(INPUTS, "topic")["logits"]
    session.unload("topic")
    assert session.adapters == ("kind",)
    with pytest.raises(UsageProblem, match="No adapter 'topic' is loaded") as refused:
        session.run(INPUTS, "topic")
    assert refused.value.found == "kind"
    with pytest.raises(UsageProblem, match="No adapter 'topic' is loaded"):
        session.unload("topic")
    assert session.load(file) == "topic" and session.load(file, "again") == "again"
    assert np.array_equal(session.run(INPUTS, "again")["logits"], expected)


def test_loading_under_a_taken_name_replaces_at_once(exports):
    session = AdapterSession(exports["bert-dynamic"], "cpu")
    kind = session.run(INPUTS, "kind")["logits"]
    session.run(INPUTS, "topic")
    session.load(exports["bert-dynamic"] / "adapters" / "kind.onnx_adapter", "topic")
    assert np.array_equal(session.run(INPUTS, "topic")["logits"], kind), "the old adapter still answered"


def test_the_number_of_entries_must_be_the_batch_size(bert):
    with pytest.raises(UsageProblem, match="`adapters` must have one entry for each row") as refused:
        bert.run(INPUTS, ["topic", "kind"])
    assert (refused.value.expected, refused.value.found) == ("4 entries, or a single one for all rows", "2 entries")


def test_a_merged_export_says_what_it_is_when_asked_for_an_adapter(exports):
    session = AdapterSession(exports["bert-merged"], "cpu")
    assert session.adapters == ()
    with pytest.raises(UsageProblem, match="No adapter 'kind' is loaded") as refused:
        session.run(INPUTS, "kind")
    assert refused.value.found == "a merged graph (of kind)"


@pytest.mark.parametrize("lost", ["attention_mask", "input_ids"])
def test_a_missing_input_is_named(lost, bert):
    with pytest.raises(UsageProblem, match="input") as refused:
        bert.run({name: value for name, value in INPUTS.items() if name != lost}, "topic")
    assert lost in str(refused.value)


def test_an_unknown_input_is_named(bert):
    with pytest.raises(UsageProblem, match="input") as refused:
        bert.run(INPUTS | {"pixels": INPUTS["input_ids"]}, "topic")
    assert "pixels" in str(refused.value)


# Files that are refused.


@pytest.fixture
def topic(exports) -> dict[str, np.ndarray]:
    return tensors_of(exports["bert-dynamic"] / "adapters" / "topic.onnx_adapter")


A = "bert.encoder.layer.0.attention.self.query.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(value, bert, topic, tmp_path):
    topic[A][0, 1, 2] = value
    with pytest.raises(InputRefused, match="The adapter holds numbers that are not finite") as refused:
        bert.load(write_adapter(tmp_path / "bad.onnx_adapter", topic))
    assert refused.value.where.endswith(A)
    assert "bad" not in bert.adapters


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"elsewhere.lora_A.weight": t[A]}),
        lambda t: t.update({A: t[A][:, :-1]}),
        lambda t: t.update({A: t[A][0]}),
        lambda t: t.update({A: np.repeat(t[A], 2, axis=0)}),
        lambda t: t.update({A: t[A].astype(np.float16)}),
        lambda t: t.update({A: t[A][:, :, :2]}),
        lambda t: t.pop(A),
        lambda t: t.pop(B),
        lambda t: t.pop("classifier.bias"),
        lambda t: t.update({"classifier.bias": t["classifier.bias"][:, :, :2]}),
    ],
    ids=["unknown", "shape", "axes", "rows", "dtype", "rank differs", "no A", "no B", "no bias", "head differs"],
)
def test_an_adapter_that_does_not_fit_the_graph_is_refused(change, bert, topic, tmp_path, request):
    change(topic)
    path = write_adapter(tmp_path / "bad.onnx_adapter", topic)
    message = (
        "The adapter lacks a tensor"
        if request.node.callspec.id.startswith("no ")
        else "The adapter was made for another graph"
    )
    with pytest.raises(InputRefused, match=message) as refused:
        bert.load(path)
    assert refused.value.where.startswith(str(path)) and refused.value.expected
    assert "bad" not in bert.adapters


@pytest.mark.parametrize("content", [b"", b"TORT", b"\xff" * 100, None], ids=["empty", "short", "garbage", "missing"])
def test_what_is_no_adapter_file_is_refused(content, bert, tmp_path):
    path = tmp_path / "x.onnx_adapter"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputRefused, match="no such adapter file" if content is None else "no ONNX Runtime adapter"):
        bert.load(path)


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.95])
def test_a_truncated_adapter_file_is_refused(keep, bert, exports, tmp_path):
    whole = (exports["bert-dynamic"] / "adapters" / "topic.onnx_adapter").read_bytes()
    path = tmp_path / "cut.onnx_adapter"
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(InputRefused, match="no ONNX Runtime adapter, or is truncated"):
        bert.load(path)


def test_an_adapter_file_that_changed_after_the_export_is_refused(exports, own):
    folder = own(exports["bert-dynamic"])
    (folder / "adapters" / "kind.onnx_adapter").write_bytes((folder / "adapters" / "topic.onnx_adapter").read_bytes())
    with pytest.raises(InputRefused, match="An adapter file is not the one that was exported") as refused:
        AdapterSession(folder, "cpu")
    assert "kind.onnx_adapter" in refused.value.where
    assert read_manifest(folder).files["adapters/kind.onnx_adapter"] in refused.value.expected


def test_a_folder_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(InputRefused, match="The folder holds no export"):
        AdapterSession(tmp_path, "cpu")


# Row isolation.


def test_an_overflowing_neighbour_does_not_leak(exports, topic, tmp_path):
    """Finite numbers that overflow in use: its own row is ruined, no other."""
    session = AdapterSession(exports["bert-dynamic"], "cpu")
    hostile = {n: np.full_like(a, 3e38) if "lora" in n else a for n, a in topic.items()}
    session.load(write_adapter(tmp_path / "hostile.onnx_adapter", hostile))
    found = session.run(INPUTS, ["topic", "hostile", "kind", None])["logits"]
    assert not np.isfinite(session.run(one_row(1), "hostile")["logits"]).all(), "it does not overflow"
    for row, name in [(0, "topic"), (2, "kind"), (3, None)]:
        alone = session.run(one_row(row), name)["logits"]
        np.testing.assert_allclose(found[row : row + 1, : alone.shape[1]], alone, atol=2e-6, err_msg=str(name))


ALONE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "peft", "onnx", "onnx_ir", "onnxscript", "click", "safetensors"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import numpy as np
from lora_export import AdapterSession
from lora_export.runtime.generate import generate
folder, decoder, out = sys.argv[1:]
feeds = dict(np.load(out + "/feeds.npz"))
session = AdapterSession(folder, "cpu")
found = session.run(feeds, ["topic", "kind", None, {"topic": 0.5}])
tokens = generate(AdapterSession(decoder, "cpu"), [[5, 6], [7, 8, 9]], ["chat", None], max_new_tokens=3)
np.savez(out + "/results.npz", logits=found["logits"], tokens=np.array(tokens))
"""


def test_it_works_without_torch_transformers_peft_or_onnx(exports, bert, tmp_path):
    from lora_export.runtime.generate import generate

    np.savez(tmp_path / "feeds.npz", **INPUTS)
    command = [sys.executable, "-c", ALONE, exports["bert-dynamic"], exports["llama-dynamic"], tmp_path]
    subprocess.run(list(map(str, command)), check=True, timeout=60, cwd=tmp_path)
    found = np.load(tmp_path / "results.npz")
    expected = bert.run(INPUTS, ["topic", "kind", None, {"topic": 0.5}])["logits"]
    np.testing.assert_allclose(found["logits"], expected, atol=1e-6)
    session = AdapterSession(exports["llama-dynamic"], "cpu")
    assert found["tokens"].tolist() == generate(session, [[5, 6], [7, 8, 9]], ["chat", None], max_new_tokens=3)


@pytest.mark.parametrize("export", ["classifier-dynamic", "bert-dynamic", "llama-dynamic"])
def test_nothing_is_left_of_an_adapter_that_was_bound_before(export, exports):
    """One binding, each adapter after each other: what the next one does not touch goes back to its default."""
    session = AdapterSession(exports[export], "cpu")
    inputs = inputs_for(export.split("-")[0], rows=2)
    if "llama" in export:
        inputs = decoder_feeds(inputs, session.manifest.contract)
    binding = session.session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    order = [*session.adapters, None, *reversed(session.adapters), [session.adapters[0], None], None]
    for adapters in order:
        session.bind_adapters(binding, adapters, 2)
        binding.bind_output("logits")
        session.session.run_with_iobinding(binding)
        found = binding.get_outputs()[0].numpy()
        expected = session.run(inputs, adapters)["logits"]
        is_real = expected > np.finfo(np.float32).min  # classes that only the other row has
        np.testing.assert_array_equal(found[is_real], expected[is_real], err_msg=str(adapters))
