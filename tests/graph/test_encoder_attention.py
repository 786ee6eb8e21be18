"""What becomes of an encoder's attention, and that it computes the same."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from lora_export.export.plan import Request
from lora_export.pipeline import ExportOptions, export
from lora_export.runtime.adapter_session import AdapterSession

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
TEXT = SIZES | {"vocab_size": 64, "max_position_embeddings": 32}
# Attention in operators of com.microsoft, and in standard ones.
PACKED, STANDARD = (2, 0), (0, 2)
MODELS = {
    "bert": (transformers.BertConfig(**TEXT), ["query", "value"]),
    "modernbert": (transformers.ModernBertConfig(**TEXT, local_attention=20, pad_token_id=0), ["Wqkv"]),
    "vit": (transformers.ViTConfig(**SIZES, image_size=16, patch_size=8), ["q_proj", "v_proj"]),
}


@pytest.fixture(scope="module", params=MODELS, ids=str)
def made(request, tmp_path_factory):
    """Its name, the folder of a base, an adapter of it and its exports, and the adapter in PEFT."""
    config, targets = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    is_image = request.param == "vit"
    auto = transformers.AutoModelForImageClassification if is_image else transformers.AutoModel
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder / "base")
    peft = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
    peft.save_pretrained(folder / "adapter")
    for mode, provider in itertools.product(("merge", "dynamic"), ("cpu", "cuda")):
        task = "image-classification" if is_image else "feature-extraction"
        asked = Request(str(folder / "base"), ((str(folder / "adapter"), "a"),), mode, task, "float32", provider)
        export(asked, ExportOptions(folder / (mode if provider == "cpu" else f"{mode}-cuda")))
    return request.param, folder, peft.eval()


def operators(folder: Path) -> tuple[int, int]:
    graph = ir.load(folder / "model.onnx").graph
    count = Counter((node.domain, node.op_type) for node in graph)
    assert not count["", "Softmax"]
    return count["com.microsoft", "Attention"], count["", "Attention"]


def test_projections_without_a_pair_are_packed(made):
    name, folder, _ = made
    rotary = name == "modernbert"
    assert operators(folder / "merge") == (STANDARD if rotary else PACKED)
    assert operators(folder / "dynamic") == STANDARD
    for mode in ("merge", "dynamic"):
        count = Counter(node.op_type for node in ir.load(folder / mode / "model.onnx").graph)
        if not rotary:
            assert count["Transpose"] <= 1 and not count["ReduceSum"], "heads stay, and no row is searched for tokens"


def test_on_cuda_the_attention_adds_numbers_and_holds_weights_where_no_key_is_masked(made):
    name, folder, _ = made
    forms = {"bert": "MultiHeadAttention", "modernbert": "Attention", "vit": "Attention"}
    for mode in ("merge-cuda", "dynamic-cuda"):
        graph = ir.load(folder / mode / "model.onnx").graph
        count = Counter(node.op_type for node in graph)
        packed = count["Attention"] if operators(folder / mode)[0] else 0
        form = "MultiHeadAttention" if name == "vit" and mode == "dynamic-cuda" else forms[name]
        assert count[form] == 2 and (packed == 2) is (name == "vit" and mode == "merge-cuda")
        assert count["Where"] <= 1, "one mask for all layers"
        assert name == "modernbert" or not count["ReduceSum"], "no row is searched for tokens"
        if name == "bert":
            assert count["Split"] == 2 and not any(is_bias_of_one(node) for node in graph), "biases are added together"


def is_bias_of_one(node: ir.Node) -> bool:
    return node.op_type == "Add" and any((value.name or "").endswith("query.bias") for value in node.inputs)


def test_it_computes_what_pytorch_does(made):
    name, folder, peft = made
    random = np.random.default_rng(0)
    if name == "vit":
        feeds, real = {"pixel_values": random.normal(size=(3, 3, 16, 16)).astype(np.float32)}, np.ones(3, bool)
    else:
        mask = np.ones((3, 30), np.int64)
        mask[0, 5:], mask[1, :4], mask[2, 2:6] = 0, 0, 0
        feeds, real = {"input_ids": random.integers(5, 60, (3, 30)), "attention_mask": mask}, mask == 1
    with torch.no_grad():
        expected = peft(**{key: torch.tensor(value) for key, value in feeds.items()})[0].numpy()[real]
    found = {mode: AdapterSession(folder / mode, "cpu").run(feeds) for mode in ("merge", "merge-cuda")}
    for mode in ("dynamic", "dynamic-cuda"):
        found[mode] = AdapterSession(folder / mode, "cpu").run(feeds, adapters=["a"] * 3)
    for mode, outputs in found.items():
        error = np.abs(outputs["logits" if name == "vit" else "last_hidden_state"][real] - expected).max()
        assert error < 1e-4 * np.abs(expected).max(), mode


def test_a_row_without_tokens_gives_numbers(made):
    name, folder, _ = made
    if name == "vit":
        return
    feeds = {"input_ids": np.full((2, 4), 7), "attention_mask": np.array([[1, 1, 1, 0], [0, 0, 0, 0]])}
    for mode in ("merge", "dynamic", "merge-cuda", "dynamic-cuda"):
        assert np.isfinite(AdapterSession(folder / mode, "cpu").run(feeds)["last_hidden_state"]).all()
