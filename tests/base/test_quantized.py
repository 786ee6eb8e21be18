"""A quantized base is recognised by its config, its names or its dtypes, and refused before anything else of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_export.base.checkpoint import Checkpoint, Located, checkpoint_names
from lora_export.base.tasks import Task
from lora_export.base.weightless import build_weightless
from lora_export.errors import InputRefused
from lora_export.export.plan import Request, make_plan
from lora_export.export.resolve import resolve

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(bases, tmp_path) -> Path:
    return Path(shutil.copytree(bases["llama"], tmp_path / "base"))


def change(base: Path, **tensors: torch.Tensor) -> None:
    """Put these tensors in the file; dots of a name are written `__`."""
    stored = load_file(base / "model.safetensors")
    stored |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})


def configure(base: Path, **fields: object) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | fields))


def refusal(base: Path) -> InputRefused:
    with pytest.raises(InputRefused) as refused:
        Checkpoint.open(Located(base, str(base)))
    return refused.value


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes 4-bit (nf4)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ (4-bit)"),
        ({"quant_method": "awq", "bits": 4}, "AWQ (4-bit)"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8 (blocks of [128, 128])"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors (pack-quantized)"),
        ({"quant_method": "hqq"}, "hqq"),
    ],
)  # fmt: skip
def test_the_config_names_the_method(quantization, name, base):
    configure(base, quantization_config=quantization)
    change(base, **{QUERY.replace(".", "__") + "__weight": torch.zeros(64, 64, dtype=torch.int8)})
    error = refusal(base)
    assert error.what == f"The base's weights are quantized: {name}"
    assert "quantization_config" in error.where and "dequantize" in error.next_step


def test_a_config_left_over_on_float_weights_says_what_to_remove(base):
    configure(base, quantization_config={"quant_method": "gguf"})
    error = refusal(base)
    assert "all tensors are stored as floats" in error.found
    assert "remove quantization_config" in error.next_step


def test_a_part_s_config_counts(base):
    configure(base, text_config={"quantization_config": {"quant_method": "awq", "bits": 4}})
    assert refusal(base).what.endswith("AWQ (4-bit)")


@pytest.mark.parametrize(
    ("name", "dtype", "method"),
    [
        ("weight__quant_state__bitsandbytes__nf4", torch.uint8, "bitsandbytes 4-bit (nf4)"),
        ("SCB", torch.float32, "bitsandbytes 8-bit"),
        ("qweight", torch.int32, "GPTQ or AWQ"),
        ("weight_packed", torch.int32, "compressed-tensors"),
        ("weight_scale_inv", torch.float32, "fp8 with a scale a block"),
    ],
)
def test_without_a_config_the_names_tell(name, dtype, method, base):
    prefix = QUERY.replace(".", "__")
    change(
        base,
        **{f"{prefix}__{name}": torch.zeros(4, dtype=dtype), f"{prefix}__weight": torch.zeros(4, 4).to(torch.int8)},
    )
    # Two underscores stand for a dot above; bitsandbytes has two of its own.
    if "quant_state" in name:
        stored = load_file(base / "model.safetensors")
        stored[f"{QUERY}.weight.quant_state.bitsandbytes__nf4"] = stored.pop(
            f"{QUERY}.weight.quant_state.bitsandbytes.nf4"
        )
        save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    assert refusal(base).what.startswith(f"The base's weights are quantized: {method}, as {QUERY}.")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float64])
@pytest.mark.parametrize("asked", [None, "float32"])
def test_a_parameter_in_another_dtype_is_refused_also_under_dtype(dtype, asked, base):
    change(base, **{QUERY.replace(".", "__") + "__weight": torch.zeros(64, 64).to(dtype)})
    with pytest.raises(InputRefused, match="stored in a dtype that is not exported") as refused:
        resolve(make_plan(Request(str(base), (), "merge", dtype=asked)))
    assert f"{QUERY}.weight" in refused.value.where and refused.value.expected == "float32, float16 or bfloat16"


def test_the_dtype_is_named_before_the_shape(base):
    change(base, **{QUERY.replace(".", "__") + "__weight": torch.zeros(7, 1, dtype=torch.uint8)})
    with pytest.raises(InputRefused, match="stored in a dtype that is not exported"):
        resolve(make_plan(Request(str(base), (), "merge")))


def test_integer_buffers_and_what_the_model_does_not_use_are_no_parameters(bases, tmp_path):
    """Old checkpoints of BERT hold `position_ids`; others hold masks of bytes."""
    base = Path(shutil.copytree(bases["bert"], tmp_path / "base"))
    change(
        base,
        embeddings__position_ids=torch.arange(160)[None],
        encoder__mask=torch.ones(4, dtype=torch.uint8),
    )
    checkpoint = Checkpoint.open(Located(base, str(base)))
    model = build_weightless(Task.FEATURE_EXTRACTION, checkpoint.load_config(), "float32")
    assert "embeddings.word_embeddings.weight" in checkpoint_names(model, checkpoint.files)


def test_an_adapter_in_another_dtype_is_refused(bases, adapters, tmp_path):
    folder = Path(shutil.copytree(adapters["chat"], tmp_path / "adapter"))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(InputRefused, match="adapter's numbers are stored in a dtype that is not read") as refused:
        make_plan(Request(str(bases["llama"]), ((str(folder), None),), "merge"))
    assert name in refused.value.where and refused.value.found == "F8_E4M3"


def test_an_adapter_in_float64_is_read_as_it_is(bases, adapters, tmp_path):
    """Wider than what is exported, so nothing is lost before the one rounding at the end."""
    folder = Path(shutil.copytree(adapters["chat"], tmp_path / "adapter"))
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file)
    wide, plain = (
        resolve(make_plan(Request(str(bases["llama"]), ((str(given), None),), "merge"))).parameters.parameter(
            f"{QUERY}.weight", torch.float32
        )
        for given in (folder, adapters["chat"])
    )
    assert torch.equal(wide, plain)


def test_weights_that_the_config_names_are_refused_until_they_are_read(base):
    configure(base, transformers_weights="adapter_model.safetensors")
    assert refusal(base).where.endswith("config.json: transformers_weights")
