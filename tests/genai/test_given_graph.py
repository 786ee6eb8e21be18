"""Adapters on graphs of ONNX Runtime GenAI's model builder: the packed projections of its float32, its int4, its float16.

The builder is that of the environment of GenAI; it runs in this process, which has what it imports already.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import peft
import pytest
import references
import tiny
import torch
import transformers
from genai_client import NEW_TOKENS, PROMPT, PYTHON, genai

from lora_export.bench.plan import BASE, MERGED, BenchOptions, plan_bench
from lora_export.check.context import CheckOptions
from lora_export.errors import InputRefused
from lora_export.export.plan import Request
from lora_export.pipeline import ExportOptions, add_adapter, check, export, export_compared
from lora_export.quantization import Method
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.verdict import Verdict

Build = Callable[[Path, str], Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Build:
    """Makes the builder's graph of a base in a precision; each once."""
    models = next(PYTHON.parents[1].glob("lib/python*/site-packages/onnxruntime_genai/models"))
    made: dict[tuple[Path, str], Path] = {}

    def build(base: Path, precision: str) -> Path:
        if (base, precision) not in made:
            folder = tmp_path_factory.mktemp("built")
            command = ["builder.py", "-m", base, "-o", folder / "out", "-p", precision, "-e", "cpu", "-c", folder]
            before = sys.argv, sys.path[:]
            sys.argv = list(map(str, command))
            sys.path.insert(0, str(models))
            try:
                runpy.run_path(str(models / "builder.py"), run_name="__main__")
            finally:
                sys.argv, sys.path[:] = before
            made[base, precision] = folder / "out"
        return made[base, precision]

    return build


def exported(base: Path, adapters: list[Path], graph: Path, out: Path, mode: str = "dynamic", **options):
    request = Request(str(base), tuple((str(each), None) for each in adapters), mode, graph=str(graph))
    return export(request, ExportOptions(out, **options))


def logits(folder: Path, rows: list[str | None], side: str) -> np.ndarray:
    """Of a ragged prompt, padded on one `side`, and one step after it; padding left out."""
    inputs = references.text(len(rows), 9, token_types=False)
    if side == "left":
        inputs = {name: np.stack([np.roll(r, int((m == 0).sum())) for r, m in zip(array, inputs["attention_mask"], strict=True)])
                  for name, array in inputs.items()}  # fmt: skip
    session = AdapterSession(folder, "cpu")
    first = session.run(inputs, rows)
    step = {
        "input_ids": np.full((len(rows), 1), 7),
        "attention_mask": np.pad(inputs["attention_mask"], ((0, 0), (0, 1)), constant_values=1),
    }
    step |= {name.replace("present", "past_key_values"): array for name, array in first.items() if name != "logits"}
    second = session.run(step, rows)
    return np.concatenate([first["logits"][inputs["attention_mask"] == 1], second["logits"][:, 0]])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_packed_graph_serves_what_our_own_does(bases, adapters, exports, built, tmp_path, side):
    """Ranks by module, rows with an adapter each and padding on either side, on query, key and value in one product."""
    folder, rows = tmp_path / "out", ["code", None, "chat", "code"]
    manifest = exported(bases["llama"], [adapters["chat"], adapters["code"]], built(bases["llama"], "fp32"), folder)
    attentions = [node for node in ir.load(folder / "model.onnx").graph if node.op_type == "GroupQueryAttention"]
    assert len(attentions) == 2 and all(node.inputs[1] is None and node.inputs[2] is None for node in attentions)
    contract = manifest.contract
    assert [spec.name for spec in contract.inputs if "past" not in spec.name] == ["input_ids", "attention_mask"]
    assert all(isinstance(spec.dims[3], int) for spec in contract.past)
    np.testing.assert_allclose(logits(folder, rows, side), logits(exports["llama-dynamic"], rows, side), atol=3e-5)


def test_a_merge_into_the_packed_graph(bases, adapters, exports, built, tmp_path):
    exported(bases["llama"], [adapters["chat"]], built(bases["llama"], "fp32"), tmp_path / "out", "merge")
    found, own = (logits(folder, [None] * 3, "left") for folder in (tmp_path / "out", exports["llama-merged"]))
    np.testing.assert_allclose(found, own, atol=3e-5)


