"""Adapters of tiny bases as PEFT saves them, random as after a training; `matrix.py` and `mutations.py` export them."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
import transformers
from adapter_options import AdapterOption
from architectures import Architecture

# Standard deviation of the noise: the changes of a short training with a high learning rate.
STRENGTH = 0.1


def make_adapter(
    architecture: Architecture,
    option: AdapterOption,
    base: Path,
    rank: int,
    folder: Path,
    *,
    strength: float = STRENGTH,
    seed: int | None = None,
    alpha: float | None = None,
) -> Path:
    """An adapter as PEFT saves it, every trained parameter moved by noise (a fresh one does nothing).

    Args:
        strength: Standard deviation of that noise.
        seed: Of the start and of the noise; the rank if not given.
        alpha: Of the scale; PEFT's usual one if not given.
    """
    if folder.is_dir():
        return folder
    torch.manual_seed(rank if seed is None else seed)
    model = getattr(transformers, architecture.auto).from_pretrained(base)
    config = option.config(architecture, rank)
    if alpha is not None:
        config.lora_alpha = alpha
    model = peft.get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=strength)
    model.save_pretrained(folder)
    return folder
