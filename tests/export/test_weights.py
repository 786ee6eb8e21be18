"""Where an export's numbers come from, one parameter at a time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import safetensors.torch
import torch

from lora_export.base.recipe import Recipe
from lora_export.errors import InputRefused
from lora_export.export.plan import Request, make_plan
from lora_export.export.resolve import resolve


@pytest.fixture
def source(bases, adapters):
    """The llama with `chat` folded in."""
    return resolve(make_plan(Request(str(bases["llama"]), ((str(adapters["chat"]), None),), "merge"))).parameters


@pytest.fixture
def truth(bases, adapters) -> dict[str, np.ndarray]:
    """Every parameter with `chat` folded in, float64."""
    found = {k: t.double() for k, t in safetensors.torch.load_file(bases["llama"] / "model.safetensors").items()}
    pair = safetensors.torch.load_file(adapters["chat"] / "adapter_model.safetensors")
    for key in [key for key in pair if key.endswith("lora_A.weight")]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        found[f"{module}.weight"] += 2.0 * pair[key.replace("lora_A", "lora_B")].double() @ pair[key].double()
    return {key: tensor.numpy() for key, tensor in found.items()}


def test_every_parameter_is_the_checkpoints_with_the_adapter_folded_in(source, truth):
    for path, expected in truth.items():
        found = source.parameter(path, torch.float32)
        np.testing.assert_allclose(found.double().numpy(), expected, atol=1e-6, err_msg=path)


def test_a_tied_parameter_is_found_under_either_name(source, truth):
    found = source.parameter("lm_head.weight", torch.float32).double().numpy()
    np.testing.assert_array_equal(found, truth["model.embed_tokens.weight"])


def test_a_recipe_transposes_each_and_then_concatenates(source, truth):
    paths = tuple(f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")
    found = source.make_weight(Recipe(paths, transposed=True, axis=1), "float32")
    expected = np.concatenate([truth[path].T for path in paths], axis=1)
    assert found.flags.c_contiguous and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    rows = source.make_weight(Recipe(paths[1:], axis=0), "float16")
    assert rows.dtype == np.float16 and rows.shape == (64, 64)


@pytest.mark.parametrize("stored", [True, False])
def test_a_transposed_weight_that_is_not_finite_is_refused_with_its_reason(source, monkeypatch, stored):
    """The adapters are folded into the transposed copy, and still the checkpoint is not blamed for an overflow."""
    path = "model.layers.0.self_attn.q_proj.weight"
    weight = source.checkpoint.files.read(path)
    weight = torch.full_like(weight, 1e6 if stored else torch.nan)
    monkeypatch.setattr(type(source.checkpoint.files), "read", lambda self, name: weight)
    with pytest.raises(InputRefused, match="overflows float16" if stored else "is not finite"):
        source.make_weight(Recipe((path,), transposed=True), "float16")
    assert torch.equal(weight, weight) is stored


def test_a_transposed_row_is_a_copy(source, monkeypatch):
    """A matrix of one row is its own transpose in memory; the checkpoint's bytes must not change."""
    path = "model.layers.0.self_attn.q_proj.weight"
    pair = source.adapters[0][0].lora[path.removesuffix(".weight")]
    row = torch.zeros(1, pair.a.shape[1])
    one = dataclasses.replace(pair, b=pair.b[:1])
    adapter = dataclasses.replace(source.adapters[0][0], lora={path.removesuffix(".weight"): one})
    monkeypatch.setattr(type(source.checkpoint.files), "read", lambda self, name: row)
    found = dataclasses.replace(source, adapters=((adapter, 1.0),)).parameter(path, torch.float32, transposed=True)
    assert found.abs().max() > 0 and row.abs().max() == 0


def test_bfloat16_is_an_array_too(source, truth):
    found = source.make_weight(Recipe(("model.norm.weight",)), "bfloat16")
    assert found.dtype.name == "bfloat16"
    np.testing.assert_allclose(found.astype(np.float64), truth["model.norm.weight"], rtol=2**-8)


def test_what_nobody_has_is_refused_by_name(source):
    with pytest.raises(InputRefused, match="no adapter brings it") as refused:
        source.parameter("model.layers.9.mlp.up_proj.weight", torch.float32)
    assert refused.value.where.endswith("model.layers.9.mlp.up_proj.weight")
