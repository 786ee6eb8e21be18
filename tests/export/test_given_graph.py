"""Adapters on graphs that torch's exporters wrote, the old one (as Optimum uses it) and the new, and on optimized ones."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import peft
import pytest
import references
import torch
import transformers
from onnxruntime.quantization import matmul_nbits_quantizer
from onnxruntime.transformers import optimizer

from lora_export.artifact import read_manifest
from lora_export.errors import InputRefused, LoraExportError, UsageProblem
from lora_export.export.describe import describe_plan
from lora_export.export.plan import Request
from lora_export.pipeline import ExportOptions, check, export
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.verdict import Verdict

TEXT = ("input_ids", "attention_mask", "token_type_ids")
AXES = {0: "batch_size", 1: "sequence_length"}


class Named(torch.nn.Module):
    """A model as the exporters see it: inputs in order, outputs in a tuple."""

    def __init__(self, model: torch.nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *arrays: torch.Tensor):
        found = self.model(**dict(zip(self.inputs, arrays, strict=True)), **self.options)
        return tuple(found[name] for name in self.outputs)

    @property
    def options(self) -> dict:
        return {"use_cache": False} if self.inputs == ("input_ids", "attention_mask") else {}


def old_export(base: Path, model_class: str, path: Path, inputs=TEXT, outputs=("logits",), opset: int = 17) -> Path:
    """By TorchScript, as Optimum does it: weights are constants of numbered names, already transposed."""
    model = getattr(transformers, model_class).from_pretrained(base, attn_implementation="eager").eval()
    example = torch.ones(2, 6, dtype=torch.long)
    arrays = tuple(torch.zeros_like(example) if name == "token_type_ids" else example.clone() for name in inputs)
    torch.onnx.export(
        Named(model, inputs, outputs), arrays, str(path), input_names=list(inputs), output_names=list(outputs),
        dynamic_axes=dict.fromkeys((*inputs, "last_hidden_state"), AXES)
        | {"logits": AXES if "token_type_ids" not in inputs else {0: "batch_size"}, "pooler_output": {0: "batch_size"}},
        opset_version=opset, dynamo=False,
    )  # fmt: skip
    return path


def request(base: Path, adapter: Path, graph: Path, mode: str = "dynamic", **options) -> Request:
    return Request(str(base), ((str(adapter), None),), mode, graph=str(graph), **options)


@pytest.fixture(scope="module")
def bert_graph(bases, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    outputs = ("last_hidden_state", "pooler_output")
    return old_export(bases["bert"], "BertModel", folder / "model.onnx", outputs=outputs)


def agrees(folder: Path, base: Path, adapter: Path | None, model_class: str, feeds: dict, row_adapter=None) -> None:
    found = next(iter(AdapterSession(folder, "cpu").run(feeds, row_adapter).values()))
    expected = references.outputs_of(references.unmerged(base, model_class, [adapter] if adapter else []), feeds)
    np.testing.assert_allclose(references.real(found, feeds), references.real(expected, feeds), atol=2e-5)


def test_an_encoder_of_the_old_exporter_takes_adapters_and_passes_check(bases, adapters, bert_graph, tmp_path):
    said: list[str] = []
    asked = request(bases["bert"], adapters["features"], bert_graph.parent, task="feature-extraction")
    manifest = export(asked, ExportOptions(tmp_path / "out"), remark=said.append)
    contract = manifest.contract
    assert [spec.name for spec in contract.inputs] == list(TEXT)
    assert [spec.name for spec in contract.outputs] == ["last_hidden_state", "pooler_output"]
    assert set(contract.modules) == set(manifest.adapters[0].targets) and "pooler.dense" in contract.modules
    assert manifest.given_graph.given == str(bert_graph) and set(manifest.given_graph.files) == {"model.onnx"}
    assert read_manifest(tmp_path / "out") == manifest
    assert any("of the given graph's matrices are the base's" in each for each in said)
    feeds = references.inputs_for("bert")
    for adapter, name in ((adapters["features"], "features"), (None, None)):
        agrees(tmp_path / "out", bases["bert"], adapter, "BertModel", feeds, name)
    report, _ = check(tmp_path / "out")
    assert report.verdict is Verdict.PASS


def test_the_embedding_of_a_text_follows_its_states(bases, adapters, bert_graph, tmp_path):
    asked = request(bases["bert"], adapters["features"], bert_graph, pooling="mean")
    manifest = export(asked, ExportOptions(tmp_path / "out"))
    assert [spec.name for spec in manifest.contract.outputs][-1] == "sentence_embedding"
    feeds = references.inputs_for("bert")
    found = AdapterSession(tmp_path / "out", "cpu").run(feeds, "features")
    weights = feeds["attention_mask"][:, :, None] / feeds["attention_mask"].sum(axis=1)[:, None, None]
    np.testing.assert_allclose(
        found["sentence_embedding"], (found["last_hidden_state"] * weights).sum(axis=1), atol=1e-6
    )
    report, _ = check(tmp_path / "out")
    assert report.verdict is Verdict.PASS


@pytest.fixture(scope="module")
def graph_in_parts(bert_graph, tmp_path_factory) -> Path:
    """`bert_graph` with two products for each of a query, key and value: of a third of its rows, and of the others."""
    model = ir.load(bert_graph)
    for node in list(model.graph):
        weight = node.inputs[1].const_value if node.op_type == "MatMul" else None
        if weight is None or weight.shape[0] != weight.shape[1]:
            continue
        third = weight.shape[1] // 3
        arrays = np.split(weight.numpy(), [third], axis=1)
        values = [ir.Value(name=f"{node.inputs[1].name}.{n}", const_value=ir.tensor(a)) for n, a in enumerate(arrays)]
        for value in values:
            value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
            model.graph.initializers[value.name] = value
        products = [ir.node("MatMul", [node.inputs[0], value]) for value in values]
        joined = ir.node("Concat", [each.outputs[0] for each in products], attributes={"axis": -1})
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [*products, joined], node.outputs, joined.outputs
        )
    path = tmp_path_factory.mktemp("parts") / "model.onnx"
    ir.save(model, path)
    return path


@pytest.mark.parametrize("mode", ["dynamic", "merge"])
def test_a_module_in_parts_is_joined_for_its_adapter(mode, bases, adapters, graph_in_parts, tmp_path):
    """As GenAI's model builder takes Phi-3's gate_up_proj apart."""
    out, feeds = tmp_path / "out", references.inputs_for("bert")
    export(request(bases["bert"], adapters["features"], graph_in_parts, mode), ExportOptions(out))
    row_adapter = "features" if mode == "dynamic" else None
    agrees(out, bases["bert"], adapters["features"], "BertModel", feeds, row_adapter)
    agrees(out, bases["bert"], None, "BertModel", feeds) if mode == "dynamic" else None


METHODS = {
    "rtn": matmul_nbits_quantizer.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=False),
    "hqq": matmul_nbits_quantizer.HQQWeightOnlyQuantConfig(block_size=32),
}


@pytest.mark.parametrize("method", METHODS)
def test_integers_of_onnxruntimes_own_quantizers_take_adapters(method, bases, adapters, bert_graph, tmp_path):
    """Their graph has no shapes, and its sizes lie in another file."""
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
        onnx.load(bert_graph), algo_config=METHODS[method], block_size=32
    )
    quantizer.process()
    graph = tmp_path / "graph" / "model.onnx"
    graph.parent.mkdir()
    quantizer.model.save_model_to_file(str(graph), True)
    manifest = export(request(bases["bert"], adapters["features"], graph), ExportOptions(tmp_path / "out"))
    assert "encoder.layer.1.attention.self.value.weight" in manifest.quantization.weights
    feeds = references.inputs_for("bert")
    session = AdapterSession(tmp_path / "out", "cpu")
    expected = onnxruntime.InferenceSession(graph).run(["last_hidden_state"], feeds)[0]
    found, adapted = (session.run(feeds, name)["last_hidden_state"] for name in (None, "features"))
    np.testing.assert_allclose(references.real(found, feeds), references.real(expected, feeds), atol=2e-5)
    assert np.abs(references.real(adapted - found, feeds)).max() > 0.01


def test_a_merge_into_it_is_the_adapter(bases, adapters, bert_graph, tmp_path, monkeypatch):
    read: list[Path] = []
    load = ir.load
    monkeypatch.setattr(ir, "load", lambda path: (read.append(Path(path)), load(path))[1])
    asked = request(bases["bert"], adapters["features"], bert_graph, "merge", task="feature-extraction")
    assert export(asked, ExportOptions(tmp_path / "out")).given_graph is not None
    assert read.count(bert_graph) == 1
    agrees(tmp_path / "out", bases["bert"], adapters["features"], "BertModel", references.inputs_for("bert"))


def test_weights_inside_an_attention_are_merged_and_refused_as_inputs(bases, adapters, bert_graph, tmp_path):
    model = optimizer.optimize_model(str(bert_graph), "bert", num_heads=2, hidden_size=32, opt_level=0)
    assert "Attention" in {node.op_type for node in model.model.graph.node}
    graph = tmp_path / "optimized.onnx"
    model.save_model_to_file(str(graph))
    asked = request(bases["bert"], adapters["features"], graph, "merge", task="feature-extraction")
    export(asked, ExportOptions(tmp_path / "merged"))
    agrees(tmp_path / "merged", bases["bert"], adapters["features"], "BertModel", references.inputs_for("bert"))
    with pytest.raises(InputRefused) as refused:
        export(
            request(bases["bert"], adapters["features"], graph, task="feature-extraction"),
            ExportOptions(tmp_path / "no"),
        )
    assert "query (inside Attention)" in str(refused.value) and not (tmp_path / "no").exists()


def test_a_head_takes_the_place_of_the_graphs(bases, adapters, tmp_path):
    """Its other number of classes, too; what it replaces is gone from the graph."""
    graph = old_export(bases["classifier"], "BertForSequenceClassification", tmp_path / "model.onnx")
    export(request(bases["classifier"], adapters["shades"], graph), ExportOptions(tmp_path / "out"))
    feeds = references.inputs_for("classifier")
    model = references.unmerged(bases["classifier"], "BertForSequenceClassification", [adapters["shades"]], n_labels=4)
    found = AdapterSession(tmp_path / "out", "cpu").run(feeds, "shades")["logits"]
    np.testing.assert_allclose(found, references.outputs_of(model, feeds), atol=2e-5)
    with pytest.raises(InputRefused, match="and so the given graph, has not, or in another size") as refused:
        export(request(bases["classifier"], adapters["shades"], graph, "merge"), ExportOptions(tmp_path / "merged"))
    assert "classifier.weight" in refused.value.where and refused.value.found == "[4, 32]"
    assert "leave --graph out" in refused.value.next_step and "dynamic" in refused.value.next_step


def test_an_image_model_s_open_sizes_are_those_of_the_base(bases, adapters, tmp_path):
    path = tmp_path / "vit.onnx"
    model = transformers.ViTForImageClassification.from_pretrained(bases["vit"], attn_implementation="eager").eval()
    names = {0: "batch_size", 1: "channels", 2: "height", 3: "width"}
    torch.onnx.export(
        Named(model, ("pixel_values",), ("logits",)), (torch.zeros(2, 3, 16, 16),), str(path), dynamo=False,
        input_names=["pixel_values"], output_names=["logits"], opset_version=17,
        dynamic_axes={"pixel_values": names, "logits": {0: "batch_size"}},
    )  # fmt: skip
    manifest = export(request(bases["vit"], adapters["sights"], path), ExportOptions(tmp_path / "out"))
    assert [list(spec.dims) for spec in manifest.contract.inputs] == [["batch_size", 3, 16, 16]]
    report, _ = check(tmp_path / "out")
    assert report.verdict is Verdict.PASS


def test_a_decoder_of_the_old_exporter_reads_conv1d(bases, adapters, tmp_path):
    inputs = ("input_ids", "attention_mask")
    graph = old_export(bases["gpt2"], "GPT2LMHeadModel", tmp_path / "gpt2.onnx", inputs)
    manifest = export(request(bases["gpt2"], adapters["poet"], graph), ExportOptions(tmp_path / "out"))
    assert not manifest.contract.past and "transformer.h.0.attn.c_attn" in manifest.contract.modules
    feeds = references.text(3, 9, token_types=False)
    agrees(tmp_path / "out", bases["gpt2"], adapters["poet"], "GPT2LMHeadModel", feeds, "poet")
    report, _ = check(tmp_path / "out")
    assert report.verdict is Verdict.PASS and any("the given graph has none" in each for each in report.skipped)


@pytest.fixture(scope="module")
def new_graph(bases, tmp_path_factory) -> Path:
    """By torch.export: weights have the names of the wrapped model's parameters, dims symbols of their own."""
    path = tmp_path_factory.mktemp("new") / "bert.onnx"
    model = transformers.BertModel.from_pretrained(bases["bert"]).eval()
    example = torch.ones(2, 6, dtype=torch.long)
    dims = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens")}
    torch.onnx.export(
        Named(model, TEXT, ("last_hidden_state", "pooler_output")), (example, example.clone(), torch.zeros_like(example)),
        str(path), input_names=list(TEXT), output_names=["last_hidden_state", "pooler_output"],
        dynamic_shapes=((dims,) * 3,), dynamo=True, verbose=False,
    )  # fmt: skip
    return path


