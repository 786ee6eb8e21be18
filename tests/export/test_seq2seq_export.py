"""End to end: what an exported encoder-decoder computes, against unmerged PEFT, and that Optimum would know its files."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import safetensors.torch
import tiny
import torch
import transformers
from catalogue import ADAPTERS, EXPORTS, SEQ2SEQ_BASES, ExportSpec, export_to
from peft import PeftModel
from references import error, rms_error
from tiny import VOCABULARY

from lora_export.artifact import read_manifest, sha256_of
from lora_export.errors import InputRefused, UsageProblem
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import add_adapter
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.seq2seq_session import Seq2SeqSession

ROUNDING = 2e-5
GRAPHS = ("encoder_model", "decoder_model", "decoder_with_past_model")
DYNAMIC = [n for n, spec in EXPORTS.items() if spec.base in SEQ2SEQ_BASES and spec.mode == "dynamic"]
MERGED = [n for n, spec in EXPORTS.items() if spec.base in SEQ2SEQ_BASES and spec.mode == "merge"]
N_LAYERS = {"t5": 2, "bart": 2, "whisper": 2}  # of the decoder


def inputs_of(base: str, rows: int = 4, source: int = 13, target: int = 9, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = {"decoder_input_ids": rng.integers(4, VOCABULARY, (rows, target))}
    if base == "whisper":
        return {"input_features": rng.standard_normal((rows, 8, 100)).astype(np.float32), **targets}
    mask = np.array([[1] * (source - row) + [0] * row for row in range(rows)], np.int64)
    return {"input_ids": rng.integers(4, VOCABULARY, (rows, source)) * mask, "attention_mask": mask, **targets}


def truth(base: Path, adapters: list[Path], inputs: dict[str, np.ndarray], dtype=torch.float32) -> np.ndarray:
    """The logits of the base with `adapters` active together, unmerged, in PyTorch."""
    architecture = transformers.AutoConfig.from_pretrained(base).architectures[0]
    model = getattr(transformers, architecture).from_pretrained(base, dtype=dtype)
    for index, folder in enumerate(adapters):
        assert index == 0
        # The base's own forward with PEFT's layers in it: PEFT's for this task type knows no spectrograms.
        model = PeftModel.from_pretrained(model, folder).get_base_model()
    with torch.no_grad():
        return model.eval()(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.double().numpy()


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_equals_unmerged_peft_for_each_adapter_the_base_and_mixed_rows(name, exports, bases, adapters):
    spec = EXPORTS[name]
    inputs = inputs_of(spec.base)
    session = Seq2SeqSession(exports[name], "cpu")
    expected = {label: truth(bases[spec.base], [adapters[label]], inputs) for label in spec.adapters}
    expected[None] = truth(bases[spec.base], [], inputs)
    for label, values in expected.items():
        assert error(session.run(inputs, label)["logits"], values) < ROUNDING, label
        if label is not None:
            assert np.abs(values - expected[None]).max() > 0.05, "an adapter without effect proves nothing"
    mixed = [(*spec.adapters, None)[row % (len(spec.adapters) + 1)] for row in range(4)]
    found = session.run(inputs, mixed)["logits"]
    for row, label in enumerate(mixed):
        assert error(found[row], expected[label][row]) < ROUNDING, f"row {row}, {label}"


@pytest.mark.parametrize("name", MERGED)
def test_merged_equals_unmerged_peft(name, exports, bases, adapters):
    spec = EXPORTS[name]
    inputs = inputs_of(spec.base)
    expected = truth(bases[spec.base], [adapters[spec.adapters[0]]], inputs)
    assert error(Seq2SeqSession(exports[name], "cpu").run(inputs)["logits"], expected) < ROUNDING


@pytest.mark.parametrize(
    "name", ["t5-dynamic", "t5-voice-dynamic", "flan-dynamic", "bart-dynamic", "whisper-dynamic", "t5-head-merged"]
)
def test_steps_on_a_growing_cache_equal_one_pass(name, exports, bases, adapters):
    """From a past of one on, one new token or several, with long targets: relative positions beyond the buckets."""
    spec = EXPORTS[name]
    inputs = inputs_of(spec.base, target=40, seed=1)
    label = spec.adapters[0]
    expected = truth(bases[spec.base], [adapters[label]], inputs)
    session = Seq2SeqSession(exports[name], "cpu")
    targets = inputs["decoder_input_ids"]
    chosen = label if spec.mode == "dynamic" else None
    logits, state = session.begin(inputs | {"decoder_input_ids": targets[:, :1]}, chosen)
    found = [logits]
    for start, end in itertools.pairwise([1, 2, 7, 30, 31, 40]):
        logits, state = session.advance(state, targets[:, start:end])
        found.append(logits)
    assert error(np.concatenate(found, axis=1), expected) < ROUNDING


@pytest.mark.parametrize("name", ["t5-dynamic", "whisper-dynamic"])
def test_the_later_steps_graph_may_also_do_the_first(name, exports):
    """On a past of length 0, given the cross-attention's keys and values."""
    inputs = inputs_of(EXPORTS[name].base)
    session = Seq2SeqSession(exports[name], "cpu")
    expected, state = session.begin(inputs, EXPORTS[name].adapters[0])
    empty = dataclasses.replace(state, cache={key: value[:, :, :0] for key, value in state.cache.items()})
    found, after = session.advance(empty, inputs["decoder_input_ids"])
    assert error(found, expected.astype(np.float64)) < ROUNDING
    assert {key: value.shape for key, value in after.cache.items()} == {k: v.shape for k, v in state.cache.items()}


