"""Extraction end to end: PEFT loads what was written, and it is the fine-tune."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
import transformers
from finetunes import dense, fine_tune, linears, low_rank
from peft import PeftModel
from references import error, inputs_for, outputs_of, text, unmerged
from safetensors.torch import load_file, save_file

from lora_export.check.context import CheckOptions
from lora_export.errors import InputRefused
from lora_export.extract.run import ExtractRequest, describe_extraction
from lora_export.extract.svd import RankChoice
from lora_export.pipeline import extract_adapter

FULL = RankChoice(rank=10_000)


def run(base, tuned, out, choice=FULL, **options):
    return extract_adapter(ExtractRequest(str(base), str(tuned), choice, **options), out)[0]


def logits(folder, model_class, inputs, n_labels=None):
    return outputs_of(unmerged(folder, model_class, n_labels=n_labels), inputs)


def decoder_inputs():
    return {"input_ids": text(3, 9, token_types=False, ragged=False)["input_ids"]}


def peft_logits(base, adapter, model_class, inputs, n_labels=None):
    """Those of stock PEFT, which must have nothing to say about keys."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = unmerged(base, model_class, [adapter], n_labels)
    assert not [str(w.message) for w in caught if "key" in str(w.message).lower()]
    return outputs_of(model, inputs)


# Every parameter differs: matrices, biases, norms, embeddings, heads (tied or not).
FULL_CASES = {
    "llama": ("llama", "LlamaForCausalLM", None),
    "gpt2": ("gpt2", "GPT2LMHeadModel", None),
    "bert": ("bert", "BertModel", None),
    "classifier": ("classifier", "BertForSequenceClassification", None),
    "classifier-5": ("classifier", "BertForSequenceClassification", 5),
    "new-head": ("bert", "BertForSequenceClassification", 3),
    "tagger": ("tagger", "BertForTokenClassification", None),
    "albert": ("albert", "AlbertModel", None),
    "vit": ("vit", "ViTForImageClassification", None),
}


@pytest.mark.parametrize("case", FULL_CASES)
def test_at_full_rank_peft_gives_the_fine_tune(case, bases, tmp_path):
    name, model_class, n_labels = FULL_CASES[case]
    tuned = fine_tune(bases[name], tmp_path / "tuned", model_class, dense, n_labels=n_labels)
    report = run(bases[name], tuned, tmp_path / "adapter")
    inputs = decoder_inputs() if name in ("llama", "gpt2") else inputs_for(name)
    expected = logits(tuned, model_class, inputs)
    before = logits(bases[name], model_class, inputs, n_labels)
    assert error(before, expected) > 0.05
    assert error(peft_logits(bases[name], tmp_path / "adapter", model_class, inputs, n_labels), expected) < 2e-5
    assert report.left_out == () and report.n_equal == 0 and report.error < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "classifier"])
def test_errors_are_those_of_numpy_and_fall_with_the_rank(name, bases, tmp_path):
    model_class = {
        "llama": "LlamaForCausalLM",
        "gpt2": "GPT2LMHeadModel",
        "classifier": "BertForSequenceClassification",
    }
    tuned = fine_tune(bases[name], tmp_path / "tuned", model_class[name], linears)
    before, after = (load_file(folder / "model.safetensors") for folder in (bases[name], tuned))
    inputs = inputs_for(name) if name == "classifier" else decoder_inputs()
    expected = logits(tuned, model_class[name], inputs)
    distances = []
    for rank in (1, 4, 12, 32, 64):
        out = tmp_path / f"adapter-{rank}"
        report = run(bases[name], tuned, out, RankChoice(rank=rank))
        for module in report.modules:
            delta = (after[f"{module.module}.weight"].double() - before[f"{module.module}.weight"].double()).numpy()
            values = np.linalg.svd(delta, compute_uv=False)
            best = np.sqrt((values[module.rank :] ** 2).sum() / (values**2).sum())
            assert module.rank == min(rank, *delta.shape)
            assert module.error == pytest.approx(best, rel=1e-4, abs=5e-7), module.module
        distances.append(error(peft_logits(bases[name], out, model_class[name], inputs), expected))
    # Random differences fall slowly, and an output need not follow every weight: over the whole range it does.
    assert distances[0] > distances[2] > distances[-1] and distances[-1] < 2e-5, distances