def test_a_graph_of_the_new_exporter_with_weights_in_another_file(bases, adapters, new_graph, tmp_path):
    asked = request(bases["bert"], adapters["features"], new_graph, task="feature-extraction")
    manifest = export(asked, ExportOptions(tmp_path / "out"))
    assert set(manifest.given_graph.files) == {"bert.onnx", "bert.onnx.data"}
    agrees(
        tmp_path / "out", bases["bert"], adapters["features"], "BertModel", references.inputs_for("bert"), "features"
    )


def test_a_dry_run_finds_what_the_export_would(bases, adapters, bert_graph, tmp_path):
    asked = request(bases["bert"], adapters["features"], bert_graph, task="feature-extraction")
    found = describe_plan(asked, tmp_path / "out")
    assert found["graph"] == {"path": str(bert_graph), "bytes": bert_graph.stat().st_size}
    assert any("of the given graph's matrices" in remark for remark in found["remarks"])
    with pytest.raises(InputRefused, match="lacks modules that adapters change"):
        describe_plan(request(bases["classifier"], adapters["plain"], bert_graph), tmp_path / "out")


def refused(kind: type[LoraExportError], asked: Request, out: Path, **options) -> str:
    with pytest.raises(kind) as caught:
        export(asked, ExportOptions(out, **options))
    assert not out.exists()
    return str(caught.value)


