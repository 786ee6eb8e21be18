"""End to end: what an exported folder computes, against unmerged PEFT."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import safetensors.torch
import tiny
import torch
from catalogue import ADAPTERS, EXPORTS, SEQ2SEQ_BASES, ExportSpec, export_to
from references import decoder_feeds, error, inputs_for, outputs_of, real, rms_error, unmerged

from lora_export.artifact import read_manifest, sha256_of
from lora_export.errors import EnvironmentUnusable, InputRefused, UsageProblem
from lora_export.export.plan import Request, make_plan
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import ExportOptions, add_adapter, export
from lora_export.runtime.adapter_session import AdapterSession

ROUNDING = 2e-5
# Those of several graphs, or of two outputs a row, have tests of their own: test_seq2seq_export.py, verify/test_dual_encoder.py.
ELSEWHERE = (*SEQ2SEQ_BASES, "clip")
COMPARED = {
    name: spec
    for name, spec in EXPORTS.items()
    if spec.adapters and "f16" not in name and spec.base not in ELSEWHERE and spec.quantization is None
}
DYNAMIC = [name for name, spec in COMPARED.items() if spec.mode == "dynamic"]
MERGED = [name for name, spec in COMPARED.items() if spec.mode == "merge"]


def run(session: AdapterSession, inputs, adapters=None) -> np.ndarray:
    contract = session.manifest.contract
    feeds = decoder_feeds(inputs, contract) if "input_ids" in inputs else inputs
    return session.run(feeds, adapters)[contract.outputs[0].name]


def peft(spec, names, bases, adapters, dtype=torch.float32):
    first = ADAPTERS[spec.adapters[0]]
    n_labels = next((ADAPTERS[name].n_labels for name in names if ADAPTERS[name].n_labels), None)
    return unmerged(bases[spec.base], first.model_class, [adapters[name] for name in names], n_labels, dtype)


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_equals_unmerged_peft_for_each_adapter_and_for_mixed_rows(name, exports, bases, adapters):
    spec = EXPORTS[name]
    session = AdapterSession(exports[name], "cpu")
    inputs = inputs_for(spec.base, rows=6)
    expected = {label: outputs_of(peft(spec, [label], bases, adapters), inputs) for label in spec.adapters}
    for label, values in expected.items():
        found = run(session, inputs, label)
        assert error(real(found, inputs), real(values, inputs)) < ROUNDING, label
    mixed = [spec.adapters[row % len(spec.adapters)] for row in range(6)]
    found = run(session, inputs, mixed)
    for row, label in enumerate(mixed):
        classes = expected[label].shape[-1]
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        reference = real(expected[label][row : row + 1], one)
        assert error(real(found[row : row + 1, ..., :classes], one), reference) < ROUNDING, f"row {row}, {label}"


@pytest.mark.parametrize("name", MERGED)
def test_merged_equals_unmerged_peft_with_all_its_adapters_active(name, exports, bases, adapters):
    spec = EXPORTS[name]
    inputs = inputs_for(spec.base)
    expected = outputs_of(peft(spec, spec.adapters, bases, adapters), inputs)
    found = run(AdapterSession(exports[name], "cpu"), inputs)
    assert error(real(found, inputs), real(expected, inputs)) < ROUNDING


def test_the_tests_can_tell_an_adapter_from_its_base(exports, bases, adapters):
    """The comparisons above mean something only if every adapter moves the output by far more than rounding."""
    for name in (*DYNAMIC, *MERGED):
        spec = EXPORTS[name]
        inputs = inputs_for(spec.base)
        for label in spec.adapters:
            if "alora_invocation_tokens" in ADAPTERS[label].options:
                continue  # without its invocation it is the base
            model = peft(spec, [label], bases, adapters)
            effect = outputs_of(model, inputs)
            with model.disable_adapter():
                without = outputs_of(model, inputs)
            assert effect.shape != without.shape or np.abs(effect - without).max() > 0.05, (name, label)


@pytest.mark.parametrize(
    ("name", "model_class"),
    [
        ("llama-base", "LlamaForCausalLM"),
        ("llama-dynamic", "LlamaForCausalLM"),
        ("llama-head", "LlamaForCausalLM"),
        ("llama-voice", "LlamaForCausalLM"),
        ("gpt2-dynamic", "GPT2LMHeadModel"),
        ("classifier-dynamic", "BertForSequenceClassification"),
        ("classifier-targets", "BertForSequenceClassification"),
        ("tagger-dynamic", "BertForTokenClassification"),
        ("features-dynamic", "BertModel"),
        ("albert-dynamic", "AlbertModel"),
        ("vit-dynamic", "ViTForImageClassification"),
    ],
)
def test_without_an_adapter_an_export_is_its_base(name, model_class, exports, bases):
    spec = EXPORTS[name]
    inputs = inputs_for(spec.base)
    expected = outputs_of(unmerged(bases[spec.base], model_class), inputs)
    found = run(AdapterSession(exports[name], "cpu"), inputs)
    assert error(real(found, inputs), real(expected, inputs)) < ROUNDING


def test_a_base_without_a_head_scores_zero_until_an_adapter_brings_one(exports):
    session = AdapterSession(exports["bert-dynamic"], "cpu")
    heads = session.manifest.contract.of_module("classifier")
    assert {kind: entry.base_has_default for kind, entry in heads.items()} == {"weight": False, "bias": False}
    assert not run(session, inputs_for("bert")).any()
    assert run(session, inputs_for("bert"), "topic").any()


@pytest.mark.parametrize("name", ["llama-f16", "llama-f16-merged"])
def test_float16_is_as_near_to_float32_as_pytorch_is(name, exports, bases, adapters):
    spec = EXPORTS[name]
    inputs = inputs_for("llama")
    truth = real(outputs_of(peft(spec, spec.adapters, bases, adapters), inputs), inputs)
    pytorch = real(outputs_of(peft(spec, spec.adapters, bases, adapters, torch.float16), inputs), inputs)
    session = AdapterSession(exports[name], "cpu")
    assert session.manifest.dtype == "float16"
    found = real(run(session, inputs, "chat" if spec.mode == "dynamic" else None), inputs)
    assert found.dtype == np.float16
    assert rms_error(found, truth) < max(2 * rms_error(pytorch, truth), 2**-12)


def stored(folder: Path, name: str) -> np.ndarray:
    tensor = ir.load(folder / "model.onnx").graph.initializers[name].const_value
    return tensor.numpy()


def test_bfloat16_weights_are_the_exact_sums_rounded_once(bases, adapters, tmp_path):
    out = tmp_path / "out"
    export_to(out, ExportSpec("classifier", ("plain",), "merge", dtype="bfloat16", provider="cuda"), bases, adapters)
    base = safetensors.torch.load_file(bases["classifier"] / "model.safetensors")
    pair = safetensors.torch.load_file(adapters["plain"] / "adapter_model.safetensors")
    layer = "bert.pooler.dense"
    a, b = (pair[f"base_model.model.{layer}.lora_{side}.weight"].double() for side in "AB")
    exact = base[f"{layer}.weight"].double() + 2.0 * b @ a
    found = torch.from_numpy(stored(out, f"{layer}.weight").astype(np.float32))  # of a Gemm, which transposes
    assert torch.equal(found, exact.float().to(torch.bfloat16).float())
    with pytest.raises(EnvironmentUnusable, match="no kernel for an operator of this graph in its dtype"):
        AdapterSession(out, "cpu")


ALONE = """
import sys
for blocked in ("lora_export", "torch", "transformers", "peft", "onnx", "onnx_ir"):
    sys.modules[blocked] = None
