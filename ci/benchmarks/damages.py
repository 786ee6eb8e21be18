"""Ways in which an export is known to go wrong, each as a change of the adapters' values: one row a damage.

A damage takes all adapters of the export (of a merged one, the merged adapter and one that it is not) and returns them
with the first one wrong, or None where it does not apply. What is done to a graph instead is in `graph_damages.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from adapter_values import Pair, Trained

Adapters = tuple[Trained, ...]
_NUMBER = re.compile(r"\.(\d+)\.")
# The names that projections of the same shape have: query and value.
_QUERY_VALUE = (("query", "value"), ("q_proj", "v_proj"), ("q", "v"), ("query_proj", "value_proj"))


@dataclass(frozen=True)
class Damage:
    """One way of being wrong.

    Attributes:
        options: The adapter options (`adapter_options.py`) that it is done to.
        change: The wrong adapters, or None where there is nothing to damage.
        dtypes: The dtypes of exports that it is done to; empty for all.
        not_on: Architectures that it does nothing to.
    """

    name: str
    change: Callable[[Adapters], Adapters | None]
    options: tuple[str, ...] = ("lora",)
    dtypes: tuple[str, ...] = ()
    not_on: tuple[str, ...] = ()


def _first(change: Callable[[Trained], Trained | None]) -> Callable[[Adapters], Adapters | None]:
    def changed(adapters: Adapters) -> Adapters | None:
        wrong = change(adapters[0])
        return None if wrong is None else (wrong, *adapters[1:])

    return changed


def _pairs(change: Callable[[Pair], Pair]) -> Callable[[Adapters], Adapters | None]:
    def changed(trained: Trained) -> Trained:
        return replace(trained, pairs={module: change(pair) for module, pair in trained.pairs.items()})

    return _first(changed)


def _scaled(factor: Callable[[Pair], float]) -> Callable[[Adapters], Adapters | None]:
    return _pairs(lambda pair: replace(pair, scale=pair.scale * factor(pair)))


def _config_scale(trained: Trained) -> Trained:
    """Every module gets the config's α/r, whatever the patterns say."""
    scale = trained.alpha / trained.rank
    return replace(trained, pairs={module: replace(pair, scale=scale) for module, pair in trained.pairs.items()})


def _read_in_other_order(matrix: np.ndarray) -> np.ndarray:
    """The numbers of the transpose, in the shape of the matrix."""
    return np.ascontiguousarray(matrix.T).reshape(matrix.shape)


def _without(*modules: str) -> Callable[[Trained], Trained]:
    return lambda trained: replace(trained, pairs={m: p for m, p in trained.pairs.items() if m not in modules})


def _without_a_module(trained: Trained) -> Trained:
    return _without(sorted(trained.pairs)[0])(trained)


def _layer(module: str) -> int:
    found = _NUMBER.search(module)
    return int(found.group(1)) if found else -1


def _without_a_layer(trained: Trained) -> Trained | None:
    last = max(map(_layer, trained.pairs))
    return _without(*(m for m in trained.pairs if _layer(m) == last))(trained) if last > 0 else None


def _other_layer(module: str) -> str:
    """The same module of layer 1 for one of layer 0."""
    return _NUMBER.sub(".1.", module, count=1)


def _pairs_of_another_layer(trained: Trained) -> Trained | None:
    pairs = dict(trained.pairs)
    for module, pair in trained.pairs.items():
        other = _other_layer(module)
        if _layer(module) == 0 and other in pairs and _alike(pair, pairs[other]):
            pairs[module], pairs[other] = pairs[other], pairs[module]
    return _if_moved(trained, pairs)


def _if_moved(trained: Trained, pairs: dict[str, Pair]) -> Trained | None:
    is_moved = any(pair is not trained.pairs[module] for module, pair in pairs.items())
    return replace(trained, pairs=pairs) if is_moved else None


def _alike(pair: Pair, other: Pair) -> bool:
    return pair.a.shape[1] == other.a.shape[1] and pair.b.shape[0] == other.b.shape[0]


def _weight_of_another_layer(trained: Trained) -> Trained | None:
    """The base's weight of one module of layer 1 where layer 0's should be."""
    for module in trained.pairs:
        path, other = f"{module}.weight", f"{_other_layer(module)}.weight"
        if _layer(module) == 0 and other in trained.base and trained.base[other].shape == trained.base[path].shape:
            return replace(trained, base=trained.base | {path: trained.base[other]})
    return None


def _query_and_value_swapped(trained: Trained) -> Trained | None:
    pairs = dict(trained.pairs)
    for module in trained.pairs:
        for query, value in _QUERY_VALUE:
            other = re.sub(rf"\.{query}$", f".{value}", module)
            if other != module and other in pairs and _alike(pairs[module], pairs[other]):
                pairs[module], pairs[other] = pairs[other], pairs[module]
    return _if_moved(trained, pairs)


def _swapped(adapters: Adapters) -> Adapters | None:
    return (adapters[1], adapters[0], *adapters[2:]) if len(adapters) > 1 else None


def _dropped(trained: Trained) -> Trained:
    return replace(trained, pairs={}, whole={}, tokens={})


