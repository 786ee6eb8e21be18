"""`check` names where a damaged export differs: the module, the node, and a script that shows it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import damage
import numpy as np
import onnx
import pytest
import torch

from lora_export.check.context import CheckOptions, run_reference
from lora_export.check.divergence_results import Reproduction
from lora_export.check.locate import probe, where
from lora_export.check.locate.probe import Seen, _terms_of
from lora_export.check.reference.module_calls import ModuleCall, recorded
from lora_export.check.results import CheckReport
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import check

# Runs a script where nothing but the standard library, NumPy and ONNX Runtime can be imported.
ONLY_ONNXRUNTIME = """
import runpy, sys
from importlib.abc import MetaPathFinder

class Only(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "numpy", "onnxruntime"}:
            raise ImportError(f"{name} is not to be imported")

sys.path.insert(0, sys.argv[1])
sys.meta_path.insert(0, Only())
runpy.run_path(sys.argv[2], run_name="__main__")
"""


def checked(folder: Path, **options: object) -> CheckReport:
    return check(folder, SourceOverrides(), CheckOptions(provider="cpu", **options))[0]


def reproduced(folder: Path, shown: Reproduction) -> subprocess.CompletedProcess:
    site = str(Path(np.__file__).parents[1])
    command = [sys.executable, "-I", "-S", "-c", ONLY_ONNXRUNTIME, site, str(folder / shown.script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def printed(done: subprocess.CompletedProcess) -> float:
    return float(re.search(r"largest difference (\S+),", done.stdout)[1])


@dataclass(frozen=True)
class Damage:
    """One place of an export damaged, and what `check` must name: module, operator, and a tensor that the node reads.

    Attributes:
        between: Nodes up to the first value that is known to differ; None for any number.
    """

    export: str
    do: Callable[[Path], None]
    case: str
    module: str
    op_type: str
    reads: str
    graph: str = "model"
    between: int | None = 1


def dropped(module: str, file: str) -> Callable[[Path], None]:
    return lambda folder: damage.adapter(folder, file, damage.drop(module))


def a_transposed(module: str, file: str) -> Callable[[Path], None]:
    return lambda folder: damage.adapter(folder, file, damage.transpose_a(module))


def weight_of_another(name: str, other: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        array = damage.weight_of(folder, other)
        damage.stored(folder, name, lambda _: array)

    return do


def scaled(name: str, factor: float) -> Callable[[Path], None]:
    return lambda folder: damage.stored(folder, name, lambda array: array * np.float32(factor))


def nan_in(name: str) -> Callable[[Path], None]:
    def change(array: np.ndarray) -> np.ndarray:
        array[0, 0] = np.nan
        return array

    return lambda folder: damage.stored(folder, name, change)


def epsilon(weight: str, value: float) -> Callable[[Path], None]:
    def change(model: onnx.ModelProto) -> None:
        next(a for a in damage.reader(model, weight).attribute if a.name == "epsilon").f = value

    return lambda folder: damage.graph(folder, change)


def attention_scale(operator: str, layer: int) -> Callable[[Path], None]:
    """Another scale in one layer's attention."""

    def change(model: onnx.ModelProto) -> None:
        node = [node for node in model.graph.node if node.op_type == operator][layer]
        next(attribute for attribute in node.attribute if attribute.name == "scale").f *= 1.3

    return lambda folder: damage.graph(folder, change)


def no_mask(folder: Path) -> None:
    """Every token is taken for a real one where the cache's order is made: padding on the left is attended."""

    def change(model: onnx.ModelProto) -> None:
        ones = onnx.helper.make_node("ReduceMax", ["attention_mask"], ["all_real"], name="all_real", keepdims=1)
        shape = onnx.helper.make_node("Shape", ["attention_mask"], ["mask_shape"], name="mask_shape")
        spread = onnx.helper.make_node("Expand", ["all_real", "mask_shape"], ["no_padding"], name="no_padding")
        for node in model.graph.node:
            if node.op_type == "Slice" and node.input[0] == "attention_mask":
                node.input[0] = "no_padding"
        for place, node in enumerate((ones, shape, spread)):
            model.graph.node.insert(place, node)

    damage.graph(folder, change)