@pytest.mark.parametrize("base", ["t5", "bart"])
def test_sources_may_be_padded_on_either_side_and_of_any_length(base, exports, bases, adapters):
    session = Seq2SeqSession(exports[f"{base}-dynamic"], "cpu")
    for rows, source in ((1, 1), (2, 50)):
        inputs = inputs_of(base, rows, source)
        inputs |= {name: inputs[name][:, ::-1].copy() for name in ("input_ids", "attention_mask")}
        expected = truth(bases[base], [adapters[f"{base}-all"]], inputs)
        assert error(session.run(inputs, f"{base}-all")["logits"], expected) < ROUNDING


def names_of(layers: int, prefix: str, *sides: str) -> list[str]:
    return [f"{prefix}.{i}.{side}.{part}" for i in range(layers) for side in sides for part in ("key", "value")]


@pytest.mark.parametrize("name", ["t5-dynamic", "bart-merged", "whisper-dynamic"])
def test_files_inputs_and_outputs_have_optimums_names(name, exports):
    """As Optimum's OnnxSeq2SeqConfigWithPast and its T5, Bart and Whisper configurations write them."""
    folder, is_text, n_layers = exports[name], "whisper" not in name, N_LAYERS[EXPORTS[name].base]
    source = ["input_ids", "attention_mask"] if is_text else ["input_features"]
    mask = ["encoder_attention_mask"] if is_text else []
    expected = {
        "encoder_model.onnx": (source, ["last_hidden_state"]),
        "decoder_model.onnx": (
            [*mask, "input_ids", "encoder_hidden_states"],
            ["logits", *names_of(n_layers, "present", "decoder", "encoder")],
        ),
        "decoder_with_past_model.onnx": (
            [*mask, "input_ids", *names_of(n_layers, "past_key_values", "decoder", "encoder")],
            ["logits", *names_of(n_layers, "present", "decoder")],
        ),
    }
    assert {path.name for path in folder.glob("*.onnx")} == set(expected)
    for file, (inputs, outputs) in expected.items():
        session = ort.InferenceSession(str(folder / file), providers=["CPUExecutionProvider"])
        assert sorted(value.name for value in session.get_inputs()) == sorted(inputs), file
        assert [value.name for value in session.get_outputs()] == outputs, file


def test_axes_have_optimums_names(exports):
    graphs = read_manifest(exports["t5-dynamic"]).graphs
    dims = {
        graph: {spec.name: spec.dims for spec in (*contract.inputs, *contract.outputs)}
        for graph, contract in graphs.items()
    }
    text = ("batch_size", "encoder_sequence_length")
    assert list(graphs) == list(GRAPHS)
    assert dims["encoder_model"] == {
        "input_ids": text, "attention_mask": text, "last_hidden_state": (*text, 32),
    }  # fmt: skip
    later = dims["decoder_with_past_model"]
    assert later["input_ids"] == ("batch_size", "decoder_sequence_length")
    assert later["past_key_values.1.decoder.key"] == ("batch_size", 4, "past_decoder_sequence_length", 12)
    assert later["past_key_values.1.encoder.value"] == ("batch_size", 4, "encoder_sequence_length", 12)
    both = "past_decoder_sequence_length + decoder_sequence_length"
    assert later["present.1.decoder.key"] == ("batch_size", 4, both, 12)
    assert dims["decoder_model"]["present.0.decoder.key"] == ("batch_size", 4, "decoder_sequence_length", 12)
    assert dims["decoder_model"]["logits"] == ("batch_size", "decoder_sequence_length", VOCABULARY)


