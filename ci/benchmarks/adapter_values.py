"""A saved adapter as NumPy values, and what an export must hold of it: the formulas of LoRA once more, in NumPy.

Shares no code with the package, so that a wrong export made from these values is wrong in one known way only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

Arrays = Mapping[str, np.ndarray]
_PREFIX = "base_model.model."
_TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class Pair:
    """The pair of one module: `ΔW = scale·B·A`, DoRA's gain on either part of `W0 + ΔW`.

    Attributes:
        a: `[rank, in]`.
        b: `[out, rank]`.
        transposed: The base stores its weight `[in, out]`: Conv1D, embeddings.
        magnitude: DoRA's, `[out]`.
        bias: lora_bias's, `[out]`.
        gain_on_weight, gain_on_pair: Whether DoRA's gain multiplies `W0`, and `ΔW`; both where it is right.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    transposed: bool
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None
    gain_on_weight: bool = True
    gain_on_pair: bool = True

    @property
    def rank(self) -> int:
        return len(self.a)

    def gains(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """DoRA's `m / ‖W0 + ΔW‖` on `W0` and on `ΔW`, `[out, 1]` each; ones where it is left out."""
        ones = np.ones((len(self.b), 1), np.float32)
        if self.magnitude is None:
            return ones, ones
        total = (weight.T if self.transposed else weight) + self.scale * self.b @ self.a
        gain = self.magnitude[:, None] / np.linalg.norm(total, axis=1, keepdims=True)
        return gain if self.gain_on_weight else ones, gain if self.gain_on_pair else ones

    def merged(self, weight: np.ndarray) -> np.ndarray:
        """`g ⊙ W0 + g ⊙ ΔW` in the layout of `weight`."""
        on_weight, on_pair = self.gains(weight)
        total = on_weight * (weight.T if self.transposed else weight) + on_pair * (self.scale * self.b @ self.a)
        return total.T if self.transposed else total


@dataclass(frozen=True)
class Trained:
    """An adapter on its base.

    Attributes:
        base: The base's parameters by path.
        pairs: By module path.
        whole: Heads, biases and whatever else is saved whole, by parameter path.
        tokens: Replaced rows of an embedding: ids `[n]` and rows `[n, dim]`, by the embedding's module path.
        rank, alpha: Those of the config, which a pattern overrules for single modules.
    """

    base: Arrays
    pairs: Mapping[str, Pair]
    whole: Arrays
    tokens: Mapping[str, tuple[np.ndarray, np.ndarray]]
    rank: int
    alpha: float

    def parameters(self) -> dict[str, np.ndarray]:
        """What a merge must store, by parameter path: all that the adapter changes, in float32."""
        found = dict(self.whole)
        for module, pair in self.pairs.items():
            found[f"{module}.weight"] = pair.merged(self.base[f"{module}.weight"])
            if pair.bias is not None:
                found[f"{module}.bias"] = self.bias_with(module, pair)
        for module, (ids, rows) in self.tokens.items():
            changed = found.get(f"{module}.weight", self.base[f"{module}.weight"]).copy()
            changed[ids] = rows
            found[f"{module}.weight"] = changed
        return found

    def bias_with(self, module: str, pair: Pair) -> np.ndarray:
        """The module's bias with what lora_bias adds."""
        start = self.whole.get(f"{module}.bias", self.base.get(f"{module}.bias"))
        return pair.scale * pair.bias + (0 if start is None else start)

    def inputs(self) -> dict[str, np.ndarray]:
        """What a dynamic graph must be fed, by input name, with the leading axis of rows."""
        found = {}
        for path, value in self.whole.items():
            found[path] = (value.T if value.ndim == 2 else value[None])[None]
        for module, pair in self.pairs.items():
            on_weight, on_pair = pair.gains(self.base[f"{module}.weight"])
            found[f"{module}.lora_A.weight"] = pair.a.T[None]
            found[f"{module}.lora_B.weight"] = (on_pair * pair.scale * pair.b).T[None]
            if pair.magnitude is not None:
                found[f"{module}.lora_magnitude"] = on_weight.T[None]
            if pair.bias is not None:
                found[f"{module}.bias"] = self.bias_with(module, pair)[None, None]
        for module, (ids, rows) in self.tokens.items():
            found[f"{module}.token_ids"] = ids[None]
            found[f"{module}.token_delta"] = (rows - self.base[f"{module}.weight"][ids])[None]
        return found


def read_trained(folder: Path, base: Arrays, *, conv1d: bool) -> Trained:
    """The adapter that PEFT saved in `folder`.

    Args:
        conv1d: The base's linear maps are Conv1D, which stores `[in, out]`.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    stored = {
        key.removeprefix(_PREFIX).replace(".base_layer.", "."): value.astype(np.float32)
        for key, value in load_file(folder / "adapter_model.safetensors").items()
    }
    pairs = {
        module: _pair(stored, module, config, conv1d)
        for module in {re.sub(r"\.lora_.*", "", key) for key in stored if ".lora_" in key}
    }
    tokens = {
        key.removesuffix(_TOKENS): (_token_ids(config), value) for key, value in stored.items() if key.endswith(_TOKENS)
    }
    whole = {
        key: value
        for key, value in stored.items()
        if ".lora_" not in key and not key.endswith(_TOKENS) and key.removesuffix(".weight") not in pairs
    }
    return Trained(base, dict(sorted(pairs.items())), whole, tokens, config["r"], config["lora_alpha"])


def _token_ids(config: dict) -> np.ndarray:
    given = config["trainable_token_indices"]
    (ids,) = given.values() if isinstance(given, dict) else (given,)
    return np.array(ids, np.int64)


def _pair(stored: Arrays, module: str, config: dict, conv1d: bool) -> Pair:
    is_embedding = f"{module}.lora_embedding_A" in stored
    a = stored[f"{module}.lora_embedding_A" if is_embedding else f"{module}.lora_A.weight"]
    b = stored[f"{module}.lora_embedding_B" if is_embedding else f"{module}.lora_B.weight"]
    return Pair(
        a,
        b,
        _scale(config, module, len(a)),
        transposed=conv1d or is_embedding,
        magnitude=stored.get(f"{module}.lora_magnitude_vector"),
        bias=stored.get(f"{module}.lora_B.bias"),
    )


def _scale(config: dict, module: str, rank: int) -> float:
    """`α/r`, or `α/√r` of rsLoRA, with the α that a pattern gives to the module."""
    patterns = config["alpha_pattern"].items()
    alpha = next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", module)), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