def test_what_is_no_graph_is_refused_by_what_it_is(bases, adapters, bert_graph, new_graph, tmp_path):
    base, adapter, out = bases["bert"], adapters["features"], tmp_path / "out"

    def said(graph: Path, kind=InputRefused, **options) -> str:
        return refused(kind, request(base, adapter, graph, task="feature-extraction", **options), out)

    assert "There is no such graph" in said(tmp_path / "gone")
    (tmp_path / "text.onnx").write_text("no graph")
    assert "is no ONNX file" in said(tmp_path / "text.onnx")
    alone = tmp_path / "alone" / "bert.onnx"
    alone.parent.mkdir()
    alone.write_bytes(new_graph.read_bytes())
    assert "bert.onnx.data" in said(alone)
    assert "--dtype" in said(bert_graph, UsageProblem, dtype="float16")
    model = ir.load(bert_graph)
    model.graph.opset_imports[""] = 11
    ir.save(model, tmp_path / "old.onnx")
    assert "opset 11" in said(tmp_path / "old.onnx") and "no graph" not in said(tmp_path / "old.onnx")
    t5 = Request(str(bases["t5"]), ((str(adapters["t5-all"]), None),), "dynamic", graph=str(bert_graph))
    assert "one graph only" in refused(InputRefused, t5, out)