def test_an_adapter_has_a_file_for_each_graph_that_it_touches(exports):
    folder = exports["t5-head-dynamic"]
    files = {path.name for path in (folder / "adapters").iterdir()}
    # The keys of the cross-attention are made in the first step only; the head is in both.
    assert files == {
        "t5-head.decoder_model.onnx_adapter", "t5-head.decoder_with_past_model.onnx_adapter",
        "t5-encoder.encoder_model.onnx_adapter",
    }  # fmt: skip
    manifest = read_manifest(folder)
    assert manifest.adapter("t5-encoder").files == {"encoder_model": "adapters/t5-encoder.encoder_model.onnx_adapter"}
    stored = json.loads((folder / "lora_export.json").read_text())
    assert "contract" not in stored and all("file" not in entry for entry in stored["adapters"])
    for file, digest in manifest.files.items():
        assert sha256_of(folder / file) == digest, file


def test_the_decoders_graphs_share_their_weights(exports):
    for name in ("t5-dynamic", "bart-merged", "whisper-merged"):
        folder = exports[name]
        assert not (folder / "decoder_with_past_model.onnx.data").exists()
        places = {}
        for graph in GRAPHS[1:]:
            model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
            places[graph] = {
                tensor.name: {entry.key: entry.value for entry in tensor.external_data}
                for tensor in model.graph.initializer
                if tensor.external_data
            }
        later = places["decoder_with_past_model"]
        assert later.items() <= places["decoder_model"].items() and len(later) > 10
        assert {place["location"] for place in later.values()} == {"decoder_model.onnx.data"}


def test_onnx_runtimes_own_adapters_run_each_graph(exports, bases, adapters):
    folder = exports["bart-dynamic"]
    inputs = inputs_of("bart")

    def run(graph: str, feeds: dict) -> dict[str, np.ndarray]:
        session = ort.InferenceSession(str(folder / f"{graph}.onnx"), providers=["CPUExecutionProvider"])
        adapter = ort.LoraAdapter()
        adapter.Load(str(folder / "adapters" / f"bart-all.{graph}.onnx_adapter"))
        options = ort.RunOptions()
        options.add_active_adapter(adapter)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds, options), strict=True))

    source = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    states = run("encoder_model", source)["last_hidden_state"]
    mask, targets = {"encoder_attention_mask": inputs["attention_mask"]}, inputs["decoder_input_ids"]
    first = run("decoder_model", mask | {"input_ids": targets[:, :5], "encoder_hidden_states": states})
    past = {name.replace("present", "past_key_values"): value for name, value in first.items() if name != "logits"}
    later = run("decoder_with_past_model", mask | past | {"input_ids": targets[:, 5:]})
    found = np.concatenate([first["logits"], later["logits"]], axis=1)
    assert error(found, truth(bases["bart"], [adapters["bart-all"]], inputs)) < ROUNDING


def test_a_head_of_its_own_is_not_tied_whatever_the_config_says(exports, bases):
    """Transformers ties T5's head unless the checkpoint has another; then it does not scale it, either."""
    stored = safetensors.torch.load_file(bases["flan"] / "model.safetensors")
    assert {"lm_head.weight", "shared.weight"} <= set(stored)
    assert not torch.equal(stored["lm_head.weight"], stored["shared.weight"])
    inputs = inputs_of("flan")
    found = Seq2SeqSession(exports["flan-dynamic"], "cpu").run(inputs)["logits"]
    assert error(found, truth(bases["flan"], [], inputs)) < ROUNDING


def test_checkpoints_of_bart_without_their_bias_have_none(bases, adapters, tmp_path):
    base = tmp_path / "base"
    transformers.BartForConditionalGeneration.from_pretrained(bases["bart"]).save_pretrained(base)
    stored = safetensors.torch.load_file(base / "model.safetensors")
    assert stored.pop("final_logits_bias").abs().max() > 0.1
    safetensors.torch.save_file(stored, base / "model.safetensors", {"format": "pt"})
    export_to(tmp_path / "out", ExportSpec("old", (), "merge"), {"old": base}, adapters)
    inputs = inputs_of("bart")
    found = Seq2SeqSession(tmp_path / "out", "cpu").run(inputs)["logits"]
    assert error(found, truth(base, [], inputs)) < ROUNDING


