"""Bases as GPTQ, AWQ and compressed-tensors store them, packed here by plain loops over words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# The tensors of a weight `[out, in]`, by ending.
Store = Callable[[np.ndarray], Mapping[str, torch.Tensor]]


def words(numbers: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """The first axis packed into 32-bit words, number by number: number `order[i]` of a word in place `i`."""
    per_word = 32 // bits
    packed = np.zeros((-(-len(numbers) // per_word), *numbers.shape[1:]), np.uint32)
    for index, row in enumerate(numbers):
        place = index % per_word if order is None else order.index(index % per_word)
        packed[index // per_word] |= row.astype(np.uint32) << np.uint32(bits * place)
    return torch.from_numpy(packed.view(np.int32))


def integers_of(weight: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rounded to nearest: integers `[out, in]`, float16 scales and zeros `[out, groups]`, zeros at least 1."""
    most = 2**bits - 1
    blocks = weight.reshape(len(weight), -1, group)
    low, high = blocks.min(2).clip(max=0), blocks.max(2).clip(min=0)
    scales = ((high - low) / most).astype(np.float16)
    zeros = (-low / scales.astype(np.float32)).round().clip(1, most).astype(np.int64)
    numbers = (blocks / scales[..., None].astype(np.float32)).round() + zeros[..., None]
    return numbers.clip(0, most).astype(np.int64).reshape(weight.shape), scales, zeros


def gptq(weight: np.ndarray, *, bits: int = 4, group: int = 32, scattered: bool = False) -> dict[str, torch.Tensor]:
    numbers, scales, zeros = integers_of(weight, bits, group)
    index = np.arange(weight.shape[1]) // group
    return {
        "qweight": words(numbers.T, bits), "qzeros": words(zeros - 1, bits).T.contiguous(),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.from_numpy((index[::-1].copy() if scattered else index).astype(np.int32)),
    }  # fmt: skip


def awq(weight: np.ndarray, *, group: int = 32) -> dict[str, torch.Tensor]:
    numbers, scales, zeros = integers_of(weight, 4, group)
    return {
        "qweight": words(numbers, 4, AWQ_ORDER).T.contiguous(), "qzeros": words(zeros, 4, AWQ_ORDER).T.contiguous(),
        "scales": torch.from_numpy(scales.T.copy()),
    }  # fmt: skip


def compressed(weight: np.ndarray, *, bits: int = 8, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Symmetric, a scale a row."""
    half = 2 ** (bits - 1)
    scales = torch.from_numpy(np.abs(weight).max(1, keepdims=True) / (half - 1)).to(dtype)
    numbers = (weight / scales.float().numpy()).round().clip(-half, half - 1).astype(np.int64) + half
    return {
        "weight_packed": words(numbers.T, bits).T.contiguous(), "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }  # fmt: skip


CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False},
    "gptq-scattered": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "compressed": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "compressed-f32": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
}
STORES: Mapping[str, Store] = {
    "gptq": gptq,
    "gptq-scattered": lambda weight: gptq(weight, scattered=True),
    "awq": awq,
    "compressed": compressed,
    "compressed-f32": lambda weight: compressed(weight, bits=4, dtype=torch.float32),
}


def quantized_base(base: Path, method: str, folder: Path) -> Path:
    """`base` in `folder`, its projections stored as `method` does."""
    shutil.copytree(base, folder)
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if "_proj" in name]:
        parts = STORES[method](stored.pop(name).float().numpy())
        stored |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS[method]}))
    return folder