def _heads(trained: Trained) -> dict[str, np.ndarray]:
    return {path: value for path, value in trained.whole.items() if value.ndim == 2}


def _head_of_base(trained: Trained) -> Trained | None:
    heads = _heads(trained)
    kept = {path: value for path, value in trained.whole.items() if path not in heads}
    return replace(trained, whole=kept) if heads else None


def _head_of_zeros(trained: Trained) -> Trained | None:
    zeros = {path: np.zeros_like(value) for path, value in _heads(trained).items()}
    return replace(trained, whole=trained.whole | zeros) if zeros else None


def _heads_bias_missing(trained: Trained) -> Trained | None:
    biases = {path.removesuffix("weight") + "bias" for path in _heads(trained)} & trained.whole.keys()
    zeros = {path: np.zeros_like(trained.whole[path]) for path in biases}
    return replace(trained, whole=trained.whole | zeros) if zeros else None


def _trained_biases_missing(trained: Trained) -> Trained | None:
    """The base's biases where trained ones should be, those of a head apart."""
    of_heads = {path.removesuffix("weight") + "bias" for path in _heads(trained)}
    trained_ones = {path for path in trained.whole if path.endswith(".bias")} - of_heads
    kept = {path: value for path, value in trained.whole.items() if path not in trained_ones}
    return replace(trained, whole=kept) if trained_ones else None


def _overflowing(trained: Trained) -> Trained:
    """One A near the largest float16: stored finite, as its B is, but not their product with an activation."""
    module = sorted(trained.pairs)[0]
    pair = trained.pairs[module]
    return replace(trained, pairs=trained.pairs | {module: replace(pair, a=_enlarged(pair.a))})


def _enlarged(matrix: np.ndarray) -> np.ndarray:
    return matrix * np.float32(6e4 / np.abs(matrix).max())


def _overflowing_weight(trained: Trained) -> Trained:
    module = sorted(trained.pairs)[0]
    path = f"{module}.weight"
    return replace(trained, base=trained.base | {path: _enlarged(trained.base[path])})


_ANY_PAIR = ("lora", "dora")
DAMAGES = (
    Damage("A transposed", _pairs(lambda pair: replace(pair, a=_read_in_other_order(pair.a))), _ANY_PAIR),
    Damage("B transposed", _pairs(lambda pair: replace(pair, b=_read_in_other_order(pair.b))), _ANY_PAIR),
    Damage("alpha doubled", _scaled(lambda pair: 2), ("lora", "embedding")),
    Damage("alpha halved", _scaled(lambda pair: 0.5), ("lora", "embedding")),
    # Not an embedding's pair: of a classifier's 16 rows, 1 % of its effect is less than PyTorch loses in float16.
    Damage("alpha 1 % off", _scaled(lambda pair: 1.01), ("lora", "rslora")),
    Damage("rank one too large in the scale", _scaled(lambda pair: pair.rank / (pair.rank + 1))),
    Damage("rank and alpha patterns ignored", _first(_config_scale), ("rank_pattern",)),
    Damage("rsLoRA's scale ignored", _scaled(lambda pair: 1 / math.sqrt(pair.rank)), ("rslora",)),
    Damage("rsLoRA's scale on plain LoRA", _scaled(lambda pair: math.sqrt(pair.rank))),
    Damage("one module dropped", _first(_without_a_module), ("lora", "rank_pattern")),
    Damage("one layer's pairs dropped", _first(_without_a_layer), ("lora", "rank_pattern")),
    Damage("pairs of two layers swapped", _first(_pairs_of_another_layer), _ANY_PAIR),
    Damage("a weight from another layer", _first(_weight_of_another_layer)),
    Damage("query and value swapped", _first(_query_and_value_swapped)),
    Damage("two adapters swapped", _swapped, ("lora", "dora", "modules_to_save")),
    Damage("adapter dropped", _first(_dropped), ("lora", "dora", "bias", "lora_bias", "trainable_tokens", "embedding")),
    Damage("head of the base", _first(_head_of_base), ("modules_to_save",)),
    Damage("head of zeros", _first(_head_of_zeros), ("modules_to_save",)),
    Damage("head's bias missing", _first(_heads_bias_missing), ("modules_to_save",)),
    Damage("trained biases missing", _first(_trained_biases_missing), ("bias",)),
    Damage("lora_bias missing", _pairs(lambda pair: replace(pair, bias=None)), ("lora_bias",)),
    Damage(
        "DoRA's magnitude ignored",
        _pairs(lambda pair: replace(pair, gain_on_weight=False, gain_on_pair=False)),
        ("dora",),
    ),
    Damage("DoRA's gain not on B", _pairs(lambda pair: replace(pair, gain_on_pair=False)), ("dora",)),
    Damage("replaced tokens missing", _first(lambda trained: replace(trained, tokens={})), ("trainable_tokens",)),
    Damage("embedding's pair missing", _first(lambda trained: replace(trained, pairs={})), ("embedding",)),
    Damage("overflow of x A", _first(_overflowing), dtypes=("float16",)),
    Damage("overflow of a weight's product", _first(_overflowing_weight), dtypes=("float16",)),
)
