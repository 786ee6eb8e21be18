"""What a model is traced with: sample inputs, which of their axes vary, and the names that inputs and axes get."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sample:
    """One call to trace.

    Attributes:
        inputs: Keyword arguments of `forward`.
        dynamic_shapes: Their dynamic shapes, as `torch.export` takes them.
        renamed: Graph inputs and outputs, by the names that the exporter gives them → the names they get.
        axes: Names of the axes of each input, by its final name; empty for those of an encoder or a decoder alone.
        forward: What to trace instead of the model's own `forward`; None for that.
        n_cached_layers: How many layers of a decoder alone have a cache, whose inputs and outputs the exporter names.
    """

    inputs: dict
    dynamic_shapes: dict
    renamed: Mapping[str, str]
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    forward: Callable | None = None
    n_cached_layers: int = 0