import numpy as np, onnxruntime as ort
folder, out = sys.argv[1:]
options = ort.SessionOptions()
options.log_severity_level = 3
session = ort.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])
feeds = dict(np.load(out + "/feeds.npz"))
results = {}
for name in ("topic", "kind"):
    adapter = ort.LoraAdapter()
    adapter.Load(f"{folder}/adapters/{name}.onnx_adapter")
    run = ort.RunOptions()
    run.add_active_adapter(adapter)
    results[name] = session.run(["logits"], feeds, run)[0]
np.savez(out + "/results.npz", **results)
"""


def test_the_files_serve_with_onnxruntime_alone(exports, bases, adapters, tmp_path):
    """Without this package, torch or onnx: the graph and the `.onnx_adapter` files are all that a host needs."""
    inputs = inputs_for("bert")
    np.savez(tmp_path / "feeds.npz", **inputs)
    subprocess.run(
        [sys.executable, "-c", ALONE, str(exports["bert-dynamic"]), str(tmp_path)], check=True, cwd=tmp_path, timeout=60
    )
    found = np.load(tmp_path / "results.npz")
    for label in ("topic", "kind"):
        expected = outputs_of(peft(EXPORTS["bert-dynamic"], [label], bases, adapters), inputs)
        assert error(found[label], expected) < ROUNDING, label


def test_an_existing_folder_is_not_touched(exports, bases, adapters, tmp_path):
    spec = EXPORTS["classifier-merged"]
    out = tmp_path / "notes"
    out.mkdir()
    (out / "diary.txt").write_text("dear diary")
    for overwrite in (False, True):
        with pytest.raises(InputRefused, match="is no export; it is not replaced, even with --overwrite"):
            export_to(out, spec, bases, adapters, overwrite=overwrite)
    assert (out / "diary.txt").read_text() == "dear diary"
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_a_file_in_the_way_is_refused(bases, adapters, tmp_path):
    (tmp_path / "out").write_text("a file")
    for overwrite in (False, True):
        with pytest.raises(InputRefused, match="The output folder"):
            export_to(tmp_path / "out", EXPORTS["classifier-merged"], bases, adapters, overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "a file"


def test_classes_without_names_are_told(bases, adapters, tmp_path):
    named = tmp_path / "named"
    shutil.copytree(adapters["topic"], named)
    unnamed = tmp_path / "unnamed"
    shutil.copytree(adapters["topic"], unnamed, ignore=shutil.ignore_patterns("config.json"))
    labels = {index: f"subject {index}" for index in range(3)}
    (named / "config.json").write_text(json.dumps({"id2label": labels}))
    plan = make_plan(Request(str(bases["bert"]), ((str(named), None), (str(unnamed), None)), "dynamic"))
    said = [remark for remark in plan.remarks if "names no classes" in remark]
    assert len(said) == 1 and said[0].startswith("'unnamed'") and "model.config.save_pretrained(ADAPTER)" in said[0]


def test_overwrite_replaces_an_earlier_export_whole(exports, own, bases, adapters):
    out = own(exports["bert-dynamic"])
    export_to(out, EXPORTS["classifier-merged"], bases, adapters, overwrite=True)
    assert read_manifest(out).kind == "merged"
    assert not (out / "adapters").exists(), "files of the earlier export were left"
    assert [path.name for path in out.parent.iterdir()] == [out.name], "something was left beside the export"


def test_an_empty_folder_is_filled(bases, adapters, tmp_path):
    (tmp_path / "out").mkdir()
    export_to(tmp_path / "out", EXPORTS["classifier-merged"], bases, adapters)
    assert read_manifest(tmp_path / "out").kind == "merged"


def test_a_disk_too_small_is_refused_before_anything_is_written(bases, adapters, tmp_path, monkeypatch):
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 5, 5))
    with pytest.raises(EnvironmentUnusable, match="The disk is too small for this export") as refused:
        export_to(tmp_path / "out", EXPORTS["classifier-merged"], bases, adapters)
    assert "MB free" in refused.value.expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_leaves_nothing_behind(code, exports, own, bases, adapters, monkeypatch):
    out = own(exports["bert-merged"])
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(writer: object, data: memoryview) -> None:
        raise OSError(code, "no room")

    monkeypatch.setattr("lora_export.graph.bind._HashingWriter._put", full)
    with pytest.raises(EnvironmentUnusable, match="The disk is full; nothing was published"):
        export_to(out, EXPORTS["classifier-merged"], bases, adapters, overwrite=True)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before, "the earlier export was changed"


def test_an_interrupted_export_leaves_nothing_behind(bases, adapters, tmp_path):
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "writing weights" and done > total // 2:
            raise KeyboardInterrupt

    spec = EXPORTS["classifier-merged"]
    request = Request(str(bases[spec.base]), tuple((str(adapters[n]), n) for n in spec.adapters), "merge")
    with pytest.raises(KeyboardInterrupt):
        export(request, ExportOptions(tmp_path / "out"), progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_tells_what_the_folder_holds(exports, bases, adapters):
    folder = exports["bert-dynamic"]
    manifest = read_manifest(folder)
    assert (manifest.kind, manifest.task, manifest.dtype, manifest.provider) == (
        "dynamic", "text-classification", "float32", "cpu",
    )  # fmt: skip
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"lora_export.json"}
    assert set(manifest.files) == on_disk
    for name, expected in manifest.files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected, name
    for source, path in [(manifest.base, bases["bert"])] + [(r.source, adapters[r.name]) for r in manifest.adapters]:
        assert source.given == str(path)
        for name, expected in source.files.items():
            assert hashlib.sha256((path / name).read_bytes()).hexdigest() == expected, name
    topic, kind = manifest.adapters
    assert (topic.name, topic.ranks, topic.scales, topic.n_labels) == ("topic", (4,), (2.0,), 3)
    assert topic.targets == tuple(
        f"bert.encoder.layer.{i}.attention.self.{part}" for i in (0, 1) for part in ("query", "value")
    )
    assert topic.replaced == ("classifier.weight", "classifier.bias")
    assert (kind.ranks, kind.n_labels, kind.file) == ((2, 3), 5, "adapters/kind.onnx_adapter")
    assert kind.scales == pytest.approx((3 / 3**0.5, 3 / 2**0.5))
    assert set(manifest.versions) >= {"torch", "transformers", "peft", "onnx-ir", "onnxscript", "lora-export"}
    assert (folder / "tokenizer.json").read_bytes() == (bases["bert"] / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["bert-dynamic", "llama-dynamic", "vit-merged", "gpt2-dynamic"])
def test_the_contract_is_what_onnxruntime_sees(name, exports):
    folder = exports[name]
    contract = read_manifest(folder).contract
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])

    def seen(values) -> dict[str, tuple]:
        return {value.name: tuple(value.shape) for value in values}

    assert {s.name: s.dims for s in contract.inputs} == seen(session.get_inputs())
    assert {s.name: s.dims for s in contract.outputs} == seen(session.get_outputs())
    optional = (*contract.adapter_inputs, *contract.optional_inputs)
    assert {e.name: e.dims for e in optional} == seen(session.get_overridable_initializers())


def test_targets_add_inputs_by_path_or_by_last_parts(exports, bases, adapters, tmp_path):
    modules = read_manifest(exports["classifier-targets"]).contract.modules
    assert modules == (
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.1.attention.self.query",
        "bert.pooler.dense",
    )
    spec = ExportSpec("classifier", (), "dynamic", targets=("no_such",))
    with pytest.raises(UsageProblem, match="--targets 'no_such' names no linear module of the base") as refused:
        export_to(tmp_path / "out", spec, bases, adapters)
    assert "query" in refused.value.expected and "pooler" not in refused.value.expected
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def fits(bases, tmp_path) -> Path:
    """An adapter made after the export `classifier-targets`, for modules that it serves."""
    return tiny.adapter(
        bases["classifier"], tmp_path / "fits", "BertForSequenceClassification", r=5, lora_alpha=5,
        target_modules=["query", "pooler.dense"],
    )  # fmt: skip


def test_add_serves_an_adapter_made_after_the_export(exports, own, bases, fits):
    out = own(exports["classifier-targets"])
    graph = (out / "model.onnx").read_bytes()
    add_adapter(out, [(str(fits), "late")], SourceOverrides())
    inputs = inputs_for("classifier")
    expected = outputs_of(unmerged(bases["classifier"], "BertForSequenceClassification", [fits]), inputs)
    session = AdapterSession(out, "cpu")
    assert session.adapters == ("late",)
    assert error(run(session, inputs, "late"), expected) < ROUNDING
    assert (out / "model.onnx").read_bytes() == graph
    record = read_manifest(out).adapter("late")
    assert record.source.files["adapter_config.json"] == sha256_of(fits / "adapter_config.json")
    with pytest.raises(InputRefused, match="The export already has an adapter 'late'"):
        add_adapter(out, [(str(fits), "late")], SourceOverrides())


def test_add_refuses_by_name_what_the_graph_does_not_serve_and_changes_nothing(exports, own, adapters, fits):
    out = own(exports["classifier-targets"])
    before = {str(p): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(InputRefused, match="needs modules that the graph has no inputs for") as refused:
        add_adapter(out, [(str(fits), "fits"), (str(adapters["shades"]), None)], SourceOverrides())
    assert "'shades'" in refused.value.what
    assert "bert.encoder.layer.0.attention.self.value" in refused.value.where
    assert "`lora-export dynamic`: list this adapter among the others" in refused.value.next_step
    assert {str(p): p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_add_wants_a_dynamic_export_and_its_own_base(exports, own, adapters, bases):
    with pytest.raises(InputRefused, match="A merged export holds one task and takes no more adapters"):
        add_adapter(exports["bert-merged"], [(str(adapters["topic"]), None)], SourceOverrides())
    out = own(exports["classifier-targets"])
    with pytest.raises(InputRefused, match="This base is not the one that was exported") as refused:
        add_adapter(out, [(str(adapters["shades"]), None)], SourceOverrides(str(bases["tagger"])))
    assert "--base PATH" in refused.value.next_step


def test_no_cache_gives_the_same_bytes(exports, bases, adapters, tmp_path):
    """Every file is equal, the manifest included; for other processes see test_reproducible.py."""
    out, first = tmp_path / "again", exports["classifier-dynamic"]
    export_to(out, EXPORTS["classifier-dynamic"], bases, adapters, use_cache=False)
    names = sorted(str(p.relative_to(first)) for p in first.rglob("*") if p.is_file())
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == names
    for name in names:
        assert (out / name).read_bytes() == (first / name).read_bytes(), name


def damaged(base: Path, target: Path, change) -> Path:
    shutil.copytree(base, target)
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("value", "dtype", "message", "next_step"),
    [
        (1e6, "float16", "A weight overflows float16", "bfloat16"),
        (float("nan"), "float32", "A weight is not finite", "fetch the checkpoint again"),
    ],
)
def test_weights_that_the_export_cannot_hold_are_refused(value, dtype, message, next_step, bases, tmp_path):
    key = "bert.encoder.layer.1.output.dense.weight"
    base = damaged(bases["classifier"], tmp_path / "base", lambda tensors: tensors[key][3, 4].fill_(value))
    with pytest.raises(InputRefused, match=message) as refused:
        export(Request(str(base), (), "merge", dtype=dtype), ExportOptions(tmp_path / "out"))
    assert key in refused.value.where and next_step in refused.value.next_step
    assert refused.value.found.startswith("1 of ")
    assert not (tmp_path / "out").exists()


def test_a_tensor_missing_from_the_base_is_refused_by_name(bases, tmp_path):
    key = "bert.encoder.layer.1.output.dense.weight"
    base = damaged(bases["classifier"], tmp_path / "base", lambda tensors: tensors.pop(key))
    with pytest.raises(InputRefused, match="The base has no tensor for a parameter") as refused:
        export(Request(str(base), (), "merge"), ExportOptions(tmp_path / "out"))
    assert key in refused.value.where
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_a_head_that_nothing_brings_is_refused(bases, tmp_path):
    request = Request(str(bases["bert"]), (), "merge", task="text-classification")
    with pytest.raises(InputRefused, match="no adapter brings it") as refused:
        export(request, ExportOptions(tmp_path / "out"))
    assert "classifier." in refused.value.where
