"""From a request to a plan: labels, bases, names, and what a merge cannot hold."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import safetensors.torch
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model

from lora_export.errors import InputRefused, UsageProblem
from lora_export.export.plan import Request, make_plan
from lora_export.export.resolve import resolve

WEIGHTS = "adapter_model.safetensors"


def request(bases, adapters, base: str | None, names: tuple[str, ...], mode: str = "dynamic", **options) -> Request:
    chosen = tuple((str(adapters[name]), None) for name in names)
    return Request(str(bases[base]) if base else None, chosen, mode, **options)


def test_a_merge_takes_the_adapters_number_of_labels(bases, adapters):
    plan = make_plan(request(bases, adapters, "vit", ("sights",), "merge"))
    assert plan.config.num_labels == 5
    dynamic = make_plan(request(bases, adapters, "vit", ("sights",)))
    assert (dynamic.config.num_labels, dynamic.adapter_configs[0].num_labels) == (3, 5)


def test_labels_come_from_the_adapter_only_where_they_fit(bases, adapters, own):
    folder = own(adapters["topic"])
    names = {"0": "sport", "1": "art", "2": "law"}
    (folder / "config.json").write_text(json.dumps({"id2label": names}))
    plan = make_plan(Request(str(bases["bert"]), ((str(folder), None),), "merge"))
    assert plan.config.id2label == {0: "sport", 1: "art", 2: "law"}
    assert plan.config.label2id == {"sport": 0, "art": 1, "law": 2}
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "sport"}}))
    plan = make_plan(Request(str(bases["bert"]), ((str(folder), None),), "merge"))
    assert plan.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_a_merged_graph_holds_one_head(bases, adapters):
    with pytest.raises(InputRefused, match="Several adapters bring a module of their own") as refused:
        make_plan(request(bases, adapters, "bert", ("topic", "kind"), "merge"))
    assert refused.value.where == "topic (3 labels), kind (5 labels)"
    assert "lora-export dynamic" in refused.value.next_step
    plan = make_plan(request(bases, adapters, "classifier", ("plain", "shades"), "merge"))
    assert plan.config.num_labels == 4, "one head and one plain adapter merge"


def test_two_adapters_of_one_name_are_a_usage_problem(bases, adapters):
    with pytest.raises(UsageProblem, match="Two adapters have the same name"):
        make_plan(request(bases, adapters, "bert", ("topic", "topic")))


def test_a_replaced_module_that_is_no_linear_is_merged_but_not_served(bases, tmp_path):
    folder = tiny.adapter(
        bases["llama"],
        tmp_path / "norms",
        "LlamaForCausalLM",
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["model.norm"],
    )
    with pytest.raises(InputRefused, match="replaces modules that are not Linear") as refused:
        resolve(make_plan(Request(str(bases["llama"]), ((str(folder), None),), "dynamic")))
    assert refused.value.where == "model.norm.weight"
    resolved = resolve(make_plan(Request(str(bases["llama"]), ((str(folder), None),), "merge")))
    found = resolved.parameters.parameter("model.norm.weight", torch.float32)
    assert torch.equal(found, resolved.adapters[0].replaced["model.norm.weight"])


def test_an_adapters_numbers_are_not_rounded_to_the_exports_dtype_before_they_are_folded(bases, adapters):
    half = resolve(make_plan(request(bases, adapters, "llama", ("chat",), "merge", dtype="bfloat16", provider="cuda")))
    full = resolve(make_plan(request(bases, adapters, "llama", ("chat",), "merge")))
    for module, pair in full.adapters[0].lora.items():
        assert torch.equal(half.adapters[0].lora[module].a, pair.a), module
        assert torch.equal(half.adapters[0].lora[module].b, pair.b), module


def test_the_dtype_is_the_checkpoints_unless_named(bases, adapters):
    assert make_plan(request(bases, adapters, "llama-f16", ("chat",))).dtype == "float16"
    assert make_plan(request(bases, adapters, "llama-f16", ("chat",), dtype="float32")).dtype == "float32"


@pytest.fixture
def head_adapter(bases, tmp_path):
    """A pair on the tied output head, saved as PEFT does by default: with a copy of the head's own weight."""
    options = {"r": 2, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    return tiny.adapter(bases["llama"], tmp_path / "head", "LlamaForCausalLM", **options)


@pytest.mark.parametrize("mode", ["merge", "dynamic"])
def test_a_copy_of_the_bases_head_beside_its_pair_changes_nothing(bases, head_adapter, mode):
    assert "base_model.model.lm_head.base_layer.weight" in safetensors.torch.load_file(head_adapter / WEIGHTS)
    resolved = resolve(make_plan(Request(str(bases["llama"]), ((str(head_adapter), None),), mode)))
    assert "lm_head" in resolved.adapters[0].lora and not resolved.adapters[0].replaced
    model = resolved.model
    assert model.lm_head.weight is model.model.embed_tokens.weight, "the weightless base is left as it was"
    assert model.lm_head.weight.stride() == (0, 0)


def test_a_copy_that_differs_replaces_the_bases_head_and_what_is_tied_to_it(bases, head_adapter):
    """As PEFT loads it: into the base itself."""
    tensors = safetensors.torch.load_file(head_adapter / WEIGHTS)
    tensors["base_model.model.lm_head.base_layer.weight"][3, 5] += 1e-3
    safetensors.torch.save_file(tensors, head_adapter / WEIGHTS, metadata={"format": "pt"})
    request = Request(str(bases["llama"]), ((str(head_adapter), None),), "merge")
    (adapter,) = resolve(make_plan(request)).adapters
    assert set(adapter.replaced) == {"lm_head.weight", "model.embed_tokens.weight"}
    with pytest.raises(InputRefused, match="replaces modules that are not Linear"):
        resolve(make_plan(dataclasses.replace(request, mode="dynamic")))


def test_a_weight_for_each_adapter_or_none(bases, adapters):
    chosen = tuple((str(adapters[name]), name) for name in ("chat", "code"))
    with pytest.raises(UsageProblem, match="once for each adapter") as refused:
        make_plan(Request(str(bases["llama"]), chosen, "merge", weights=(0.5,)))
    assert (refused.value.expected, refused.value.found) == ("2 weights", "1")


def test_a_bfloat16_base_is_exported_for_the_cpu_in_a_dtype_that_it_runs(bases, adapters, tmp_path):
    base = tmp_path / "llama"
    tiny.in_dtype(bases["llama"], base, torch.bfloat16)
    chosen = ((str(adapters["chat"]), None),)
    plan = make_plan(Request(str(base), chosen, "merge"))
    assert plan.dtype == "float32" and "stored in bfloat16" in plan.remarks[0] and "--dtype float16" in plan.remarks[0]
    assert make_plan(Request(str(base), chosen, "merge", dtype="float16")).remarks == ()
    kept = make_plan(Request(str(base), chosen, "merge", provider="cuda"))
    assert (kept.dtype, kept.remarks) == ("bfloat16", ())


def test_bfloat16_is_not_exported_for_the_cpu(bases, adapters):
    with pytest.raises(InputRefused, match="CPU provider has no kernels for bfloat16") as refused:
        make_plan(request(bases, adapters, "llama", ("chat",), "merge", dtype="bfloat16"))
    assert refused.value.next_step == "export with --dtype float32 or float16, or for --provider cuda"


def test_a_merge_names_its_adapter_by_itself(bases, adapters, tmp_path):
    """No host chooses by it; a dynamic export's name is a file's, and is chosen by its user."""
    for name, expected in (
        ("my adapter", "my-adapter"),
        ("écho (v2)", "cho-v2"),
        ("…", "adapter"),
        ("ok.1_a-b", "ok.1_a-b"),
    ):
        folder = shutil.copytree(adapters["chat"], tmp_path / name)
        chosen = ((str(folder), None),)
        assert make_plan(Request(str(bases["llama"]), chosen, "merge")).folders[0].name == expected
        if name != expected:
            with pytest.raises(InputRefused, match="name becomes a file name"):
                make_plan(Request(str(bases["llama"]), chosen, "dynamic"))


@pytest.mark.parametrize(("target", "mode"), [("v_proj", "dynamic"), ("embed_tokens", "dynamic"), ("lm_head", "merge")])
def test_a_resized_vocabulary_is_refused_in_these_words(target, mode, bases, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(bases["llama"])
    model.resize_token_embeddings(264, mean_resizing=False)
    options = {"r": 2, "target_modules": ["q_proj", target], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    get_peft_model(model, LoraConfig(**options)).save_pretrained(tmp_path / "a", save_embedding_layers=True)
    with pytest.raises(InputRefused) as refused:
        resolve(make_plan(Request(str(bases["llama"]), ((str(tmp_path / "a"), None),), mode)))
    if target == "lm_head":
        assert "a pair on a head that was resized with the vocabulary" in refused.value.what
        assert (refused.value.expected, refused.value.found) == (
            "260 rows, as the base has",
            "264 rows in the adapter's file",
        )
        assert "merge_and_unload" in refused.value.next_step
    else:
        assert (
            "was trained on a resized vocabulary (264 rows in place of 260), so it replaces embeddings, "
            in refused.value.what
        )
        assert "which are not Linear" in refused.value.what
        assert "embed_tokens.weight" in refused.value.where and "merge" in refused.value.next_step


@pytest.mark.parametrize(
    ("base", "adapter", "dtype", "n_models"),
    [
        ("llama", "chat", "float32", 1),
        ("llama", "chat", "float16", 2),  # PEFT reads an adapter on a float32 base
        ("bert", "topic", "float32", 2),  # the adapter brings a head of three classes
    ],
)
def test_a_weightless_model_is_built_once_for_each_dtype_and_head(
    base, adapter, dtype, n_models, bases, adapters, monkeypatch
):
    from lora_export.export import plan, task_choice
    from lora_export.export import resolve as resolving

    built, build = [], resolving.build_weightless

    def count(task, config, dtype, **options):
        built.append((config.num_labels, dtype))
        return build(task, config, dtype, **options)

    for module in (plan, task_choice, resolving):
        monkeypatch.setattr(module, "build_weightless", count)
    resolve(make_plan(Request(str(bases[base]), ((str(adapters[adapter]), None),), "merge", dtype=dtype)))
    assert len(built) == len(set(built)) == n_models, built
