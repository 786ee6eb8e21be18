"""Weights of quantized checkpoints are, in floats, what the methods' own libraries make of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bitsandbytes.functional
import compressed_tensors.quantization as ct
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import NaiveQuantizationCompressor, PackedQuantizationCompressor
from quantized_bases import AWQ_ORDER, words
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from lora_export.base.checkpoint import Checkpoint, Located
from lora_export.base.restored import restored_files
from lora_export.base.stored import SafetensorsFiles
from lora_export.check.context import CheckOptions
from lora_export.errors import InputRefused
from lora_export.export.plan import Request, make_plan
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import ExportOptions, check, export
from lora_export.verdict import Verdict

N_OUT, N_IN = 24, 128


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(N_OUT, N_IN, generator=torch.Generator().manual_seed(0))


def read(tensors: dict[str, torch.Tensor], quantization: dict, folder: Path, dtype: str | None = None) -> torch.Tensor:
    save_file({f"m.{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    files = restored_files(SafetensorsFiles.open([folder / "model.safetensors"]), quantization, dtype)
    assert set(files.tensors) == {"m.weight"}
    found = files.read("m.weight")
    assert tuple(found.shape) == files.tensors["m.weight"].shape == (N_OUT, N_IN)
    return found


def four_bits(weight: torch.Tensor, kind: str, *, nested: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """As Transformers saves it, and what bitsandbytes reads."""
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    stored = {f"weight.{name}" if name else "weight": t for name, t in state.as_dict(packed=True).items()}
    return stored | {"weight": packed}, bitsandbytes.functional.dequantize_4bit(packed, state)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bitsandbytes_4_bit(kind, nested, dtype, weight, tmp_path):
    stored, expected = four_bits(weight.to(dtype), kind, nested=nested)
    found = read(stored, {"quant_method": "bitsandbytes", "load_in_4bit": True}, tmp_path)
    assert found.dtype is dtype and torch.equal(found, expected)


def test_bitsandbytes_8_bit(weight, tmp_path):
    integers, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    stored = {"weight": integers, "SCB": scales, "weight_format": torch.zeros((), dtype=torch.uint8)}
    found = read(stored, {"quant_method": "bitsandbytes", "load_in_8bit": True}, tmp_path)
    assert torch.equal(found, bitsandbytes.functional.int8_vectorwise_dequant(integers, scales))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
def test_compressed_tensors_integers(bits, symmetric, group, weight, tmp_path):
    strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    args = ct.QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **strategy)
    scheme = ct.QuantizationScheme(targets=["Linear"], weights=args)
    blocks = weight.reshape(N_OUT, -1, group or N_IN)
    low, high, half = blocks.amin(2).clamp(max=0), blocks.amax(2).clamp(min=0), 2 ** (bits - 1)
    scale = (blocks.abs().amax(2) / half if symmetric else (high - low) / (2 * half - 1)).half()
    zero = (torch.zeros_like(low) if symmetric else (-half - low / scale).round().clamp(-half, half - 1)).to(torch.int8)
    state = {"weight": weight.half(), "weight_scale": scale, "weight_zero_point": zero}
    packed = PackedQuantizationCompressor.compress(state, scheme)
    expected = PackedQuantizationCompressor.decompress(dict(packed), scheme)["weight"]
    found = read(packed, {"quant_method": "compressed-tensors", "format": "pack-quantized"}, tmp_path)
    assert found.dtype is torch.float16 and torch.equal(found, expected)
    assert (found - weight).abs().max() < 1.1 * float(scale.max())


@pytest.mark.parametrize("rows", [1, N_OUT])
def test_compressed_tensors_fp8(rows, weight, tmp_path):
    scale = weight.reshape(rows, -1).abs().amax(1, keepdim=True) / 448
    strategy = "tensor" if rows == 1 else "channel"
    scheme = ct.QuantizationScheme(
        targets=["Linear"], weights=ct.QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy)
    )
    stored = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale.reshape(-1, 1)[:rows]}
    expected = NaiveQuantizationCompressor.decompress(dict(stored), scheme)["weight"]
    found = read(stored, {"quant_method": "compressed-tensors", "format": "float-quantized"}, tmp_path)
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)


def test_fp8_in_blocks(weight, tmp_path):
    scale = torch.rand(N_OUT // 8, N_IN // 64) + 0.5
    stored = {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": scale}
    expected = Fp8Dequantize(None)._dequantize_one(stored["weight"], scale, torch.bfloat16)
    found = read(stored, {"quant_method": "fp8", "weight_block_size": [8, 64]}, tmp_path, "bfloat16")
    assert found.dtype is torch.bfloat16 and torch.equal(found, expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
def test_gptq_as_its_format_is_specified(bits, fmt, tmp_path):
    """Groups out of order, as `desc_act` leaves them; the first format stores each zero less one."""
    rng, groups = np.random.default_rng(bits), 4
    q, zero = rng.integers(0, 2**bits, (N_IN, N_OUT)), rng.integers(1, 2**bits, (groups, N_OUT))
    scale, index = rng.uniform(0.01, 0.1, (groups, N_OUT)).astype(np.float16), rng.permutation(np.arange(N_IN) % groups)
    expected = np.zeros((N_OUT, N_IN), np.float16)
    for k in range(N_IN):
        expected[:, k] = (q[k] - zero[index[k]]).astype(np.float16) * scale[index[k]]
    stored_zero = zero - (1 if fmt == "gptq" else 0)
    stored = {
        "qweight": words(q, bits), "qzeros": words(stored_zero.T, bits).T, "scales": torch.from_numpy(scale),
        "g_idx": torch.from_numpy(index.astype(np.int32)),
    }  # fmt: skip
    found = read(stored, {"quant_method": "gptq", "bits": bits, "checkpoint_format": fmt}, tmp_path)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_awq_as_its_format_is_specified(tmp_path):
    """Of eight columns, a word has 0, 2, 4, 6, 1, 3, 5 and 7, from its lowest bits on."""
    rng, groups, order = np.random.default_rng(1), 4, AWQ_ORDER
    q, zero = rng.integers(0, 16, (N_IN, N_OUT)), rng.integers(0, 16, (groups, N_OUT))
    scale = rng.uniform(0.01, 0.1, (groups, N_OUT)).astype(np.float16)
    expected = np.zeros((N_OUT, N_IN), np.float16)
    for k in range(N_IN):
        group = k // (N_IN // groups)
        expected[:, k] = (q[k] - zero[group]).astype(np.float16) * scale[group]
    stored = {
        "qweight": words(q.T, 4, order).T, "qzeros": words(zero.T, 4, order).T, "scales": torch.from_numpy(scale),
    }  # fmt: skip
    found = read(stored, {"quant_method": "awq", "bits": 4, "version": "gemm"}, tmp_path)
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight.absmax": None}, "no m.weight.absmax"),
        ({"weight.absmax": torch.zeros(3)}, "48 scales"),
        ({"weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)}, "a state with shape"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message, weight, tmp_path):
    stored = four_bits(weight, "nf4", nested=False)[0] | change
    with pytest.raises(InputRefused, match="not stored as its method says") as refused:
        read({k: v for k, v in stored.items() if v is not None}, {"quant_method": "bitsandbytes"}, tmp_path)
    assert message in str(refused.value)


@pytest.fixture
def quantized_base(bases, tmp_path) -> Path:
    """The tiny Llama in nf4, as Transformers saves it."""
    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    stored = load_file(base / "model.safetensors")
    for name in [name for name in stored if "_proj" in name]:
        parts, _ = four_bits(stored.pop(name).half(), "nf4", nested=True)
        stored |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (base / "config.json").write_text(json.dumps(config))
    return base


def test_a_quantized_base_is_exported_in_floats_and_checked(quantized_base, adapters, tmp_path):
    checkpoint = Checkpoint.open(Located(quantized_base, "base"))
    assert checkpoint.quantization == "bitsandbytes 4-bit (nf4)" and "quantization_config" not in checkpoint.config
    request = Request(str(quantized_base), ((str(adapters["chat"]), "chat"),), "dynamic", dtype="float32")
    export(request, ExportOptions(tmp_path / "out"))
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    report = check(tmp_path / "out", SourceOverrides(), CheckOptions(provider="cpu", n_rows=8))[0]
    assert report.verdict is Verdict.PASS
    assert any("bitsandbytes 4-bit (nf4), are read right" in sentence for sentence in report.skipped)


CARD = """# an adapter

The following `bitsandbytes` quantization config was used during training:
- quant_method: bitsandbytes
- load_in_4bit: True
- bnb_4bit_quant_type: nf4

### Framework versions
"""


def test_an_adapter_of_a_quantized_base_on_one_of_floats_is_warned_of(bases, adapters, tmp_path, quantized_base):
    adapter = Path(shutil.copytree(adapters["chat"], tmp_path / "chat"))
    (adapter / "README.md").write_text(CARD)

    def remarks(base: Path) -> list[str]:
        plan = make_plan(Request(str(base), ((str(adapter), "chat"),), "merge", dtype="float32"))
        return [remark for remark in plan.remarks if "trained on quantized weights" in remark]

    assert remarks(quantized_base) == []
    (remark,) = remarks(bases["llama"])
    assert "(bitsandbytes 4-bit (nf4))" in remark and "name the quantized base" in remark