def test_low_rank_differences_are_found_and_nothing_else_is_targeted(bases, tmp_path):
    tuned = fine_tune(bases["llama"], tmp_path / "tuned", "LlamaForCausalLM", low_rank)
    report = run(bases["llama"], tuned, tmp_path / "adapter", RankChoice(rank=3))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    projections = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"]
    assert config["target_modules"] == sorted(projections) == sorted(m.module for m in report.modules)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 3, {})
    assert (config["modules_to_save"], config["lora_bias"], config["task_type"]) == (None, False, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == str(bases["llama"])
    assert report.error < 1e-5 and all(module.curve[2] > 0.01 for module in report.modules)


def test_energy_gives_each_module_its_rank(bases, tmp_path):
    def skewed(name, weight, generator):
        delta = low_rank(name, weight, generator)
        return delta if delta is None or "q_proj" not in name else delta[:, :1] @ torch.ones(1, weight.shape[1])

    tuned = fine_tune(bases["llama"], tmp_path / "tuned", "LlamaForCausalLM", skewed)
    report = run(bases["llama"], tuned, tmp_path / "adapter", RankChoice(energy=0.9999999))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    ranks = {module.module: module.rank for module in report.modules}
    assert {ranks[f"model.layers.{i}.self_attn.q_proj"] for i in range(2)} == {1}
    assert (
        config["rank_pattern"]
        == config["alpha_pattern"]
        == {m: r for m, r in sorted(ranks.items()) if r != config["r"]}
    )
    inputs = decoder_inputs()
    found = peft_logits(bases["llama"], tmp_path / "adapter", "LlamaForCausalLM", inputs)
    assert error(found, logits(tuned, "LlamaForCausalLM", inputs)) < 2e-3


def test_an_extracted_fine_tune_is_served_from_a_dynamic_graph(bases, adapters, tmp_path):
    from lora_export.export.plan import Request
    from lora_export.integrity.sources import SourceOverrides
    from lora_export.pipeline import ExportOptions, check, export

    tuned = fine_tune(bases["bert"], tmp_path / "tuned", "BertForSequenceClassification", linears, n_labels=3)
    run(bases["bert"], tuned, tmp_path / "mine", RankChoice(rank=8))
    request = Request(str(bases["bert"]), ((str(tmp_path / "mine"), None), (str(adapters["topic"]), None)), "dynamic")
    export(request, ExportOptions(tmp_path / "served"))
    report, _ = check(tmp_path / "served", SourceOverrides(), CheckOptions(provider="cpu"))
    assert report.verdict == "pass", [case.failures for case in report.cases]
    assert {"mine", "topic"} <= {case.name for case in report.cases}


def test_what_is_left_out_is_reported(bases, tmp_path):
    tuned = fine_tune(bases["bert"], tmp_path / "tuned", "BertModel", dense)
    kinds = frozenset({"biases", "embeddings", "others"})
    report = run(bases["bert"], tuned, tmp_path / "adapter", leave_out=kinds)
    assert {x.kind for x in report.left_out} == kinds and report.wholes == () and not report.biases
    assert all(0.01 < x.change < 10 for x in report.left_out)
    state = load_file(bases["bert"] / "model.safetensors")
    assert {x.parameter for x in report.left_out} == {
        name for name in state if not name.endswith("weight") or "mbeddings" in name or "LayerNorm" in name
    }
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.split(".lora_")[1] for name in tensors} == {"A.weight", "B.weight"}