def cache_off_by_one(layer: int) -> Callable[[Path], None]:
    """The oldest key of the cache taken for the newest."""

    def change(model: onnx.ModelProto) -> None:
        attention = damage.producer(model, f"present.{layer}.key")
        place, past = list(model.graph.node).index(attention), f"past_key_values.{layer}.key"
        for name, value in (("zero", 0), ("one", 1), ("end", 2**31 - 1), ("axis", 2)):
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value], np.int64), f"off_{name}"))
        nodes = [
            onnx.helper.make_node("Slice", [past, "off_one", "off_end", "off_axis"], ["later"], name="later"),
            onnx.helper.make_node("Slice", [past, "off_zero", "off_one", "off_axis"], ["first"], name="first"),
            onnx.helper.make_node("Concat", ["later", "first"], ["rolled"], name="rolled", axis=2),
        ]
        for offset, node in enumerate(nodes):
            model.graph.node.insert(place + offset, node)
        attention.input[3] = "rolled"

    return lambda folder: damage.graph(folder, change)


def other_scores(folder: Path) -> None:
    """Another factor on the scores of texts and images, which no module computes."""

    def change(model: onnx.ModelProto) -> None:
        makes = {value: node for node in model.graph.node for value in node.output}
        scores = damage.producer(model, "logits_per_image")
        while scores.op_type != "Mul":
            scores = makes[scores.input[0]]
        factor = next(entry for entry in model.graph.initializer if entry.name in scores.input)
        factor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(factor) * np.float32(2), factor.name))

    damage.graph(folder, change)


def first_row_for_all(name: str) -> Callable[[Path], None]:
    """An adapter input of which every row takes the first row's."""

    def change(model: onnx.ModelProto) -> None:
        product = damage.reader(model, name)
        place = list(model.graph.node).index(product)
        for start in (0, 1):
            array = np.array([start], np.int64)
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, f"row_{start}"))
        model.graph.node.insert(
            place, onnx.helper.make_node("Slice", [name, "row_0", "row_1", "row_0"], ["first_row"], name="first_row")
        )
        product.input[1] = "first_row"

    return lambda folder: damage.graph(folder, change)


