"""The modules that `--targets` names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_export.base.weightless import is_conv1d
from lora_export.errors import UsageProblem

ALL_LINEAR = "all-linear"
_HEADS = ("score", "classifier")  # PEFT's SEQ_CLS_HEAD_NAMES


def target_modules(targets: Sequence[str], model) -> tuple[str, ...]:
    """The linear modules of a weightless `model` that `targets` name, by path or by its last parts.

    `all-linear` names all of them but heads, as in PEFT: what gives the model's output (`lm_head`, `classifier`).

    Raises:
        UsageProblem: A target names no linear module.
    """
    if not targets:
        return ()
    linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) or is_conv1d(m)]
    found: dict[str, None] = {}
    for target in targets:
        if target == ALL_LINEAR:
            head = model.get_output_embeddings()
            of_body = [name for name in linear if model.get_submodule(name) is not head and name not in _HEADS]
            found |= dict.fromkeys(of_body)
            continue
        matches = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not matches:
            raise UsageProblem(
                f"--targets {target!r} names no linear module of the base",
                expected=f"{ALL_LINEAR}, or one of " + ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear})),
            )
        found |= dict.fromkeys(matches)
    return tuple(found)
