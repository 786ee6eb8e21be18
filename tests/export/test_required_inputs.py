"""`dynamic --inputs required`: the same graph without defaults, for hosts that cannot feed optional inputs."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from command_line import call, fails
from references import decoder_feeds, inputs_for

from lora_export.artifact import MANIFEST, read_manifest
from lora_export.bench.latency import bound_run
from lora_export.check.context import CheckOptions
from lora_export.contract import AdapterInputKind
from lora_export.errors import InputRefused
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import add_adapter, check
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.session import open_session

PAIRS = (("bert-dynamic", "bert-required"), ("llama-kinds", "llama-kinds-required"))
COMPOSITIONS = {
    "bert": (None, "topic", ["kind", None, "topic", {"topic": 0.5}, "kind"]),
    "llama": (
        None, "gains", ["chat", "voice", None, "tokens", "biases"], {"gains": 0.5, "tokens": -1.5},
        ["activated", None, "activated", {"voice": 0.5}, "chat"],
    ),
}  # fmt: skip


def inputs_of(session: AdapterSession) -> dict[str, np.ndarray]:
    if session.contract.past:
        inputs = inputs_for("llama")
        inputs["input_ids"][::2, 3:5] = 70, 71  # the invocation of "activated"
        return decoder_feeds(inputs, session.contract)
    return inputs_for("bert")


@pytest.mark.parametrize(("optional", "required"), PAIRS)
def test_the_graph_without_defaults_gives_the_same_numbers(optional, required, exports):
    one, other = (AdapterSession(exports[name], "cpu") for name in (optional, required))
    assert other.contract.adapter_inputs_required and not one.contract.adapter_inputs_required
    inputs = inputs_of(one)
    base = one.run(inputs)["logits"]
    for adapters in COMPOSITIONS[optional.partition("-")[0]]:
        expected, found = (session.run(inputs, adapters)["logits"] for session in (one, other))
        np.testing.assert_array_equal(found, expected)
        differs = found.shape != base.shape or np.abs(found - base).max() > 0.01
        assert bool(differs) is (adapters is not None)
        fed = other.feeds(inputs, adapters)
        assert {entry.name for entry in other.contract.adapter_inputs} <= set(fed)
        np.testing.assert_allclose(other.session.run(["logits"], fed)[0][:2], expected[:2], atol=1e-6)
    assert (exports[optional] / "model.onnx").stat().st_size > (exports[required] / "model.onnx").stat().st_size


def test_the_export_of_all_kinds_has_all_kinds(exports):
    contract = read_manifest(exports["llama-kinds-required"]).contract
    assert {entry.kind for entry in contract.adapter_inputs} == set(AdapterInputKind)


@pytest.mark.parametrize("name", [required for _, required in PAIRS])
def test_onnxruntime_wants_every_adapter_input(name, exports):
    session = AdapterSession(exports[name], "cpu")
    optional = [value.name for value in session.session.get_overridable_initializers()]
    assert optional == [spec.name for spec in session.contract.optional_inputs]
    fed = session.feeds(inputs_of(session), None)
    left_out = session.contract.adapter_inputs[0].name
    with pytest.raises(ValueError, match="Required inputs"):
        session.session.run(["logits"], {key: array for key, array in fed.items() if key != left_out})


@pytest.mark.parametrize(("optional", "required"), PAIRS)
def test_onnxruntime_makes_the_same_operators_of_both(optional, required, exports, tmp_path):
    """So one is as fast as the other: a default that a host may replace is no constant to fold."""
    found = []
    for name in (optional, required):
        open_session(exports[name] / "model.onnx", "cpu", optimized=tmp_path / f"{name}.onnx")
        nodes = onnx.load(tmp_path / f"{name}.onnx", load_external_data=False).graph.node
        found.append(Counter((node.domain, node.op_type) for node in nodes))
    assert found[0] == found[1] and found[0].total() > 20


def test_an_active_adapter_of_onnxruntimes_own_fills_the_inputs_that_it_has(exports):
    """`LoraAdapter` adds its tensors to the feeds before ONNX Runtime looks for what is missing, but in Python."""
    folder = exports["bert-required"]
    session = AdapterSession(folder, "cpu")
    inputs = inputs_for("bert")
    adapter, options = ort.LoraAdapter(), ort.RunOptions()
    adapter.Load(str(folder / "adapters" / "topic.onnx_adapter"))
    options.add_active_adapter(adapter)
    with pytest.raises(ValueError, match="Required inputs"):
        session.session.run(["logits"], inputs, options)


def test_check_passes_and_tells_another_adapter(exports, own):
    out = own(exports["bert-required"])
    report, _ = check(out, SourceOverrides(), CheckOptions(n_rows=4))
    assert {case.name: case.failures for case in report.cases if case.failures} == {}
    manifest = json.loads((out / MANIFEST).read_text())
    files = [entry["file"] for entry in manifest["adapters"]]
    names = [entry["name"] for entry in manifest["adapters"]]
    for entry, file in zip(manifest["adapters"], reversed(files), strict=True):
        entry["file"] = file
    (out / MANIFEST).write_text(json.dumps(manifest))
    report, _ = check(out, SourceOverrides(), CheckOptions(n_rows=4))
    assert set(names) <= {case.name for case in report.cases if case.failures}


def test_bench_feeds_all_inputs(exports):
    session = AdapterSession(exports["llama-kinds-required"], "cpu")
    bound_run(session, ["chat", None, "voice", "gains", "tokens"], inputs_of(session))()


def test_an_adapter_is_added(exports, own, adapters):
    out = own(exports["bert-required"])
    add_adapter(out, [(str(adapters["topic"]), "again")], SourceOverrides())
    session, inputs = AdapterSession(out, "cpu"), inputs_for("bert")
    assert session.contract.adapter_inputs_required
    np.testing.assert_array_equal(*(session.run(inputs, name)["logits"] for name in ("topic", "again")))


@pytest.mark.parametrize(("name", "said"), [("bert-required", False), ("bert-dynamic", True)])
def test_a_manifest_that_says_otherwise_is_refused(name, said, exports, own, adapters):
    out = own(exports[name])
    fields = json.loads((out / MANIFEST).read_text())
    fields["contract"]["adapter_inputs_required"] = said
    (out / MANIFEST).write_text(json.dumps(fields))
    for use in (lambda: AdapterSession(out, "cpu"), lambda: add_adapter(out, [(str(adapters["topic"]), "again")])):
        with pytest.raises(InputRefused, match="manifest does not describe its graph") as refused:
            use()
        assert refused.value.where.endswith("contract.adapter_inputs_required")
        assert refused.value.found == str(said)
        assert refused.value.expected.endswith("has a default" if said else "has no default")


def test_genai_which_feeds_no_adapter_inputs_gets_no_settings(exports):
    assert (exports["llama-kinds"] / "genai_config.json").exists()
    assert not (exports["llama-kinds-required"] / "genai_config.json").exists()


def test_the_command_line_has_the_choice(bases, adapters, tmp_path):
    out = tmp_path / "out"
    call("dynamic", bases["bert"], adapters["topic"], "--inputs", "required", "--provider", "cpu", "-o", out)
    assert read_manifest(out).contract.adapter_inputs_required
    assert "Invalid value for '--inputs'" in fails(2, "dynamic", "x", "--inputs", "some", "-o", "y")
