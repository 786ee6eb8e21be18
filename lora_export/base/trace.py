"""Trace a weightless base into an `ir.Model`: the only place that calls `torch.onnx`.

The traced graph's initializers carry the model's parameter paths as names, its nodes carry the module they came from
(`pkg.torch.onnx.name_scopes`), and its inputs and outputs carry the names that Optimum and ONNX Runtime GenAI use.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.metadata import version

import onnx_ir as ir
import torch

from lora_export.base.computed import tables_of_fixed_size
from lora_export.base.decoder import decoder_sample
from lora_export.base.decompose import decomposed_by_operator
from lora_export.base.encoders import encoder_sample
from lora_export.base.forward import is_dual_encoder
from lora_export.base.recipe import RECIPE, Recipe
from lora_export.base.sample import Sample
from lora_export.base.seq2seq import seq2seq_sample
from lora_export.base.sparing import sparing
from lora_export.base.tasks import SEQ2SEQ, Task
from lora_export.compat import borrow
from lora_export.contract import PAST, PRESENT, SINGLE
from lora_export.errors import EnvironmentUnusable, some_of
from lora_export.quiet import quiet

# The first with an `Attention` operator.
_ATTENTION_OPSET = 23
# A switch of Transformers: keys and values of grouped heads are not written out for every query head.
_GROUPED_HEADS = "TRANSFORMERS_SDPA_FORCE_GQA"
# What a dual encoder gives besides the hidden states of its two halves.
_DUAL_OUTPUTS = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")
# Names of sums of axes, whichever way round the trace adds them up; Optimum spells out the second.
_SUMS = {
    frozenset({"past_sequence_length", "sequence_length"}): "total_sequence_length",
    frozenset(
        {"past_decoder_sequence_length", "decoder_sequence_length"}
    ): "past_decoder_sequence_length + decoder_sequence_length",
}


def trace(
    task: Task,
    model: torch.nn.Module,
    graph: str = SINGLE,
    *,
    named: Collection[str] | None = None,
    image_size: tuple[int, int] | None = None,
    attention_operator: bool = True,
) -> ir.Model:
    """The unoptimized graph of a weightless `model`; parameters become initializers without a value, with a recipe.

    Args:
        model: From `build_weightless`. Left as it was.
        graph: Which of the task's graphs (`graphs_of`).
        named: The inputs that the base's tokenizer names (`Checkpoint.tokenizer_inputs`); None for the usual ones.
        image_size: What its image processor makes (`Checkpoint.image_size`).
        attention_operator: Whether attention becomes the standard `Attention`, with grouped heads, or its parts.

    Returns:
        A graph whose symbolic axes are named `batch_size`, `sequence_length`, `past_sequence_length`,
        `total_sequence_length`, or as `seq2seq` names them. Parameters and persistent buffers have `const_value`
        None; everything else (constants, non-persistent buffers) keeps its value.
    """
    exporter_class = borrow("OnnxExporter")
    config_class = borrow("OnnxConfig")
    sample = _sample(task, model, graph, named=named, image_size=image_size)
    opset = _ATTENTION_OPSET if attention_operator else config_class().opset_version
    config = config_class(dynamic=True, dynamic_shapes=sample.dynamic_shapes, optimize=False, opset_version=opset)
    forward = _forward(model, sample.forward)
    with (
        quiet(),
        sparing(),
        decomposed_by_operator(),
        tables_of_fixed_size(model),
        forward,
        _grouped_heads(wanted=attention_operator),
        _one_head_as_group(),
    ):
        program = exporter_class().export(model, sample.inputs, config).program
    if is_dual_encoder(model):
        _keep_outputs(program, _DUAL_OUTPUTS)
    _unbind_parameters(program.graph, model)
    _rename_inputs_and_outputs(program.graph, sample.renamed)
    if sample.n_cached_layers:
        _name_cache(program.graph, sample.n_cached_layers)
    _name_axes(program.graph, sample)
    return program


def sliding_windows(config) -> tuple[int, ...]:
    """The sizes of sliding windows that a config (a `PretrainedConfig`) names, its text part's too."""
    parts = (config, getattr(config, "text_config", None))
    found = {getattr(part, name, None) for part in parts for name in ("sliding_window", "window_size")}
    return tuple(sorted(size for size in found if isinstance(size, int) and size > 0))


def longest_texts(config) -> tuple[int, ...]:
    """The most tokens of a text, by a config (a `PretrainedConfig`), or its text part: with the factor of a linear
    scale, which some configs have not counted, and as it stands; nothing if it does not say."""
    text = config.get_text_config()
    found, rotary = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) or {}
    if not isinstance(found, int) or found <= 0:
        return ()
    by_layer = [each for each in rotary.values() if isinstance(each, dict)] or [rotary]
    factors = [each.get("factor") or 1.0 for each in by_layer if each.get("rope_type") == "linear"]
    return tuple(sorted({int(found * max([1.0, *factors])), found}, reverse=True))


