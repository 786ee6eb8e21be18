"""Full fine-tunes of the tiny bases: the base plus random low-rank and dense differences, saved by Transformers."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tiny import save_tokenizer


def fine_tune(
    base: Path,
    folder: Path,
    model_class: str,
    change: Callable[[str, torch.Tensor, torch.Generator], torch.Tensor | None],
    *,
    n_labels: int | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Save `base` with `change(name, weight, generator)` added to each parameter (None: left as it is)."""
    sizes = {} if n_labels is None else {"num_labels": n_labels, "ignore_mismatched_sizes": True}
    model = getattr(transformers, model_class).from_pretrained(base, **sizes)
    generator = torch.Generator().manual_seed(zlib.crc32(folder.name.encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            delta = change(name, parameter, generator)
            if delta is not None:
                parameter.add_(delta)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if (base / "tokenizer.json").exists():
        save_tokenizer(folder, classifier="Bert" in model_class)
    return folder


def dense(name: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise of a fifth of the weight's own size, of full rank."""
    return torch.randn(weight.shape, generator=generator) * weight.std().clamp(min=0.1) / 5


def low_rank(name: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
    """A difference of rank 3 in every attention projection, nothing elsewhere."""
    if weight.ndim != 2 or not any(part in name for part in ("attn", "attention.self")):
        return None
    b = torch.randn(weight.shape[0], 3, generator=generator)
    return b @ torch.randn(3, weight.shape[1], generator=generator) / weight.shape[1]


def linears(name: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
    """Dense differences in every matrix but embeddings and heads."""
    if weight.ndim != 2 or any(part in name for part in ("embed", "wte", "wpe", "lm_head", "classifier")):
        return None
    return dense(name, weight, generator)