def test_a_norm_alone_is_saved_whole_and_exactly(bases, tmp_path):
    def norm(name, weight, generator):
        return dense(name, weight, generator) if name == "model.norm.weight" else None

    tuned = fine_tune(bases["llama"], tmp_path / "tuned", "LlamaForCausalLM", norm)
    report = run(bases["llama"], tuned, tmp_path / "adapter", RankChoice(rank=2))
    assert [whole.module for whole in report.wholes] == ["model.norm"] and report.modules == ()
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    after = load_file(tuned / "model.safetensors")
    assert torch.equal(tensors["base_model.model.model.norm.weight"], after["model.norm.weight"])
    inputs = decoder_inputs()
    found = peft_logits(bases["llama"], tmp_path / "adapter", "LlamaForCausalLM", inputs)
    assert error(found, logits(tuned, "LlamaForCausalLM", inputs)) == 0


def test_shards_and_other_dtypes_are_read(bases, tmp_path):
    tuned = fine_tune(bases["llama"], tmp_path / "tuned", "LlamaForCausalLM", linears, max_shard_size="40KB")
    assert len(list(tuned.glob("*.safetensors"))) > 3
    assert run(bases["llama"], tuned, tmp_path / "adapter").n_equal > 0
    half = transformers.LlamaForCausalLM.from_pretrained(tuned, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    report = run(bases["llama"], tmp_path / "half", tmp_path / "from-half")
    assert "stored in float32 and the fine-tune in bfloat16" in report.notes[-1]
    # Norms and embeddings differ by the rounding alone, which is no difference.
    assert all("proj" in module.module for module in report.modules) and report.wholes == ()


def test_few_tensors_are_in_memory_at_once(bases, tmp_path, monkeypatch):
    import gc

    from lora_export.base.stored import SafetensorsFiles

    tuned = fine_tune(bases["llama"], tmp_path / "tuned", "LlamaForCausalLM", dense)
    alive, most = [], 0
    read = SafetensorsFiles.read

    def counted(files, name):
        nonlocal most
        tensor = read(files, name)
        import weakref

        alive.append(weakref.ref(tensor))
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(SafetensorsFiles, "read", counted)
    gc.freeze()  # what was there before need not be looked through again each time
    try:
        extract_adapter(ExtractRequest(str(bases["llama"]), str(tuned), RankChoice(rank=4)), tmp_path / "adapter")
    finally:
        gc.unfreeze()
    assert len(alive) > 60 and most <= 3


def test_two_runs_write_the_same_bytes(bases, tmp_path):
    tuned = fine_tune(bases["classifier"], tmp_path / "tuned", "BertForSequenceClassification", dense)
    for name in ("first", "second"):
        run(bases["classifier"], tuned, tmp_path / name, RankChoice(rank=4))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert (tmp_path / "first" / "config.json").exists() and (tmp_path / "first" / "tokenizer.json").exists()


def test_a_dry_run_writes_nothing(bases, tmp_path):
    tuned = fine_tune(bases["classifier"], tmp_path / "tuned", "BertForSequenceClassification", dense)
    before = sorted(tmp_path.iterdir())
    request = ExtractRequest(str(bases["classifier"]), str(tuned), RankChoice(rank=4))
    found = describe_extraction(request, tmp_path / "adapter")
    assert found["pairs"]["bert.encoder.layer.0.attention.self.query"] == 4
    assert found["wholes"]["classifier"] == "classification head" and found["biases"]
    assert sorted(tmp_path.iterdir()) == before
    report, files = extract_adapter(request, tmp_path / "adapter")
    assert {p.name for p in files.values()} == {"extract.html", "extract.json"} and all(
        p.exists() for p in files.values()
    )
    assert {m.module for m in report.modules} == set(found["pairs"]) and found["bytes"] <= report.n_bytes


def refused(base, tuned, tmp_path, **options) -> str:
    with pytest.raises(InputRefused) as caught:
        run(base, tuned, tmp_path / "adapter", **options)
    assert not (tmp_path / "adapter").exists() and not list(tmp_path.glob(".*"))
    return str(caught.value)


def test_refusals(bases, own, tmp_path):
    base = bases["llama"]
    assert "no tensor differs" in refused(base, base, tmp_path)
    assert "of another architecture" in refused(base, bases["gpt2"], tmp_path)
    other = own(base)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3, "eos_token_id": 7}))
    message = refused(base, other, tmp_path)
    assert "configuration differs" in message and "rms_norm_eps = 0.001" in message and "eos" not in message
    (other / "config.json").write_text(json.dumps(config))
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    broken = dict(tensors)
    broken[name] = tensors[name].clone()
    broken[name][0, 0] = float("nan")
    save_file(broken, other / "model.safetensors")
    message = refused(base, other, tmp_path)
    assert "not finite" in message and name in message and "1 of" in message
    save_file({k: t for k, t in tensors.items() if k != name}, other / "model.safetensors")
    assert "no tensor for a parameter of its model" in refused(base, other, tmp_path)
    (other / "model.safetensors").unlink()
    (other / "pytorch_model.bin").write_bytes(b"x")
    assert "pickled" in refused(base, other, tmp_path)


