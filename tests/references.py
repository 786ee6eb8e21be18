"""What the package is compared with: PEFT itself, unmerged, and inputs made here. Shares no code with the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import PeftModel
from tiny import VOCABULARY


def unmerged(
    base: Path, model_class: str, adapters: Sequence[Path] = (), n_labels: int | None = None, dtype=torch.float32
) -> torch.nn.Module:
    """The Transformers model in eval mode with `adapters` active together, nothing merged."""
    sizes: Mapping = {} if n_labels is None else {"num_labels": n_labels, "ignore_mismatched_sizes": True}
    model = getattr(transformers, model_class).from_pretrained(base, dtype=dtype, **sizes)
    for index, folder in enumerate(adapters):
        if index == 0:
            model = PeftModel.from_pretrained(model, folder, adapter_name="0")
        else:
            model.load_adapter(folder, adapter_name=str(index))
    if len(adapters) > 1:
        model.base_model.set_adapter([str(index) for index in range(len(adapters))])
    return model.eval()


def outputs_of(model: torch.nn.Module, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """`logits`, or `last_hidden_state`, float64."""
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        found = model(**tensors)
    return (found["logits"] if "logits" in found else found["last_hidden_state"]).double().numpy()


def text(rows: int, length: int, seed: int = 0, *, token_types: bool, ragged: bool = True) -> dict[str, np.ndarray]:
    """Random tokens, rows of different lengths padded on the right."""
    rng = np.random.default_rng(seed)
    lengths = [length - (row % 3) if ragged else length for row in range(rows)]
    mask = np.array([[1] * n + [0] * (length - n) for n in lengths], np.int64)
    ids = rng.integers(4, VOCABULARY, (rows, length)) * mask
    found = {"input_ids": ids, "attention_mask": mask}
    if token_types:
        found["token_type_ids"] = rng.integers(0, 2, (rows, length)) * mask
    return found


def pixels(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"pixel_values": np.random.default_rng(seed).standard_normal((rows, 3, 16, 16)).astype(np.float32)}


def inputs_for(base: str, rows: int = 5, length: int = 9, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs that both the reference and the exported encoder or image model of `base` take; see `decoder_feeds`."""
    if base == "vit":
        return pixels(rows, seed)
    return text(rows, length, seed, token_types=base in ("bert", "classifier", "tagger", "albert"))


def decoder_feeds(inputs: Mapping[str, np.ndarray], contract) -> dict[str, np.ndarray]:
    """`inputs` with positions counted over real tokens and a cache of length 0, as the contract names them."""
    feeds = dict(inputs)
    for spec in contract.inputs:
        if spec.name == "position_ids":
            feeds["position_ids"] = np.maximum(inputs["attention_mask"].cumsum(axis=1) - 1, 0)
        elif spec.name.startswith("past_key_values"):
            feeds[spec.name] = np.zeros((len(inputs["input_ids"]), spec.dims[1], 0, spec.dims[3]), np.dtype(spec.dtype))
    return feeds


def real(values: np.ndarray, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """`values` without padded positions; a reference says nothing there."""
    mask = inputs.get("attention_mask")
    if mask is None or values.ndim < 3:
        return values
    return values[mask.astype(bool)]


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over max(1, largest expected value)."""
    assert found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}"
    scale = max(1.0, np.abs(expected).max())
    return float(np.abs(found.astype(np.float64) - expected).max() / scale)


def rms_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square difference: of two roundings, where the largest of many is a matter of luck."""
    return float(np.sqrt(np.mean(np.square(found.astype(np.float64) - expected.astype(np.float64)))))