def test_numbers_that_several_modules_share_are_nobodys(bases, tmp_path):
    """The old exporter stores equal tensors once: two queries of the same weights, and biases of zeros."""
    model = transformers.BertModel.from_pretrained(bases["bert"], attn_implementation="eager").eval()
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.self.query.bias.zero_()
            layer.attention.self.key.bias.zero_()
        first, second = (layer.attention.self.query for layer in model.encoder.layer)
        second.weight.copy_(first.weight)
    model.save_pretrained(tmp_path / "base")
    for file in bases["bert"].glob("tokenizer*"):
        shutil.copy(file, tmp_path / "base")
    outputs = ("last_hidden_state", "pooler_output")
    graph = old_export(tmp_path / "base", "BertModel", tmp_path / "model.onnx", outputs=outputs)
    for name, module, bias in (
        ("one", "layer.0.attention.self.query", "none"),
        ("biases", "layer.0.attention.self.key", "lora_only"),
    ):
        options = peft.LoraConfig(r=2, task_type="FEATURE_EXTRACTION", target_modules=[module], bias=bias)
        tuned = peft.get_peft_model(transformers.BertModel.from_pretrained(tmp_path / "base"), options)
        for key, parameter in tuned.named_parameters():
            if "lora_B" in key or key.endswith("key.bias"):
                torch.nn.init.normal_(parameter, std=0.2)
        tuned.save_pretrained(tmp_path / name)
        for mode in ("dynamic", "merge"):
            asked = request(tmp_path / "base", tmp_path / name, graph, mode, task="feature-extraction")
            assert "layer.0" in refused(InputRefused, asked, tmp_path / "out")