def _sample(
    task: Task,
    model: torch.nn.Module,
    graph: str,
    *,
    named: Collection[str] | None,
    image_size: tuple[int, int] | None,
) -> Sample:
    if task in SEQ2SEQ:
        return seq2seq_sample(model, graph)
    if task is Task.TEXT_GENERATION:
        return decoder_sample(model)
    return encoder_sample(task, model, named=named, image_size=image_size)


@contextlib.contextmanager
def _forward(model: torch.nn.Module, forward: Callable | None) -> Iterator[None]:
    """Let `model` do `forward` when it is called; None for its own."""
    if forward is None:
        yield
        return
    model.forward = forward
    try:
        yield
    finally:
        del model.forward


@contextlib.contextmanager
def _grouped_heads(*, wanted: bool) -> Iterator[None]:
    before = os.environ.get(_GROUPED_HEADS)
    os.environ[_GROUPED_HEADS] = "1" if wanted else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_GROUPED_HEADS]
        else:
            os.environ[_GROUPED_HEADS] = before


@contextlib.contextmanager
def _one_head_as_group() -> Iterator[None]:
    """A single head of keys and values that is broadcast to every head of queries (Falcon) is a group of all of them:
    the operator knows groups, and no broadcast."""
    original = torch.nn.functional.scaled_dot_product_attention

    def attention(query: torch.Tensor, key: torch.Tensor, *others: object, **options: object) -> torch.Tensor:
        if query.dim() == 4 and key.shape[1] == 1 and query.shape[1] != 1:
            options["enable_gqa"] = True
        return original(query, key, *others, **options)

    torch.nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = original


def _unbind_parameters(graph: ir.Graph, model: torch.nn.Module) -> None:
    parameters = model.state_dict(keep_vars=True).keys()
    for name, value in graph.initializers.items():
        if name in parameters:
            value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
            value.const_value = None
            value.metadata_props[RECIPE] = Recipe((name,)).to_json()


def _keep_outputs(program: ir.Model, names: Sequence[str]) -> None:
    by_name = {value.name: value for value in program.graph.outputs}
    program.graph.outputs[:] = [by_name[name] for name in names]


def _rename_inputs_and_outputs(graph: ir.Graph, renamed: Mapping[str, str]) -> None:
    for value in (*graph.inputs, *graph.outputs):
        value.name = renamed.get(value.name, value.name)


# How the exporter names a layer's keys and values; what stands before differs by release.
_TRACED_CACHE = re.compile(r"(?:^|\.)layers\.(\d+)\.(key|value)s$")


def _name_cache(graph: ir.Graph, n_layers: int) -> None:
    """Name a decoder's caches `past_key_values.{i}.key|value` and `present.{i}.key|value`.

    Raises:
        EnvironmentUnusable: This Transformers names what it traces in a way that is not known here.
    """
    for values, prefix in ((graph.inputs, PAST), (graph.outputs, PRESENT)):
        for value in values:
            if found := _TRACED_CACHE.search(value.name):
                value.name = f"{prefix}{found[1]}.{found[2]}"
        expected = {f"{prefix}{layer}.{part}" for layer in range(n_layers) for part in ("key", "value")}
        names = {value.name for value in values}
        if not expected <= names:
            raise EnvironmentUnusable(
                "This release of Transformers names a traced decoder's cache in a way that is not known here",
                where=f"transformers {version('transformers')}",
                expected=some_of(sorted(expected - names), 2),
                found=some_of(sorted(names), 6),
                next_step="install a release that was tested: see `dependencies` in pyproject.toml",
            )


def _axes_of(graph: ir.Graph) -> dict[str, dict[int, str]]:
    """The names of the axes of each input of an encoder or a decoder alone."""
    decoder = any(value.name.startswith(PAST) for value in graph.inputs)
    dual = {"input_ids", "pixel_values"} <= {value.name for value in graph.inputs}
    found = {}
    for value in graph.inputs:
        if value.name.startswith(PAST):
            found[value.name] = {0: "batch_size", 2: "past_sequence_length"}
        elif value.name == "attention_mask" and decoder:
            found[value.name] = {0: "batch_size", 1: "total_sequence_length"}
        elif value.name == "pixel_values":
            found[value.name] = {0: "batch_size"}
        else:
            found[value.name] = {0: "batch_size", 1: "sequence_length"}
        if dual:
            found[value.name][0] = "image_batch_size" if value.name == "pixel_values" else "text_batch_size"
    return found


def _name_axes(graph: ir.Graph, sample: Sample) -> None:
    """Give the trace's symbols (`s44`) the names of the axes they stand for, everywhere in the graph."""
    axes = sample.axes or _axes_of(graph)
    names: dict[str, str] = {}
    # input_ids first: where the trace unified two axes, the first name given stays.
    for value in sorted(graph.inputs, key=lambda value: value.name != "input_ids"):
        for axis, label in axes[value.name].items():
            dim = value.shape[axis]
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                names.setdefault(str(dim.value), label)
    for value in _values(graph):
        if value.shape is None or value.shape.frozen:
            continue
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                named = re.sub(r"\b\w+\b", lambda m: names.get(m[0], m[0]), str(dim.value))
                value.shape[axis] = _SUMS.get(frozenset(named.split(" + ")), named)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs
