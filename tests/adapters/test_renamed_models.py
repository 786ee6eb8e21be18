"""Names that Transformers 4 gave to the modules of image models and of language models in multimodal ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from lora_export.adapters.folder import open_adapter
from lora_export.adapters.peft_reader import read_trained_adapter
from lora_export.adapters.renamed import with_todays_names
from lora_export.base.tasks import Task
from lora_export.base.weightless import build_weightless

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IMAGE = SMALL | {"image_size": 16, "patch_size": 8}
TEXT = SMALL | {"vocab_size": 40, "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 32}
SWIN = {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
ROTARY = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
TOKENS = {"image_token_id": 39, "video_token_id": 38, "vision_start_token_id": 37, "vision_end_token_id": 36}
QWEN_IMAGE = {"depth": 1, "num_heads": 2}
LABELS, FEATURES, WORDS = Task.IMAGE_CLASSIFICATION, Task.FEATURE_EXTRACTION, Task.TEXT_GENERATION


def config(kind: str, **fields: object) -> transformers.PretrainedConfig:
    return getattr(transformers, f"{kind}Config")(**fields)


def multimodal(kind: str, text: str, **fields: object) -> transformers.PretrainedConfig:
    image = IMAGE | {"model_type": "clip_vision_model"}
    named = {"text_config": TEXT | {"model_type": text}, "vision_config": image}
    return config(kind, **(named | fields), architectures=[f"{kind}ForConditionalGeneration"])


# Task, config, and a module's name then and now; {} is a layer.
CASES = {
    "DINOv2": (LABELS, lambda: config("Dinov2", **IMAGE), "dinov2.encoder.layer.{}.attention.attention.query",
               "dinov2.encoder.layer.{}.attention.q_proj"),
    "DINOv2 alone": (FEATURES, lambda: config("Dinov2", **IMAGE), "encoder.layer.{}.attention.attention.value",
                     "encoder.layer.{}.attention.v_proj"),
    "BEiT": (LABELS, lambda: config("Beit", **IMAGE), "beit.encoder.layer.{}.attention.attention.key",
             "beit.layers.{}.attention.k_proj"),
    "Swin": (LABELS, lambda: config("Swin", **SWIN), "swin.encoder.layers.{}.blocks.0.attention.self.query",
             "swin.encoder.layers.{}.blocks.0.attention.q_proj"),
    "Swin, output": (LABELS, lambda: config("Swin", **SWIN), "swin.encoder.layers.{}.blocks.0.attention.output.dense",
                     "swin.encoder.layers.{}.blocks.0.attention.o_proj"),
    "CLIP's texts": (FEATURES, lambda: config("CLIPText", **TEXT), "text_model.encoder.layers.{}.self_attn.q_proj",
                     "encoder.layers.{}.self_attn.q_proj"),
    "CLIP's images": (FEATURES, lambda: config("CLIPVision", **IMAGE),
                      "vision_model.encoder.layers.{}.self_attn.q_proj", "encoder.layers.{}.self_attn.q_proj"),
    "SigLIP's images": (FEATURES, lambda: config("SiglipVision", **IMAGE),
                        "vision_model.encoder.layers.{}.self_attn.v_proj", "encoder.layers.{}.self_attn.v_proj"),
    "LLaVA": (WORDS, lambda: multimodal("Llava", "llama", image_token_index=39),
              "language_model.model.layers.{}.self_attn.q_proj", "model.language_model.layers.{}.self_attn.q_proj"),
    "Gemma 3": (WORDS, lambda: multimodal("Gemma3", "gemma3_text", vision_config=IMAGE, mm_tokens_per_image=1),
                "language_model.model.layers.{}.mlp.up_proj", "model.language_model.layers.{}.mlp.up_proj"),
    "Qwen2-VL": (WORDS, lambda: multimodal("Qwen2VL", "qwen2_vl_text", text_config=TEXT | ROTARY,
                                           vision_config=QWEN_IMAGE | {"embed_dim": 16, "hidden_size": 16}, **TOKENS),
                 "model.layers.{}.self_attn.v_proj", "model.language_model.layers.{}.self_attn.v_proj"),
}  # fmt: skip


def saved(folder: Path, modules: list[str], model: torch.nn.Module, names: list[str]) -> Path:
    """Pairs of rank 2 on `names`, as long as today's `modules` are."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, module in zip(names, modules, strict=True):
        n_out, n_in = model.get_submodule(module).weight.shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, n_in, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(n_out, 2, generator=generator)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": [names[0].rpartition(".")[2]]}
    (folder / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": "x/y"}))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_pairs_arrive_at_the_modules_of_today(name, tmp_path, _silent_libraries):
    task, make, old, new = CASES[name]
    model = build_weightless(task, make(), "float32")
    then, now = ([template.format(layer) for layer in range(2)] for template in (old, new))
    folder = open_adapter(saved(tmp_path / "a", now, model, then), "a", "a")
    found = read_trained_adapter(with_todays_names(folder, model), model)
    tensors = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert sorted(found.lora) == sorted(now)
    for module, name_then in zip(now, then, strict=True):
        assert found.lora[module].scale == 3
        assert found.lora[module].a.equal(tensors[f"base_model.model.{name_then}.lora_A.weight"])
        assert found.lora[module].b.equal(tensors[f"base_model.model.{name_then}.lora_B.weight"])