def test_int4_with_a_float_adapter_is_proven(bases, adapters, built, tmp_path):
    """Against PEFT on the base that the graph's integers are, its embedding's included."""
    folder = tmp_path / "out"
    manifest = exported(bases["llama"], [adapters["code"]], built(bases["llama"], "int4"), folder)
    stored = manifest.quantization
    assert (stored.bits, stored.method, stored.quantizer) == (4, Method.GIVEN, "onnxruntime-genai")
    assert "model.layers.0.self_attn.q_proj.weight" in stored.weights and "lm_head.weight" in stored.weights
    report, _ = check(folder, options=CheckOptions(n_rows=6))
    assert report.verdict is Verdict.PASS, [case for case in report.cases if not case.passed]
    weights = next(case for case in report.cases if case.group == "weights")
    assert all(measured.limit is None for measured in weights.measures)
    assert weights.value("weights") < 1e-6  # the builder rounds to nearest, too
    assert any("another tool did" in sentence for sentence in report.skipped)


def test_a_wrong_scale_in_the_graph_is_not_the_bases(bases, adapters, built, tmp_path):
    """At export the module is not found; changed afterwards, a limit on the weights finds it."""
    source = built(bases["llama"], "int4")
    model = ir.load(source / "model.onnx")
    scales = model.graph.initializers["model.layers.0.mlp.up_proj.MatMul.weight_scales"]
    array = scales.const_value.numpy().copy()
    array[3, 0] *= 16
    scales.const_value = ir.tensor(array, name=scales.name)
    graph = tmp_path / "graph" / "model.onnx"
    graph.parent.mkdir()
    ir.save(model, graph, external_data="model.onnx.data")
    with pytest.raises(InputRefused) as refused:
        exported(bases["llama"], [adapters["code"]], graph, tmp_path / "out")
    assert "model.layers.0.mlp.up_proj" in str(refused.value) and "q_proj" not in str(refused.value)


def test_kinds_of_inputs_on_the_builders_graph(bases, adapters, built, tmp_path):
    """Gains, biases, a gate and a head of its own; an embedding that the head shares is refused by name."""
    graph, kinds = built(bases["llama"], "fp32"), ["chat", "gains", "biases", "voice", "activated"]
    exported(bases["llama"], [adapters[kind] for kind in kinds], graph, tmp_path / "out")
    session = AdapterSession(tmp_path / "out", "cpu")
    feeds = references.text(2, 9, token_types=False)
    feeds["input_ids"][:, 3:5] = [70, 71]
    for kind in kinds:
        expected = references.outputs_of(
            references.unmerged(bases["llama"], "LlamaForCausalLM", [adapters[kind]]), feeds
        )
        found = session.run(feeds, kind, ["logits"])["logits"]
        np.testing.assert_allclose(
            references.real(found, feeds), references.real(expected, feeds), atol=3e-5, err_msg=kind
        )
    for kind in ("tokens", "words"):
        with pytest.raises(InputRefused, match="embed_tokens"):
            exported(bases["llama"], [adapters[kind]], graph, tmp_path / kind)
    with pytest.raises(InputRefused, match="uses in several places"):
        exported(bases["llama"], [adapters["speak"]], graph, tmp_path / "speak", "merge")
    for kind, mode in (("gains", "dynamic"), ("voice", "dynamic"), ("chat", "merge")):
        with pytest.raises(InputRefused, match="integers"):
            exported(bases["llama"], [adapters[kind]], built(bases["llama"], "int4"), tmp_path / kind, mode)
    assert not list(tmp_path.glob("[!o]*"))


def test_genai_generates_the_same_with_the_adapters_file(bases, adapters, built, tmp_path):
    folder = tmp_path / "out"
    exported(bases["llama"], [adapters["code"]], built(bases["llama"], "int4"), folder)
    add_adapter(folder, ((str(adapters["chat"]), None),))
    session = AdapterSession(folder, "cpu")
    for adapter in (None, "code", "chat"):
        (expected,) = session.generate([PROMPT], adapter, max_new_tokens=NEW_TOKENS, eos_ids=())
        found = genai(folder, None if adapter is None else folder / f"adapters/{adapter}.onnx_adapter")
        assert found == list(expected.ids)[: len(found)] and len(found) > 3


def test_bench_compares_with_the_given_graph(bases, adapters, built, tmp_path):
    folder = tmp_path / "out"
    exported(bases["llama"], [adapters["chat"]], built(bases["llama"], "fp32"), folder)
    plan = plan_bench(folder, BenchOptions())
    compared = export_compared(plan, bases["llama"], {"chat": adapters["chat"]}, out=tmp_path, progress=lambda *_: None)
    assert set(compared) == {BASE, MERGED}
    feeds = references.text(2, 6, token_types=False)
    base = AdapterSession(compared[BASE], "cpu").run(feeds, outputs=["logits"])["logits"]
    np.testing.assert_allclose(AdapterSession(folder, "cpu").run(feeds, outputs=["logits"])["logits"], base, atol=1e-6)


