"""Reading an adapter through PEFT, and refusing one that does not fit."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from transformers import AutoConfig

from lora_export.adapters.folder import open_adapter
from lora_export.adapters.peft_reader import read_trained_adapter
from lora_export.base.tasks import Task
from lora_export.base.weightless import build_weightless
from lora_export.errors import InputRefused


def weightless(base: Path, task: Task, **changes: object) -> torch.nn.Module:
    return build_weightless(task, AutoConfig.from_pretrained(base, **changes), "float32")


@pytest.fixture
def llama(bases) -> torch.nn.Module:
    return weightless(bases["llama"], Task.TEXT_GENERATION)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def rewritten(own, folder: Path, change) -> Path:
    """A copy of the adapter whose tensors `change` has edited in place."""
    target = own(folder)
    tensors = stored(target)
    change(tensors)
    safetensors.torch.save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


def with_config(own, folder: Path, **changes: object) -> Path:
    target = own(folder)
    path = target / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


def read(folder: Path, base: torch.nn.Module):
    return read_trained_adapter(open_adapter(folder, str(folder)), base)


def test_ranks_and_scales_are_those_of_each_module(adapters, llama):
    """`code`: r 8, alpha 6, rsLoRA, `down_proj` and one `q_proj` of other ranks, `k_proj` of another alpha."""
    found = read(adapters["code"], llama)
    assert len(found.lora) == 2 * 7
    for module, pair in found.lora.items():
        rank = 2 if module.endswith("down_proj") else 3 if module == "model.layers.1.self_attn.q_proj" else 8
        alpha = 2 if module.endswith("k_proj") else 6
        assert (pair.module, pair.rank) == (module, rank)
        assert pair.scale == pytest.approx(alpha / math.sqrt(rank)), module
        assert not pair.weight_is_in_out
    assert found.ranks == (2, 3, 8)


def test_the_numbers_are_those_of_the_file(adapters, llama):
    tensors = stored(adapters["code"])
    found = read(adapters["code"], llama)
    for module, pair in found.lora.items():
        assert torch.equal(pair.a, tensors[f"base_model.model.{module}.lora_A.weight"]), module
        assert torch.equal(pair.b, tensors[f"base_model.model.{module}.lora_B.weight"]), module


def test_conv1d_is_told_from_linear(adapters, bases):
    found = read(adapters["poet"], weightless(bases["gpt2"], Task.TEXT_GENERATION))
    assert len(found.lora) == 2 * 3 and all(pair.weight_is_in_out for pair in found.lora.values())
    assert found.lora["transformer.h.0.attn.c_attn"].b.shape == (96, 4)


def test_a_head_is_replaced_as_a_whole(adapters, bases):
    found = read(adapters["topic"], weightless(bases["bert"], Task.TEXT_CLASSIFICATION, num_labels=3))
    tensors = stored(adapters["topic"])
    assert set(found.replaced) == {"classifier.weight", "classifier.bias"}
    assert found.replaced_modules == ("classifier",)
    for part in ("weight", "bias"):
        assert torch.equal(found.replaced[f"classifier.{part}"], tensors[f"base_model.model.classifier.{part}"])


@pytest.mark.parametrize("times", [1, 2])
def test_the_base_is_left_as_it_was(adapters, bases, times):
    base = weightless(bases["bert"], Task.TEXT_CLASSIFICATION, num_labels=3)
    before = {name: (id(tensor), tensor.stride()) for name, tensor in base.state_dict(keep_vars=True).items()}
    modules = {name: type(module) for name, module in base.named_modules()}
    for _ in range(times):
        read(adapters["topic"], base)
    assert {name: type(module) for name, module in base.named_modules()} == modules
    after = base.state_dict(keep_vars=True)
    assert {name: (id(tensor), tensor.stride()) for name, tensor in after.items()} == before


def test_two_adapters_read_on_one_base_do_not_mix(adapters, llama):
    read(adapters["code"], llama)
    found = read(adapters["chat"], llama)
    assert {module.rsplit(".", 1)[-1] for module in found.lora} == {"q_proj", "v_proj"}
    assert {(pair.rank, pair.scale) for pair in found.lora.values()} == {(4, 2.0)}


def test_a_foreign_base_is_refused(adapters, llama, bases):
    with pytest.raises(InputRefused) as refused:
        read(adapters["topic"], llama)
    assert str(bases["bert"]) in refused.value.next_step, "the base it was trained on is named"


def test_a_base_of_another_size_is_refused(adapters, bases):
    config = AutoConfig.from_pretrained(bases["llama"], num_hidden_layers=1)
    with pytest.raises(InputRefused, match="tensors that have no place on this base") as refused:
        read(adapters["chat"], build_weightless(Task.TEXT_GENERATION, config, "float32"))
    assert (
        refused.value.expected == "4 of its 8 tensors have one" and "layers.1.self_attn.q_proj" in refused.value.found
    )
    config = AutoConfig.from_pretrained(bases["llama"], num_hidden_layers=3)
    with pytest.raises(InputRefused, match="lacks tensors that its config promises"):
        read(adapters["chat"], build_weightless(Task.TEXT_GENERATION, config, "float32"))


def test_leftover_tensors_are_refused(adapters, own, llama):
    folder = rewritten(own, adapters["chat"], lambda t: t.update({"base_model.model.elsewhere.weight": torch.zeros(2)}))
    with pytest.raises(InputRefused, match="tensors that have no place on this base") as refused:
        read(folder, llama)
    assert refused.value.expected == "8 of its 9 tensors have one"
    assert refused.value.found == "base_model.model.elsewhere.weight"


def test_missing_tensors_are_refused(adapters, own, llama):
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    folder = rewritten(own, adapters["chat"], lambda tensors: tensors.pop(key))
    with pytest.raises(InputRefused, match="lacks tensors that its config promises for this base") as refused:
        read(folder, llama)
    assert "layers.1.self_attn.v_proj.lora_B" in refused.value.found


def test_a_missing_head_is_refused(adapters, own, bases):
    folder = rewritten(own, adapters["topic"], lambda tensors: tensors.pop("base_model.model.classifier.bias"))
    with pytest.raises(InputRefused, match="PEFT cannot load the adapter onto this base") as refused:
        read(folder, weightless(bases["bert"], Task.TEXT_CLASSIFICATION, num_labels=3))
    assert refused.value.where == str(folder) and "base_model.model.classifier.bias" in refused.value.found


def test_a_rank_that_the_config_does_not_say_is_refused(adapters, own, llama):
    folder = with_config(own, adapters["chat"], r=5)
    with pytest.raises(InputRefused, match="tensors do not have the ranks that its config says") as refused:
        read(folder, llama)
    assert refused.value.where.endswith("chat: model.layers.0.self_attn.q_proj.lora_A.weight and 7 more")
    assert (refused.value.expected, refused.value.found) == (
        "[5, 64], as the config says", "[4, 64] in the adapter's file",
    )  # fmt: skip


def test_a_base_of_another_width_is_said_plainly(adapters, bases):
    config = AutoConfig.from_pretrained(bases["llama"], hidden_size=32)
    with pytest.raises(InputRefused, match="The adapter was trained on a base of other sizes") as refused:
        read(adapters["chat"], build_weightless(Task.TEXT_GENERATION, config, "float32"))
    assert refused.value.where.endswith("chat: model.layers.0.self_attn.q_proj.lora_A.weight and 3 more")
    assert refused.value.expected == "[4, 32], as the base says"
    assert refused.value.found == "[4, 64] in the adapter's file" and "check that the base" in refused.value.next_step


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value, adapters, own, llama):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    folder = rewritten(own, adapters["chat"], lambda tensors: tensors[key][1, 2].fill_(value))
    with pytest.raises(InputRefused, match="The adapter holds numbers that are not finite") as refused:
        read(folder, llama)
    assert refused.value.where.endswith("model.layers.0.self_attn.q_proj.lora_A.weight")
    assert refused.value.found == "1 of 256 elements are NaN or infinite"


def test_a_pair_on_an_embedding_is_one_of_one_hot_inputs(bases, tmp_path, llama):
    folder = tiny.adapter(
        bases["llama"], tmp_path / "words", "LlamaForCausalLM", r=2, target_modules=["embed_tokens", "q_proj"],
        save_embedding_layers=False,
    )  # fmt: skip
    adapter = read(folder, llama)
    pair = adapter.embeddings["model.embed_tokens"]
    assert (tuple(pair.a.shape), tuple(pair.b.shape), pair.weight_is_in_out) == ((2, 260), (64, 2), True)
    assert "model.embed_tokens" not in adapter.lora and len(adapter.lora) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"r": "four"},
        {"r": -1},
        {"r": None},
        {"lora_alpha": "eight"},
        {"target_modules": "q_proj("},
        {"target_modules": 5},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"q_proj": "x"}},
        {"alpha_pattern": 3},
        {"modules_to_save": 7},
        {"layers_to_transform": "first"},
        {"target_modules": []},
        {"target_modules": ["nothing_like_it"]},
    ],
    ids=str,
)
def test_a_config_of_wrong_values_is_refused_without_a_traceback(changes, adapters, own, llama):
    folder = with_config(own, adapters["chat"], **changes)
    with pytest.raises(InputRefused) as refused:
        read(folder, llama)
    ((option, value),) = changes.items()
    if refused.value.expected is None:  # PEFT's own words
        assert str(refused.value).startswith("PEFT cannot load the adapter onto this base")
        assert refused.value.where == str(folder) and refused.value.found
    else:
        assert str(refused.value).startswith("An option of the adapter is not what it should be")
        assert refused.value.where == f"{folder}/adapter_config.json: {option}" and refused.value.found == repr(value)


# What can be told without a base.


def test_the_headers_are_read_without_the_numbers(adapters, bases):
    found = open_adapter(adapters["chat"], "given/as", None)
    assert (found.name, found.given, found.base) == ("chat", "given/as", str(bases["llama"]))
    assert found.shapes["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"] == (32, 4)
    assert found.labels is None


def test_labels_come_from_a_config_beside_the_adapter(adapters, own):
    folder = own(adapters["topic"])
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "red", "1": "blue"}}))
    assert open_adapter(folder, "x").labels == {0: "red", 1: "blue"}
    for unusable in ("{", "[]", '{"id2label": ["a"]}'):
        (folder / "config.json").write_text(unusable)
        assert open_adapter(folder, "x").labels is None


@pytest.mark.parametrize("name", ["../evil", "a/b", "a b", "-x", ".hidden", "naïve", "a\nb", "a\\b", "n" + "\0"])
def test_a_name_that_is_no_safe_file_name_is_refused(name, adapters):
    with pytest.raises(InputRefused) as refused:
        open_adapter(adapters["chat"], "x", name)
    assert refused.value.found == repr(name) and "--name" in refused.value.next_step


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputRefused, match="The folder holds no PEFT adapter") as refused:
        open_adapter(tmp_path, "x", "a")
    assert refused.value.found == "notes.txt" and refused.value.next_step is None


def test_a_base_in_an_adapter_s_place_is_named(bases):
    with pytest.raises(InputRefused, match="The folder holds no PEFT adapter") as refused:
        open_adapter(bases["llama"], "x", "a")
    assert "BASE ADAPTER" in refused.value.next_step


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not valid JSON"), ("[1]", "holds no JSON object"), ("\xff", "")]
)
def test_a_damaged_config_is_refused(text, message, adapters, own):
    folder = own(adapters["chat"])
    (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputRefused, match=message or "is not valid JSON"):
        open_adapter(folder, "x")


def test_a_pickle_is_never_read(adapters, own):
    folder = own(adapters["chat"])
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputRefused, match="The adapter has no weights"):
        open_adapter(folder, "x")
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    with pytest.raises(InputRefused, match="a pickle can run code, so it is never read") as refused:
        open_adapter(folder, "x")
    assert refused.value.found == "adapter_model.bin" and "save_pretrained" in refused.value.next_step


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(kept, adapters, own):
    folder = own(adapters["chat"])
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputRefused, match="The file is truncated or not safetensors") as refused:
        open_adapter(folder, "x")
    assert refused.value.where == str(file)


def test_a_pickle_beside_the_safetensors_is_ignored(adapters, own, llama):
    folder = own(adapters["chat"])
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    assert len(read(folder, llama).lora) == 4
    shutil.rmtree(folder)


def test_an_adapter_is_read_on_the_cpu_where_there_is_a_gpu_too(adapters, llama, monkeypatch):
    """PEFT puts what it reads onto the device that it finds; "meta" stands in for a GPU."""
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "meta")
    adapter = read(adapters["chat"], llama)
    pairs = [tensor for pair in adapter.lora.values() for tensor in (pair.a, pair.b)]
    assert pairs and {tensor.device.type for tensor in pairs} == {"cpu"}
