"""Every tensor of an adapter's file arrives, is a copy, or refuses the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers

from lora_export.adapters.folder import open_adapter
from lora_export.adapters.peft_reader import read_trained_adapter
from lora_export.base.tasks import Task
from lora_export.base.weightless import build_weightless
from lora_export.errors import InputRefused

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = SMALL | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
# A config, where the experts were in Transformers 4, and what their gate, up and down projections were called.
MIXTURES = {
    "mixtral": (
        transformers.MixtralConfig(**SMALL, intermediate_size=8, num_local_experts=3),
        "block_sparse_moe", ("w1", "w3", "w2"),
    ),
    "qwen3-moe": (transformers.Qwen3MoeConfig(**EXPERTS), "mlp", ("gate_proj", "up_proj", "down_proj")),
}  # fmt: skip


def saved(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "x/y"}
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def read(folder: Path, config):
    return read_trained_adapter(
        open_adapter(folder, "x", "a"), build_weightless(Task.TEXT_GENERATION, config, "float32")
    )


def pairs_of_experts(where: str, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for expert in range(3):
        for name in names:
            n_in, n_out = (8, 16) if name == names[2] else (16, 8)
            key = f"base_model.model.model.layers.0.{where}.experts.{expert}.{name}"
            found[f"{key}.lora_A.weight"] = torch.randn(2, n_in, generator=generator)
            found[f"{key}.lora_B.weight"] = torch.randn(n_out, 2, generator=generator)
    return found


@pytest.mark.parametrize("name", MIXTURES)
def test_a_pair_on_each_expert_is_read_though_the_experts_are_one_tensor_now(name, tmp_path):
    """As Transformers 4 had them: merged, each expert's part of the tensor changes by its own s·B·A."""
    config, where, names = MIXTURES[name]
    tensors = pairs_of_experts(where, names)
    found = read(saved(tmp_path / "a", tensors, target_modules=list(names)), config)
    (module, layer), *others = found.layers.items()
    assert module == "model.layers.0.mlp.experts" and not others
    zeros = {"gate_up_proj": torch.zeros(3, 16, 16), "down_proj": torch.zeros(3, 16, 8)}
    merged = layer.merged(zeros)

    def change(expert: int, part: str) -> torch.Tensor:
        key = f"base_model.model.model.layers.0.{where}.experts.{expert}.{part}"
        return 3 * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]

    for expert in range(3):
        both = torch.cat([change(expert, names[0]), change(expert, names[1])])
        torch.testing.assert_close(merged["gate_up_proj"][expert], both)
        torch.testing.assert_close(merged["down_proj"][expert], change(expert, names[2]))


def test_an_expert_that_the_base_does_not_have_is_refused(tmp_path):
    config, where, names = MIXTURES["mixtral"]
    tensors = pairs_of_experts(where, names)
    tensors |= {
        key.replace("experts.2", "experts.3"): tensor.clone() for key, tensor in tensors.items() if "experts.2" in key
    }
    with pytest.raises(InputRefused, match=r"PEFT cannot load|have no place"):
        read(saved(tmp_path / "a", tensors, target_modules=list(names)), config)


@pytest.fixture
def resized(tmp_path) -> tuple[Path, transformers.LlamaConfig]:
    """A tied base with three more tokens, its embedding and its head saved whole, as PEFT saves them by default."""
    config = transformers.LlamaConfig(**SMALL, intermediate_size=8, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    model.resize_token_embeddings(43)
    options = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    trained = peft.get_peft_model(model, peft.LoraConfig(**options, task_type="CAUSAL_LM"))
    with torch.no_grad():
        trained.get_parameter("base_model.model.lm_head.modules_to_save.default.weight").normal_()
    trained.save_pretrained(tmp_path / "saved", save_embedding_layers=True)
    config.vocab_size = 43
    return tmp_path / "saved", config


def test_what_peft_saves_three_times_is_read_once(resized):
    folder, config = resized
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    head = "base_model.model.lm_head"
    assert {f"{head}.weight", f"{head}.modules_to_save.weight", f"{head}.original_module.weight"} <= tensors.keys()
    found = read(folder, config)
    assert found.replaced["lm_head.weight"].equal(tensors[f"{head}.weight"])
    assert sorted(found.replaced) == ["lm_head.weight", "model.embed_tokens.weight"]


def test_a_copy_with_other_numbers_is_refused(resized):
    folder, config = resized
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["base_model.model.lm_head.modules_to_save.weight"] += 1
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputRefused, match="holds a saved module twice, with different numbers") as refused:
        read(folder, config)
    assert "lm_head.modules_to_save.weight" in refused.value.where
