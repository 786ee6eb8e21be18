"""The language model of a multimodal base: exported alone when asked for, else refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from peft import PeftModel

from lora_export import AdapterSession
from lora_export.errors import InputRefused
from lora_export.export.plan import Request, make_plan
from lora_export.pipeline import ExportOptions, export

LANGUAGE = r".*language_model.*\.(q_proj|v_proj)"


@pytest.fixture(scope="module")
def base(tmp_path_factory, _silent_libraries) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"model_type": "llama", "vocab_size": tiny.VOCABULARY, "max_position_embeddings": tiny.POSITIONS,
                    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    image = sizes | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
    config = transformers.LlavaConfig(text_config=text, vision_config=image, image_token_index=259)
    folder = tmp_path_factory.mktemp("multimodal") / "base"
    tiny.randomize(transformers.LlavaForConditionalGeneration(config), "llava").save_pretrained(folder)
    tiny.save_tokenizer(folder, classifier=False)
    return folder


def adapter_of(base: Path, folder: Path, targets: str, **options: object) -> Path:
    return tiny.adapter(base, folder, "LlavaForConditionalGeneration", r=3, target_modules=targets, **options)


def test_text_alone_gives_what_the_whole_model_gives(base, tmp_path):
    adapter = adapter_of(base, tmp_path / "a", LANGUAGE, task_type="CAUSAL_LM")
    said: list[str] = []
    export(Request(str(base), ((str(adapter), "a"),), "dynamic"), ExportOptions(tmp_path / "out"), remark=said.append)
    assert said == [
        "the base is multimodal: its language model alone (model.language_model) is exported, which takes text"
    ]
    ids = np.random.default_rng(0).integers(4, 250, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    session = AdapterSession(tmp_path / "out", "cpu")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(base)
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        with_adapter = adapted(**given).logits
        with adapted.disable_adapter():
            without = adapted(**given).logits
    np.testing.assert_allclose(session.run(inputs, "a")["logits"], with_adapter, atol=1e-5)
    np.testing.assert_allclose(session.run(inputs)["logits"], without, atol=1e-5)
    assert (with_adapter - without).abs().max() > 0.1
    # The images' half is no part of the graph.
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size < 0.8 * (base / "model.safetensors").stat().st_size


def test_without_a_task_it_is_refused(base, tmp_path):
    adapter = adapter_of(base, tmp_path / "a", LANGUAGE)
    with pytest.raises(InputRefused, match="The base is multimodal") as refused:
        make_plan(Request(str(base), ((str(adapter), "a"),), "merge"))
    assert refused.value.next_step == "export its language model alone with --task text-generation"


def test_an_adapter_on_the_images_half_is_refused(base, tmp_path):
    adapter = adapter_of(base, tmp_path / "a", r".*\.(q_proj|v_proj)")
    with pytest.raises(InputRefused, match="The adapter changes parts of a multimodal base") as refused:
        make_plan(Request(str(base), ((str(adapter), "a"),), "merge", "text-generation"))
    assert "model.vision_tower" in refused.value.where and refused.value.expected == "modules in model.language_model"