BERT, LLAMA, VIT = "bert.encoder.layer", "model.layers", "vit.layers"
DAMAGES = {
    "BERT, pair dropped": Damage(
        "bert-dynamic", dropped(f"{BERT}.0.attention.self.value", "topic.onnx_adapter"), "topic",
        f"{BERT}.0.attention.self.value", "MatMul", f"{BERT}.0.attention.self.value.lora_A.weight",
    ),
    "BERT, A transposed": Damage(
        "bert-dynamic", a_transposed(f"{BERT}.1.attention.self.query", "topic.onnx_adapter"), "topic",
        f"{BERT}.1.attention.self.query", "MatMul", f"{BERT}.1.attention.self.query.lora_A.weight",
    ),
    "BERT, only in mixed rows": Damage(
        "bert-dynamic", first_row_for_all(f"{BERT}.1.attention.self.query.lora_B.weight"), "8 mixed rows",
        f"{BERT}.1.attention.self.query", "Slice", f"{BERT}.1.attention.self.query.lora_B.weight", between=None,
    ),
    "BERT merged, another layer's weight": Damage(
        "classifier-merged",
        weight_of_another(f"{BERT}.1.intermediate.dense.weight", f"{BERT}.0.intermediate.dense.weight"), "plain",
        f"{BERT}.1.intermediate.dense", "MatMul", f"{BERT}.1.intermediate.dense.weight",
    ),
    "BERT merged, attention's scale": Damage(
        "classifier-merged", attention_scale("Attention", 1), "plain", f"{BERT}.1.attention.self", "Attention",
        "+".join(f"{BERT}.1.attention.self.{each}.weight" for each in ("query", "key", "value")), between=None,
    ),
    "Llama, pair dropped": Damage(
        "llama-dynamic", dropped(f"{LLAMA}.1.mlp.down_proj", "code.onnx_adapter"), "code",
        f"{LLAMA}.1.mlp.down_proj", "MatMul", f"{LLAMA}.1.mlp.down_proj.lora_A.weight",
    ),
    "Llama, no mask": Damage(
        "llama-dynamic", no_mask, "chat: padded on the left", f"{LLAMA}.0.self_attn", "GroupQueryAttention",
        "past_key_values.0.key", between=None,
    ),
    "Llama, cache off by one": Damage(
        "llama-dynamic", cache_off_by_one(1), "chat: cached steps",
        f"{LLAMA}.1.self_attn", "Slice", "past_key_values.1.key", between=None,
    ),
    "Llama merged, norm": Damage(
        "llama-merged", scaled(f"{LLAMA}.1.post_attention_layernorm.weight", 1.1), "chat",
        f"{LLAMA}.1.post_attention_layernorm", "SkipSimplifiedLayerNormalization",
        f"{LLAMA}.1.post_attention_layernorm.weight",
    ),
    "Llama fused for CUDA, packed weight": Damage(
        "llama-cuda-base",
        scaled("+".join(f"{LLAMA}.1.self_attn.{name}_proj.weight" for name in "qkv"), 1.01), "base",
        f"{LLAMA}.1.self_attn.q_proj", "MatMul", "+".join(f"{LLAMA}.1.self_attn.{name}_proj.weight" for name in "qkv"),
        between=2,
    ),
    "Llama fused for CUDA, pair dropped": Damage(
        "llama-cuda", dropped(f"{LLAMA}.1.self_attn.q_proj+k_proj+v_proj", "chat.onnx_adapter"), "chat",
        f"{LLAMA}.1.self_attn.q_proj", "MatMul", f"{LLAMA}.1.self_attn.q_proj+k_proj+v_proj.lora_A.weight",
        between=3,
    ),
    "GPT-2, pair dropped": Damage(
        "gpt2-dynamic", dropped("transformer.h.1.attn.c_attn", "poet.onnx_adapter"), "poet",
        "transformer.h.1.attn.c_attn", "MatMul", "transformer.h.1.attn.c_attn.lora_A.weight",
    ),
    "GPT-2 merged, attention's scale": Damage(
        "gpt2-merged", attention_scale("GroupQueryAttention", 1), "poet", "transformer.h.1.attn", "GroupQueryAttention",
        "past_key_values.1.key", between=None,
    ),
    "ViT, epsilon": Damage(
        "vit-dynamic", epsilon(f"{VIT}.0.layernorm_after.weight", 0.1), "sights",
        f"{VIT}.0.layernorm_after", "SkipLayerNormalization", f"{VIT}.0.layernorm_after.weight",
    ),
    "ViT merged, NaN": Damage(
        "vit-merged", nan_in(f"{VIT}.1.mlp.fc1.weight"), "sights", f"{VIT}.1.mlp.fc1", "MatMul", f"{VIT}.1.mlp.fc1.weight",
    ),
    "ViT, a bias in a fused operator": Damage(
        "vit-merged", scaled(f"{VIT}.0.mlp.fc1.bias", 2), "sights",
        f"{VIT}.0.mlp.activation_fn", "BiasGelu", f"{VIT}.0.mlp.fc1.bias",
    ),
    "CLIP merged, the scores' scale": Damage(
        "clip-merged", other_scores, "pairs: texts for an image", "", "Mul", "", between=None,
    ),
    "T5, encoder": Damage(
        "t5-dynamic", dropped("encoder.block.0.layer.0.SelfAttention.q", "t5-attention.encoder_model.onnx_adapter"),
        "t5-attention", "encoder.block.0.layer.0.SelfAttention.q", "MatMul",
        "encoder.block.0.layer.0.SelfAttention.q.lora_A.weight", "encoder_model",
    ),
    "T5, first step": Damage(
        "t5-dynamic", dropped("decoder.block.1.layer.1.EncDecAttention.v", "t5-attention.decoder_model.onnx_adapter"),
        "t5-attention", "decoder.block.1.layer.1.EncDecAttention.v", "MatMul",
        "decoder.block.1.layer.1.EncDecAttention.v.lora_A.weight", "decoder_model",
    ),
    "T5, later steps": Damage(
        "t5-dynamic",
        dropped("decoder.block.1.layer.0.SelfAttention.v", "t5-attention.decoder_with_past_model.onnx_adapter"),
        "t5-attention: cached steps", "decoder.block.1.layer.0.SelfAttention.v", "MatMul",
        "decoder.block.1.layer.0.SelfAttention.v.lora_A.weight", "decoder_with_past_model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_the_damaged_module_and_node_are_named(name, exports, own):
    damaged = DAMAGES[name]
    folder = own(exports[damaged.export])
    damaged.do(folder)
    report = checked(folder)
    found = report.divergence
    first = next(case for case in report.cases if not case.passed)
    assert found.case == first.name == damaged.case
    assert (found.graph, found.module, found.op_type) == (damaged.graph, damaged.module, damaged.op_type)
    assert not damaged.reads or damaged.reads in found.reads
    assert damaged.between in (None, found.between) and found.between > 0
    assert found.module in found.sentence and found.node in found.sentence
    # Before it all agrees, or nothing is compared, and it leads to the output.
    states = [value.diverges for value in found.compared]
    assert states[0] is False and True in states
    done = reproduced(folder, found.reproduction)
    assert done.returncode == 1, done.stderr
    if "NaN" in name:
        assert math.isinf(printed(done)) and math.isnan(found.reproduction.error)
    else:
        assert printed(done) == pytest.approx(found.reproduction.error, rel=1e-5)
    if damaged.graph == "model" and "NaN" not in name:
        assert printed(done) == pytest.approx(first.largest_error, rel=0.05) or "cached" in found.case


def test_the_node_is_known_and_its_script_passes_once_the_export_is_sound(exports, own):
    folder = own(exports["bert-dynamic"])
    file = folder / "adapters" / "topic.onnx_adapter"
    sound, manifest = file.read_bytes(), (folder / "lora_export.json").read_bytes()
    damage.adapter(folder, file.name, damage.drop(f"{BERT}.0.attention.self.value"))
    report, files = check(folder, SourceOverrides(), CheckOptions(provider="cpu"))
    shown = report.divergence.reproduction
    assert {"reproduce.py", "reproduce.npz"} <= set(files)
    assert "shape" in report.divergence.sentence and "[1, 96, 4] in PyTorch" in report.divergence.sentence
    text = (folder / "reports" / "check.html").read_text()
    assert report.divergence.module in text and f"python {folder}/reports/reproduce.py" in text
    stored = json.loads((folder / "reports" / "check.json").read_text())["divergence"]
    assert stored["module"] == report.divergence.module and stored["reproduction"]["script"] == shown.script
    # With the adapter's own tensors fed, the same script agrees.
    arrays = dict(np.load(folder / shown.arrays))
    sound_feeds = exports["bert-dynamic"] / "adapters" / "topic.onnx_adapter"
    arrays |= {f"feed:{key}": value for key, value in damage.tensors_of(sound_feeds).items()}
    np.savez(folder / shown.arrays, **arrays)
    done = reproduced(folder, shown)
    assert done.returncode == 0 and printed(done) < shown.tolerance / 10, done.stdout
    # A check that passes removes them.
    file.write_bytes(sound)
    (folder / "lora_export.json").write_bytes(manifest)
    before = {path.name for path in folder.iterdir()}
    report, files = check(folder, SourceOverrides(), CheckOptions(provider="cpu"))
    assert report.divergence is None and not any(name.startswith("reproduce") for name in files)
    assert not list((folder / "reports").glob("reproduce*")) and {path.name for path in folder.iterdir()} == before


def test_an_adapter_without_effect_has_no_node_to_name(exports, own, adapters, monkeypatch):
    """The export is what PEFT computes; the case fails because that is nothing."""
    from lora_export.check.cases.examination import Examination

    def same(examination, examined, batches):
        return run_reference(examined.reference, batches)

    monkeypatch.setattr(Examination, "without", same)
    found = checked(own(exports["classifier-merged"])).divergence
    assert not found.found and found.reproduction is None
    assert found.sentence.startswith("On the row with the largest error every module agrees with PyTorch")
    assert "the adapter has no effect here" in found.sentence


SOUND = [
    "bert-dynamic", "classifier-merged", "llama-dynamic", "llama-cuda", "gpt2-dynamic", "vit-dynamic", "albert-dynamic",
    "clip-dynamic", "t5-dynamic",
]  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_the_error_by_layer_of_a_sound_export_is_rounding_in_every_adapted_module(name, exports, own, monkeypatch):
    looked: list[Seen] = []
    monkeypatch.setattr(where, "look", lambda *given: looked.append(probe.look(*given)) or looked[-1])
    report = checked(own(exports[name]))
    assert report.divergence is None
    # Inputs, and the parts of adapted modules: what a damaged export is judged by.
    compared = [value for seen in looked for graph in seen.graphs for value in (*graph.compared, *graph.outputs)]
    assert not [value for value in compared if not value.error_relative < 5e-5]
    # Of a pair that modules share, as on CUDA, the product of A is no module's own.
    of_pairs = {"base", "lora_B"} if name == "llama-cuda" else {"base", "lora_A", "lora_B"}
    assert {"input", "output"} | (of_pairs if "merged" not in name else set()) <= {value.what for value in compared}
    manifest = json.loads((exports[name] / "lora_export.json").read_text())
    records = {record["name"]: record for record in manifest["adapters"]}
    assert {layers.name for layers in report.layers} == {*records, *(["base"] if "merged" not in name else [])}
    # Merged projections are packed into the attention, and none of them is a value of the graph.
    packed = [f"{BERT}.{layer}.attention.self.{each}" for layer in (0, 1) for each in ("query", "key", "value")]
    hidden = packed if name == "classifier-merged" else []
    for layers in report.layers:
        assert list(layers.not_seen) == hidden
        worst = layers.worst
        assert worst.error_relative < 5e-5, worst
        assert all(module.what == "output" for module in layers.modules)
        assert sum(module.error_relative > 0 for module in layers.modules) > len(layers.modules) / 2
        targets = records.get(layers.name, {"targets": []})["targets"]
        assert set(targets) <= {module.module for module in layers.modules}.union(hidden)


def test_an_output_of_few_numbers_has_the_terms_of_the_head_that_gives_it():
    call = ModuleCall("head", "output", "", None, "", np.float32([[0.25]]), terms=3.0)
    other = replace(call, output=np.float32([[0.5]]), terms=7.0)
    assert _terms_of(np.float32([[0.25]]), [call, other]) == 3.0
    assert _terms_of(np.float32([[0.75]]), [call, other]) is None


def test_the_terms_of_a_linear_map_are_those_of_its_largest_number():
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0, 0.0], [3.0, 0.0, 4.0]]))
        layer.bias.copy_(torch.tensor([0.0, 12.0]))
    model = torch.nn.Sequential(layer)
    with recorded(model) as recording:
        model(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    assert next(call for call in recording.calls if call.module == "0").terms == pytest.approx(13.0)  # 3, 4, 12
    wide = torch.nn.Sequential(torch.nn.Linear(3, 8))
    with recorded(wide) as recording:
        wide(torch.zeros(1, 3))
    assert recording.calls[0].terms is None