def test_a_graph_with_adapter_inputs_is_refused(bases, adapters, bert_graph, tmp_path):
    asked = request(bases["bert"], adapters["features"], bert_graph, task="feature-extraction")
    export(asked, ExportOptions(tmp_path / "first"))
    again = request(bases["bert"], adapters["features"], tmp_path / "first", task="feature-extraction")
    assert "inputs for adapters already" in refused(InputRefused, again, tmp_path / "out")


def test_damaged_weights_beside_the_graph_are_refused(bases, adapters, new_graph, tmp_path):
    for name in ("bert.onnx", "bert.onnx.data"):
        shutil.copy(new_graph.parent / name, tmp_path / name)
    os.truncate(tmp_path / "bert.onnx.data", 5000)
    asked = request(bases["bert"], adapters["features"], tmp_path / "bert.onnx", task="feature-extraction")
    assert "is cut off" in refused(InputRefused, asked, tmp_path / "out")
    model = onnx.load(new_graph, load_external_data=False)
    for entry in (entry for tensor in model.graph.initializer for entry in tensor.external_data):
        if entry.key == "location":
            entry.value = "../elsewhere.data"
    onnx.save(model, tmp_path / "bert.onnx")
    assert "../elsewhere.data" in refused(InputRefused, asked, tmp_path / "out")


def test_a_graph_of_other_weights_is_refused_by_module(bases, adapters, bert_graph, tmp_path):
    """One number of one matrix differs: that module is not there."""
    model = onnx.load(bert_graph)
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 2 and "MatMul" in tensor.name)
    array = onnx.numpy_helper.to_array(weight).copy()
    array[3, 5] += 1e-6
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, tmp_path / "other.onnx")
    said = refused(
        InputRefused, request(bases["bert"], adapters["features"], tmp_path / "other.onnx", task="feature-extraction"),
        tmp_path / "out",
    )  # fmt: skip
    assert "encoder.layer.0.attention.self.query" in said
    assert "encoder.layer.1" not in said


def test_check_fails_a_graph_whose_other_weights_are_not_the_bases(bases, adapters, bert_graph, tmp_path):
    """What no adapter touches is taken as it is given; that it is the base's model is for `check` to prove."""
    model = onnx.load(bert_graph)
    norm = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("layer.1.output.LayerNorm.bias"))
    array = onnx.numpy_helper.to_array(norm) + np.float32(0.01)
    norm.CopyFrom(onnx.numpy_helper.from_array(array, norm.name))
    onnx.save(model, tmp_path / "other.onnx")
    asked = request(bases["bert"], adapters["features"], tmp_path / "other.onnx", task="feature-extraction")
    export(asked, ExportOptions(tmp_path / "out"))
    report, _ = check(tmp_path / "out")
    assert report.verdict is Verdict.FAIL


def test_settings_go_along_and_name_the_file_as_it_is_here(bases, adapters, tmp_path):
    inputs = ("input_ids", "attention_mask")
    graph = old_export(bases["gpt2"], "GPT2LMHeadModel", tmp_path / "decoder.onnx", inputs)
    settings = {"model": {"type": "gpt2", "decoder": {"filename": "decoder.onnx", "head_size": 8}}, "search": {}}
    (tmp_path / "genai_config.json").write_text(json.dumps(settings))
    manifest = export(request(bases["gpt2"], adapters["poet"], tmp_path), ExportOptions(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert written["model"]["decoder"] == {"filename": "model.onnx", "head_size": 8} and written["search"] == {}
    assert "genai_config.json" in manifest.files and graph.exists()