def test_a_resized_vocabulary_is_refused(bases, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(bases["llama"])
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "tuned")
    message = refused(bases["llama"], tmp_path / "tuned", tmp_path)
    assert "vocab_size = 300" in message and "vocab_size = 260" in message


def test_nothing_left_after_leaving_out(bases, tmp_path):
    tuned = fine_tune(
        bases["llama"], tmp_path / "tuned", "LlamaForCausalLM", lambda n, w, g: dense(n, w, g) if "norm" in n else None
    )
    assert "Nothing that differs is left" in refused(bases["llama"], tuned, tmp_path, leave_out=frozenset({"others"}))


def test_only_an_extracted_adapter_is_overwritten(bases, tmp_path):
    tuned = fine_tune(bases["llama"], tmp_path / "tuned", "LlamaForCausalLM", low_rank)
    out = tmp_path / "adapter"
    run(bases["llama"], tuned, out, RankChoice(rank=1))
    with pytest.raises(InputRefused, match="The output folder exists"):
        run(bases["llama"], tuned, out, RankChoice(rank=2))
    request = ExtractRequest(str(bases["llama"]), str(tuned), RankChoice(rank=2))
    assert extract_adapter(request, out, overwrite=True)[0].modules[0].rank == 2
    shutil.rmtree(out / "reports")
    with pytest.raises(InputRefused, match="is no extracted adapter"):
        extract_adapter(request, out, overwrite=True)


def test_peft_saves_the_file_it_loads_with_the_same_keys(bases, tmp_path):
    tuned = fine_tune(bases["classifier"], tmp_path / "tuned", "BertForSequenceClassification", dense)
    run(bases["classifier"], tuned, tmp_path / "adapter", RankChoice(rank=4))
    model = transformers.BertForSequenceClassification.from_pretrained(bases["classifier"])
    PeftModel.from_pretrained(model, tmp_path / "adapter").save_pretrained(
        tmp_path / "again", save_embedding_layers=False
    )
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_parameter_of_no_module_is_refused_unless_it_is_left_out(bases):
    from lora_export.base.checkpoint import Checkpoint, locate
    from lora_export.extract.differences import Difference, DifferenceKind, open_checkpoints
    from lora_export.extract.placement import place

    base = Checkpoint.open(locate(str(bases["llama"]), kind="base"))
    checkpoints = open_checkpoints(base, base, "text-generation")
    own = Difference("scale", "", DifferenceKind.OTHER, (3,), True, False, False)
    query = "model.layers.0.self_attn.q_proj"
    linear = Difference(f"{query}.weight", query, DifferenceKind.LINEAR, (64, 64), True, False, False)
    with pytest.raises(InputRefused, match="parameter of the model itself differs") as caught:
        place(checkpoints, [own, linear], frozenset())
    assert "--leave-out others" in str(caught.value)
    placement = place(checkpoints, [own, linear], frozenset({"others"}))
    assert [plan.module for plan in placement.pairs] == [query] and placement.left_out == (own,)
