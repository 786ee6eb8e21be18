"""Initializations that change the base's weights (PiSSA, OLoRA), undone: the pair that fits the pristine base.

PEFT starts such an adapter from factors `A0, B0` of the base's own weight and takes their product off it:
`W0' = W0 − s·B0·A0`. Whoever loads the trained `A, B` onto the pristine base repeats that. Its effect is
`s·(B·A − B0·A0)`, a pair of twice the rank: `[A; A0]`, `[B, −B0]`. Source: Meng et al., PiSSA (arXiv 2404.02948),
section 3 and appendix C; PEFT's `save_pretrained(path_initial_model_for_weight_conversion=…)` stores the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from lora_export.adapters.factors import LoraFactors

# Those that can be repeated from the base alone and give the same numbers each time.
REPEATABLE = ("pissa", "olora")


# Options of a pair that its start did not take off the base.
PLAIN_START = {"init_lora_weights": True}


def changes_base(config: Mapping[str, object]) -> bool:
    """Whether PEFT, loading this adapter, would first change the base in a way that `with_initial_pair` knows."""
    return str(config.get("init_lora_weights")).lower() in REPEATABLE


def with_initial_pair(pair: LoraFactors, weight: torch.Tensor, config: Mapping[str, object]) -> LoraFactors:
    """The pair of rank `2r` that does to the pristine `weight` what `pair` does to the one that its start left.

    Args:
        weight: The base's, in the layout that the pair names.
        config: The `adapter_config.json`; its `init_lora_weights` is one of `REPEATABLE`.
    """
    a, b = _initial_factors(pair, weight, str(config["init_lora_weights"]).lower())
    return replace(pair, a=torch.cat([pair.a.float(), a]), b=torch.cat([pair.b.float(), -b], dim=1))


def _initial_factors(pair: LoraFactors, weight: torch.Tensor, init: str) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's own start of a layer of this weight: `A0` `[rank, in]`, `B0` `[out, rank]`, float32."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear
    from transformers.pytorch_utils import Conv1D

    real = torch.nn.Parameter(weight.to(torch.float32, copy=True), requires_grad=False)
    with torch.device("meta"):
        sizes = weight.shape if pair.weight_is_in_out else weight.shape[::-1]
        base = Conv1D(sizes[1], sizes[0]) if pair.weight_is_in_out else torch.nn.Linear(*sizes, bias=False)
    base.weight = real
    config = LoraConfig(r=pair.rank, lora_alpha=pair.rank, init_lora_weights=init, fan_in_fan_out=pair.weight_is_in_out)
    layer = Linear(base, "start", config=config, r=pair.rank, lora_alpha=pair.rank)
    # With a scale of its own, 1: PiSSA's factors are divided by the scale, so that s·B0·A0 is the same for any.
    a, b = layer.lora_A["start"].weight.detach(), layer.lora_B["start"].weight.detach()
    return (a, b / pair.scale) if init == "pissa" else (a, b)
