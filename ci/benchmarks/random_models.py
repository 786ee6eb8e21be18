"""Random bases and adapters of a given shape, written straight to disk: no benchmark depends on a download.

Weights are random, so outputs mean nothing; shapes, files and arithmetic are those of a trained model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

_STANDARD_DEVIATION = 0.02
# Elements drawn at a time: what writing a base holds in memory.
_CHUNK = 1 << 24
_SAFETENSORS_DTYPES = {"float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama-shaped decoder with tied embeddings."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    dtype: str

    def linears(self) -> dict[str, tuple[int, int]]:
        """`(out_features, in_features)` of the seven linear modules of every layer, by path."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        one_layer = {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.mlp, self.hidden),
            "mlp.up_proj": (self.mlp, self.hidden),
            "mlp.down_proj": (self.hidden, self.mlp),
        }
        return {f"model.layers.{i}.{name}": size for i in range(self.layers) for name, size in one_layer.items()}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all stored tensors by name."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        found |= {f"{name}.weight": size for name, size in self.linears().items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        found |= {f"model.layers.{i}.{norm}.weight": (self.hidden,) for i in range(self.layers) for norm in norms}
        return found | {"model.norm.weight": (self.hidden,)}

    @property
    def n_parameters(self) -> int:
        return sum(math.prod(size) for size in self.tensors().values())


def write_llama(folder: Path, shape: LlamaShape, seed: int = 0) -> Path:
    """A base of `shape` in `folder` (left as it is if it is there); at most 128 MB are held at a time."""
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    llama_config(shape).save_pretrained(folder)
    sizes, dtype = shape.tensors(), np.dtype(shape.dtype)
    header, offset = {}, 0
    for name, size in sizes.items():
        end = offset + math.prod(size) * dtype.itemsize
        stored = _SAFETENSORS_DTYPES[shape.dtype]
        header[name] = {"dtype": stored, "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    temporary = folder / ".model.safetensors.partial"
    rng = np.random.default_rng(seed)
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size in sizes.values():
            for chunk in _random_chunks(rng, math.prod(size), centre=float(len(size) == 1)):
                file.write(chunk.astype(dtype).data)
    temporary.replace(folder / "model.safetensors")
    return folder


def _random_chunks(rng: np.random.Generator, n: int, centre: float) -> Iterator[np.ndarray]:
    for start in range(0, n, _CHUNK):
        drawn = rng.standard_normal(min(_CHUNK, n - start), dtype=np.float32)
        drawn *= _STANDARD_DEVIATION
        drawn += centre
        yield drawn


def llama_config(shape: LlamaShape):
    """The `LlamaConfig` of a shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        dtype=shape.dtype,
    )


@dataclass(frozen=True)
class Head:
    """A classification head that an adapter brings (PEFT's `modules_to_save`): its module and `[labels, hidden]`."""

    module: str
    labels: int
    hidden: int


def write_adapter(
    folder: Path,
    linears: Mapping[str, tuple[int, int]],
    *,
    rank: int,
    base: Path,
    task_type: str,
    seed: int,
    head: Head | None = None,
    fan_in_fan_out: bool = False,
    strength: float = 1.0,
) -> Path:
    """A float32 PEFT adapter with random, non-zero A and B on `linears` (left as it is if it is there).

    Args:
        strength: How many times as strong as by default, in B.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    if (folder / "adapter_model.safetensors").exists():
        return folder
    generator = torch.Generator().manual_seed(seed)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator) * _STANDARD_DEVIATION

    tensors = {}
    for module, (n_out, n_in) in linears.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = drawn(rank, n_in)
        tensors[f"base_model.model.{module}.lora_B.weight"] = strength * drawn(n_out, rank)
    if head is not None:
        tensors[f"base_model.model.{head.module}.weight"] = drawn(head.labels, head.hidden)
        tensors[f"base_model.model.{head.module}.bias"] = drawn(head.labels)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=sorted({module.rsplit(".", 1)[-1] for module in linears}) if head is None else sorted(linears),
        modules_to_save=[head.module] if head else None,
        task_type=task_type,
        fan_in_fan_out=fan_in_fan_out,
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
