"""Adapter files that do not fit, each made of one that does: what every host must refuse by the file and the tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from lora_export.adapters.pack import write_onnx_adapter
from lora_export.runtime.adapter_file import read_adapter

Tensors = Mapping[str, np.ndarray]


def first(tensors: Tensors, part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def of_another_graph(tensors: Tensors) -> Tensors:
    a = first(tensors, "lora_A")
    return {"elsewhere.lora_A.weight" if name == a else name: array for name, array in tensors.items()}


def without_a_tensor(tensors: Tensors) -> Tensors:
    return {name: array for name, array in tensors.items() if name != first(tensors, "lora_B")}


def of_another_dtype(tensors: Tensors) -> Tensors:
    a = first(tensors, "lora_A")
    return {name: array.astype(np.float16) if name == a else array for name, array in tensors.items()}


def of_another_size(tensors: Tensors) -> Tensors:
    a = first(tensors, "lora_A")
    return {name: array[:, 1:] if name == a else array for name, array in tensors.items()}


# How it is damaged → the start of the refusal, and a part of the tensor's name in it.
FAULTS: dict[Callable[[Tensors], Tensors], tuple[str, str]] = {
    of_another_graph: ("The adapter was made for another graph", "elsewhere.lora_A.weight"),
    without_a_tensor: ("The adapter lacks a tensor", "lora_B"),
    of_another_dtype: ("The adapter was made for another graph", "lora_A"),
    of_another_size: ("The adapter was made for another graph", "lora_A"),
}


def damage(file: Path, fault: Callable[[Tensors], Tensors]) -> None:
    """Write `file` anew with what `fault` makes of its tensors."""
    tensors = fault(read_adapter(file))
    write_onnx_adapter(file, {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()})