@pytest.mark.parametrize("base", ["t5", "bart", "whisper"])
def test_float16_is_as_near_to_float32_as_pytorch_is(base, _silent_libraries, tmp_path):
    """On one layer of each side: how far rounding goes in many is no other question for the graphs."""
    folder = getattr(tiny, base)(tmp_path / base, layers=(1, 1))
    spec = ADAPTERS[f"{base}-all"]
    adapter = tiny.adapter(folder, tmp_path / "all", spec.model_class, save_embedding_layers=False, **spec.options)
    export_to(
        tmp_path / "out", ExportSpec(base, ("all",), "dynamic", dtype="float16"), {base: folder}, {"all": adapter}
    )
    inputs = inputs_of(base)
    half = {name: value.astype(np.float16) if value.dtype == np.float32 else value for name, value in inputs.items()}
    exact = truth(folder, [adapter], inputs)
    pytorch = truth(folder, [adapter], half, torch.float16)
    found = Seq2SeqSession(tmp_path / "out", "cpu").run(half, "all")["logits"]
    assert rms_error(found, exact) < max(2 * rms_error(pytorch, exact), 2**-12)
    if base == "t5":  # with its second projections in float32, as Transformers keeps them: they overflow
        contract = read_manifest(tmp_path / "out").graphs["encoder_model"]
        dtypes = {entry.module.rsplit(".", 1)[1]: entry.dtype for entry in contract.adapter_inputs}
        assert (dtypes["wo"], dtypes["wi"], contract.outputs[0].dtype) == ("float32", "float16", "float16")


def test_an_adapter_is_added_to_every_graph(exports, own, bases, adapters):
    folder = own(exports["t5-dynamic"])
    manifest = add_adapter(folder, [(str(adapters["t5-encoder"]), "later")], SourceOverrides())
    assert manifest.adapter("later").files == {"encoder_model": "adapters/later.encoder_model.onnx_adapter"}
    inputs = inputs_of("t5")
    found = Seq2SeqSession(folder, "cpu").run(inputs, ["later", None, "t5-all", "later"])["logits"]
    expected = {n: truth(bases["t5"], [adapters[n]], inputs) for n in ("t5-encoder", "t5-all")}
    for row, name in ((0, "t5-encoder"), (2, "t5-all"), (3, "t5-encoder")):
        assert error(found[row], expected[name][row]) < ROUNDING, name
    with pytest.raises(InputRefused, match="needs modules that the graph has no inputs for") as refused:
        add_adapter(folder, [(str(adapters["t5-head"]), None)], SourceOverrides())
    assert refused.value.where == "lm_head"
    assert read_manifest(folder) == manifest
    assert not list((folder / "adapters").glob("t5-head*"))


def test_a_session_of_one_graph_needs_its_name(exports):
    with pytest.raises(UsageProblem, match="The export has several graphs") as refused:
        AdapterSession(exports["whisper-dynamic"], "cpu")
    assert "Seq2SeqSession" in refused.value.next_step
    with pytest.raises(UsageProblem, match="has no graph 'decoder'"):
        AdapterSession(exports["whisper-dynamic"], "cpu", graph="decoder")
    encoder = AdapterSession(exports["whisper-dynamic"], "cpu", graph="encoder_model")
    features = inputs_of("whisper")["input_features"]
    assert encoder.run({"input_features": features}, "whisper-all")["last_hidden_state"].shape == (4, 50, 32)
    with pytest.raises(UsageProblem, match="has no graph 'encoder_model'"):
        Seq2SeqSession(exports["vit-merged"], "cpu")


def test_a_tied_embedding_that_is_replaced_is_refused(bases, adapters, tmp_path):
    folder = tiny.adapter(
        bases["t5"], tmp_path / "words", "T5ForConditionalGeneration",
        task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q"], modules_to_save=["shared"],
    )  # fmt: skip
    with pytest.raises(InputRefused, match="changes an embedding that others of an encoder-decoder share"):
        export_to(tmp_path / "out", ExportSpec("t5", ("words",), "merge"), bases, {"words": folder})
    assert not (tmp_path / "out").exists()


def test_the_catalogue_adapts_self_and_cross_attention_of_both_sides(exports):
    for base in ("t5", "bart", "whisper"):
        targets = read_manifest(exports[f"{base}-dynamic"]).adapter(f"{base}-attention").targets
        cross = "EncDecAttention" if base == "t5" else "encoder_attn"
        kinds = {(target.split(".")[0 if base == "t5" else 1], cross in target) for target in targets}
        assert kinds == {("encoder", False), ("decoder", False), ("decoder", True)}
        # Two projections of every encoder layer, and of both attentions of every decoder layer, one more than encoder layers.
        assert (
            len(targets) == 2 * (N_LAYERS[base] - 1 + 2 * N_LAYERS[base])
            and ADAPTERS[f"{base}-attention"].options["r"] == 4
        )