def test_packed_biases_are_taken_apart(built, tmp_path):
    """Qwen2 has biases on query, key and value, which the builder packs with them."""
    config = transformers.Qwen2Config(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=48,
        vocab_size=tiny.VOCABULARY, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = tiny.randomize(transformers.Qwen2ForCausalLM(config), "qwen2").eval()
    model.save_pretrained(tmp_path / "base")
    tiny.save_tokenizer(tmp_path / "base", classifier=False)
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "gate_proj"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, options).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(tmp_path / "adapter")
    feeds = references.text(3, 9, token_types=False)
    graph = built(tmp_path / "base", "fp32")
    for mode, adapter in (("dynamic", "adapter"), ("merge", None)):
        exported(tmp_path / "base", [tmp_path / "adapter"], graph, tmp_path / mode, mode)
        expected = references.outputs_of(tuned, feeds)
        found = AdapterSession(tmp_path / mode, "cpu").run(feeds, adapter, ["logits"])["logits"]
        np.testing.assert_allclose(references.real(found, feeds), references.real(expected, feeds), atol=3e-5)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """A base whose gate_up_proj the builder takes apart, with an adapter beside it; and PEFT's model."""
    folder = tmp_path_factory.mktemp("phi3")
    config = transformers.Phi3Config(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=96,
        vocab_size=tiny.VOCABULARY, max_position_embeddings=512, original_max_position_embeddings=512, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = tiny.randomize(transformers.Phi3ForCausalLM(config), "phi3").eval()
    model.save_pretrained(folder / "base")
    tiny.save_tokenizer(folder / "base", classifier=False)
    options = peft.LoraConfig(r=4, target_modules=["gate_up_proj", "qkv_proj"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, options).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(folder / "adapter")
    return folder, tuned


def test_a_gate_in_a_product_of_its_own_is_joined_with_the_rest(phi3, built, tmp_path):
    folder, tuned = phi3
    feeds = references.text(3, 9, token_types=False)
    expected = references.outputs_of(tuned, feeds)
    graph = built(folder / "base", "fp32")
    for mode, adapter in (("dynamic", "adapter"), ("merge", None)):
        exported(folder / "base", [folder / "adapter"], graph, tmp_path / mode, mode)
        found = AdapterSession(tmp_path / mode, "cpu").run(feeds, adapter, ["logits"])["logits"]
        np.testing.assert_allclose(references.real(found, feeds), references.real(expected, feeds), atol=3e-5)


def test_a_gate_of_integers_is_joined_too(phi3, built, tmp_path):
    """Without an adapter it gives what the given graph does."""
    folder, _ = phi3
    graph = built(folder / "base", "int4")
    manifest = exported(folder / "base", [folder / "adapter"], graph, tmp_path / "out")
    assert "model.layers.1.mlp.gate_up_proj.weight" in manifest.quantization.weights
    feeds = references.text(3, 9, token_types=False)
    session = AdapterSession(tmp_path / "out", "cpu")
    found, adapted = (session.run(feeds, adapter, ["logits"])["logits"] for adapter in (None, "adapter"))
    given = onnxruntime.InferenceSession(graph / "model.onnx")
    past = [spec for spec in given.get_inputs() if spec.name.startswith("past_key_values")]
    empty = {spec.name: np.zeros((3, 2, 0, 16), np.float32) for spec in past}
    expected = given.run(["logits"], feeds | empty)[0]
    np.testing.assert_allclose(references.real(found, feeds), references.real(expected, feeds), atol=3e-5)
    assert np.abs(references.real(adapted - found, feeds)).max() > 0.1


def test_a_graph_that_runs_no_step_on_a_past_is_told_by_check(bases, adapters, built, tmp_path):
    """The builder's float16 for the CPU fails in ONNX Runtime itself on several new tokens; what it fails on is said."""
    folder = tmp_path / "out"
    exported(bases["llama-f16"], [adapters["chat"]], built(bases["llama-f16"], "fp16"), folder)
    with pytest.raises(InputRefused, match="ONNX Runtime fails to run the given graph"):
        check(folder, options=CheckOptions(n_rows=4))
    assert json.loads((folder / "reports/check.json").read_text())["partial"]
