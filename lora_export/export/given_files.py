"""A graph that another tool made, as files: found, its weights beside it, and what ONNX Runtime GenAI is told of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from lora_export.artifact import sha256_of
from lora_export.base.tasks import Task, graphs_of
from lora_export.contract import SINGLE, graph_file
from lora_export.errors import InputRefused, UsageProblem
from lora_export.graph.given import external_files, float_dtype, open_given
from lora_export.named import expanded
from lora_export.other_tools import GENAI_CONFIG, find_graph, json_beside


@dataclass(frozen=True)
class GivenGraph:
    """A graph that another tool made, located.

    Attributes:
        path: The ONNX file.
        files: It and those that hold its weights.
        dtype: Of its floats.
        settings: ONNX Runtime GenAI's, where they lie beside it; else empty.
        opened: The graph as it was read, until it is taken.
    """

    path: Path
    files: tuple[Path, ...]
    dtype: str
    settings: Mapping
    opened: list = field(default_factory=list, repr=False, compare=False)

    @property
    def n_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def take_model(self) -> ir.Model:
        """The graph, for one who changes it; it is read again for the next."""
        return self.opened.pop() if self.opened else open_given(self.path)

    def hashes(self) -> dict[str, str]:
        """sha256 of its files, by path from its folder."""
        return {file.relative_to(self.path.parent).as_posix(): sha256_of(file) for file in self.files}


def locate_graph(given: str, task: Task, *, dtype: str | None, is_quantized: bool) -> GivenGraph:
    """The graph at `given`, a folder or an ONNX file, for a model of `task`; headers only.

    Args:
        dtype: What was asked for; None for the graph's own.
        is_quantized: Whether `--quantize` was asked for.

    Raises:
        InputRefused: There is no such graph or more than one, its weights are not there, or the task has several.
        UsageProblem: `dtype` is another than the graph's, or it is to be quantized.
    """
    if len(graphs_of(task)) > 1:
        raise InputRefused(
            "A given graph can be one of a task of one graph only",
            where="--graph",
            found=f"{task}, which has {', '.join(graphs_of(task))}",
            next_step="leave --graph out",
        )
    path = find_graph(expanded(given))
    path = path.parent.resolve() / path.name  # a link in a hub's cache has its weights beside the link
    model = open_given(path)
    files, settings = (path, *external_files(model, path)), json_beside(path, GENAI_CONFIG)
    found = GivenGraph(path, files, float_dtype(model), settings, [model])
    if is_quantized:
        raise UsageProblem(
            "--quantize is for graphs that this tool makes",
            next_step="leave it out and give the graph that the other tool quantized, or leave --graph out",
        )
    if dtype not in (None, found.dtype):
        raise UsageProblem(
            "--dtype is another than the given graph's", expected=found.dtype, found=dtype, next_step="leave it out"
        )
    return found


def copy_settings(given: GivenGraph, folder: Path) -> dict[str, str]:
    """Write the graph's own settings into `folder`, for the name that its file has there; sha256 by name."""
    model, path = dict(given.settings.get("model", {})), folder / GENAI_CONFIG
    decoder = dict(model.get("decoder", {}))
    if decoder.get("filename") == graph_file(SINGLE):
        shutil.copyfile(given.path.parent / GENAI_CONFIG, path)
    else:
        model["decoder"] = decoder | {"filename": graph_file(SINGLE)}
        path.write_text(json.dumps(dict(given.settings) | {"model": model}, indent=2) + "\n", encoding="utf-8")
    return {GENAI_CONFIG: sha256_of(path)}
