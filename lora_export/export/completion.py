"""What an adapter needs of the base's numbers before it is exported, and what of it the chosen mode cannot export.

PEFT reads an adapter on a weightless base. Three things depend on real weights: a start that changed the base, a
tuner to be converted, and copies of the base's own tensors in the adapter's file.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lora_export.adapters.factors import Adapter, LoraFactors, delta
from lora_export.adapters.initialization import changes_base, with_initial_pair
from lora_export.adapters.on_quantized import HEAD_ROWS, refuse
from lora_export.adapters.pack import choose_sites
from lora_export.adapters.peft_layer import PeftLayer
from lora_export.contract import ADAPTER_INPUT_KINDS
from lora_export.errors import InputRefused, some_of
from lora_export.export.weights import Parameters


def completed(
    adapter: Adapter, base: Parameters, model: torch.nn.Module, *, mode: str, convert_rank: float | None
) -> Adapter:
    """`adapter` as `mode` ("merge" or "dynamic") exports it on the pristine `base`.

    1. A copy of a base's tensor that differs from the base's replaces it, as PEFT lets it.
    2. A start that changed the base becomes part of the pair.
    3. `dynamic`: layers that are not pairs become pairs of `convert_rank`; replaced rows of a head that is tied to an
       embedding become a pair, exactly.

    Args:
        model: The weightless base.

    Raises:
        InputRefused: It holds what `mode` cannot export; modules are named.
    """
    adapter = _with_differing_copies(adapter, base)
    if changes_base(adapter.config):
        lora = {
            module: with_initial_pair(pair, base.base(f"{module}.weight"), adapter.config)
            for module, pair in adapter.lora.items()
        }
        adapter = replace(adapter, lora=lora)
    if mode == "dynamic":
        adapter = _with_head_rows_as_pairs(_converted(adapter, base, convert_rank), base, model)
        _require_servable(adapter, base)
    else:
        _require_mergeable(adapter, base)
    return adapter


def _with_differing_copies(adapter: Adapter, base: Parameters) -> Adapter:
    replaced = dict(adapter.replaced)
    for path, tensor in adapter.base_copies.items():
        if not base.stores(path, tensor):
            replaced |= dict.fromkeys((path, *base.aliases.get(path, ())), tensor)
    return replace(adapter, replaced=replaced)


def _converted(adapter: Adapter, base: Parameters, convert_rank: float | None) -> Adapter:
    lora, errors, kept = dict(adapter.lora), {}, {}
    for module, layer in adapter.layers.items():
        if convert_rank is None or not layer.is_convertible:
            kept[module] = layer
            continue
        real = {name: base.base(f"{module}.{name}") for name in layer.parameters}
        lora[module] = pair = layer.converted(module, real, convert_rank)
        errors[module] = _conversion_error(layer, real, pair)
    return replace(adapter, lora=lora, layers=kept, conversion_errors=errors)


def _with_head_rows_as_pairs(adapter: Adapter, base: Parameters, model: torch.nn.Module) -> Adapter:
    """Rows `R` of a Linear at token ids `t` as a pair: A is `R − W[t]`, `[n, in]`, and B has a 1 at `[t[j], j]`."""
    lora, kept = dict(adapter.lora), {}
    for path, rows in adapter.token_rows.items():
        module = path.removesuffix(".weight")
        if not isinstance(model.get_submodule(module), torch.nn.Linear):
            kept[path] = rows
            continue
        if base.grid_of(path) is not None:
            refuse(HEAD_ROWS, adapter.name, path)
        weight = base.base(path)
        change = rows.rows.float() - weight[rows.indices].float()
        places = torch.zeros(len(weight), len(rows.indices))
        places[rows.indices, torch.arange(len(rows.indices))] = 1
        lora[module] = LoraFactors(module, change, places, 1.0, weight_is_in_out=False)
    return replace(adapter, lora=lora, token_rows=kept)


def _conversion_error(layer: PeftLayer, real: dict[str, torch.Tensor], pair: LoraFactors) -> float:
    """`‖ΔW − s·B·A‖ / ‖ΔW‖`, Frobenius; 0 where the layer changes nothing."""
    change = layer.merged(real)["weight"] - real["weight"].float()
    error = (change - delta(pair)).norm()
    return float(error / change.norm()) if change.norm() else 0.0


def _require_servable(adapter: Adapter, base: Parameters) -> None:
    served = choose_sites([adapter]).parameters
    rest = [path for path in adapter.replaced if path not in served]
    tables = [path for path in rest if path in base.shapes and adapter.replaced[path].ndim == 2]
    n_rows = {path: (len(adapter.replaced[path]), base.shapes[path][0]) for path in tables}
    resized = {path: f"{new} rows in place of {old}" for path, (new, old) in n_rows.items() if new != old}
    gated = adapter.invocation_tokens is not None
    what = {
        "has a bias on B that is active for some tokens only (lora_bias with alora_invocation_tokens)": [
            module for module, pair in adapter.pairs.items() if gated and pair.bias is not None
        ],
        f"was trained on a resized vocabulary ({', '.join(sorted(set(resized.values())))}), so it replaces embeddings, "
        "which are not Linear": list(resized),
        "replaces modules that are not Linear (modules_to_save, or a saved embedding)": rest,
        "adapts layers whose adapter is no pair": [
            f"{module} ({type(layer.layer).__name__})" for module, layer in adapter.layers.items()
        ],
    }
    for problem, where in what.items():
        if where:
            raise InputRefused(
                f"Adapter {adapter.name!r} {problem}; a dynamic graph has no inputs for that",
                where=some_of(where, 6),
                expected=", ".join(spec.served for spec in ADAPTER_INPUT_KINDS if spec.served),
                next_step="merge this adapter into a graph of its own",
            )


def _require_mergeable(adapter: Adapter, base: Parameters) -> None:
    adds_bias = {module for module, pair in adapter.pairs.items() if pair.bias is not None}
    adds_bias |= set(adapter.layers) if adapter.config.get("peft_type") == "BEFT" else set()
    lacking = sorted(module for module in adds_bias if f"{module}.bias" not in base.shapes)
    if lacking:
        raise InputRefused(
            f"Adapter {adapter.name!r} adds a bias to modules that have none",
            where=", ".join(lacking[:6]),
            next_step="serve it with `lora-export dynamic`, where it is an input (LoRA only)",
        )
