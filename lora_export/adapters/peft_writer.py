"""Write the `adapter_config.json` of pairs that are known one by one, by PEFT's own `LoraConfig`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

# What PEFT puts before a module's path in an adapter's file.
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def exact_names(modules: Iterable[str], everything: Collection[str]) -> list[str] | str:
    """`target_modules` that PEFT matches to exactly `modules`: the list, or a regular expression.

    PEFT takes a list's entries as ends of paths, so a module whose path is the end of another needs the expression.

    Args:
        everything: The paths of all modules of the model.
    """
    modules = sorted(modules)
    chosen = set(modules)
    if any(path.endswith(f".{name}") and path not in chosen for name in modules for path in everything):
        return "|".join(re.escape(name) for name in modules)
    return modules


def write_config(
    folder: Path,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    everything: Collection[str],
    options: Mapping,
) -> None:
    """Write the config of an adapter with exactly these ranks and alphas.

    Args:
        ranks, alphas: By module; the scale is alpha / rank.
        everything: The paths of all modules of the model.
        options: Other options of `LoraConfig`.
    """
    from peft import LoraConfig

    rank, alpha = _most_common(ranks), _most_common(alphas)
    targets = exact_names(ranks, everything)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={_pattern(m, everything): r for m, r in sorted(ranks.items()) if r != rank},
        alpha_pattern={_pattern(m, everything): a for m, a in sorted(alphas.items()) if a != alpha},
        target_modules=targets,
        inference_mode=True,
        **options,
    )
    config.target_modules = targets  # PEFT makes a list a set, whose order is another in every run
    config.save_pretrained(str(folder))


def _most_common(values: Mapping[str, float]) -> float:
    return Counter(values.values()).most_common(1)[0][0]


def _pattern(module: str, everything: Collection[str]) -> str:
    """A pattern's key for one module: its path, anchored where other paths end like it."""
    return f"^{module}" if any(path.endswith(f".{module}") for path in everything) else module
