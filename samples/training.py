"""The training loop of all samples, and what every sample sets up before it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from common import progress
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


def prepare(seed: int, threads: int = 1) -> None:
    """Make what follows repeatable and quieten the libraries.

    A tiny model is best trained on one thread: a second waits more than it works.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def fit(model: nn.Module, batches: Iterable[Batch], optimizers: list[torch.optim.Optimizer]) -> list[float]:
    """Take one optimizer step per batch, warming up over a tenth and then cooling to zero.

    Returns the loss of every step. The model's own `loss` output is what is minimised.
    """
    steps = list(batches)
    schedules = [_one_cycle(optimizer, len(steps)) for optimizer in optimizers]
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for number, batch in enumerate(steps, start=1):
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if number % max(1, len(steps) // 5) == 0:
            spent = time.monotonic() - started
            progress(f"  step {number}/{len(steps)}  loss {losses[-1]:.3f}  {spent:.0f} s")
    model.eval()
    return losses


def adamw(model: nn.Module, rate: float, head_rate: float) -> list[torch.optim.Optimizer]:
    """AdamW over everything trainable; the rates are the peak ones, the head has its own."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in named if ".classifier." in name]
    body = [p for name, p in named if ".classifier." not in name]
    groups = [{"params": body, "lr": rate}, {"params": head, "lr": head_rate}]
    return [torch.optim.AdamW(groups, weight_decay=0.01)]


def accuracy(predicted: Tensor, expected: Tensor) -> float:
    """The share of predictions that are right, 0 to 1, to four decimals."""
    return round((predicted == expected).float().mean().item(), 4)


def _one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    def factor(step: int) -> float:
        warm = (step + 1) / max(1.0, steps / 10)
        return min(warm, (steps - step) / max(1.0, steps * 0.9))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
