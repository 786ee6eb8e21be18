"""Biases as adapter inputs, of linear modules, normalizations and convolutions: `y[i] = W x[i] + b[i]`."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lora_export.contract import AdapterInputKind
from lora_export.errors import InputRefused
from lora_export.graph.convolution_inputs import (
    ConvolutionSite,
    add_convolution_bias,
    convolutions_in,
    find_convolutions,
)
from lora_export.graph.declare import DeclaredInputs
from lora_export.graph.shared_by_rows import is_shared_by_rows, let_rows_through
from lora_export.graph.sites import Site, find_sites, sites_in
from lora_export.graph.tape import Tape, put_in_place_of, reshaped_as, with_row_axis
from lora_export.site_choice import SiteChoice


def insert_biases(inputs: DeclaredInputs, choice: SiteChoice) -> None:
    """Give `choice.bias_modules` a bias input each.

    Raises:
        InputRefused: See `add_bias_input`, `find_convolutions` and `find_sites`.
    """
    linear = sites_in(inputs.graph, choice.lora_modules)
    convolutions = convolutions_in(inputs.graph, choice.bias_modules)
    for module in choice.bias_modules:
        if convolutions[module]:
            _insert_into_convolutions(inputs, module, find_convolutions(inputs.graph, (module,))[module])
        else:
            _insert(inputs, module, linear.get(module, []))


def _insert_into_convolutions(inputs: DeclaredInputs, module: str, sites: Sequence[ConvolutionSite]) -> None:
    own, _ = uses_of_bias(inputs.graph, module)
    dtype, out = sites[0].node.inputs[1].dtype, sites[0].out_channels
    bias = inputs.declare(AdapterInputKind.BIAS, module, dtype, out_features=out, base_has_default=own is not None)
    for site in sites:
        add_convolution_bias(inputs.graph, site, bias)


def _insert(inputs: DeclaredInputs, module: str, sites: Sequence[Site]) -> None:
    own, _ = uses_of_bias(inputs.graph, module)
    if own is None and not sites:
        sites = find_sites(inputs.graph, [module])[module]
    like, out = (own, own.shape[0]) if own is not None else (sites[0].weight, sites[0].out_features)
    bias = inputs.declare(AdapterInputKind.BIAS, module, like.dtype, out_features=out, base_has_default=own is not None)
    add_bias_input(inputs.graph, module, bias, sites=sites)


def uses_of_bias(graph: ir.Graph, module: str) -> tuple[ir.Value | None, list[ir.Node]]:
    """The bias of `module` and the nodes that add it, several where layers share weights; None without a bias."""
    value = graph.initializers.get(f"{module}.bias")
    return value, [] if value is None else [node for node, _ in value.uses()]


def add_bias_input(graph: ir.Graph, module: str, bias: ir.Value, *, sites: Sequence[Site]) -> None:
    """Let `bias` `[rows, 1, out]` take the place of the module's own bias; with none, it is added to the output.

    1. `Add(y, bias)` reads the input instead.
    2. A bias inside `Gemm` or `LayerNormalization` is taken out and added after it.

    Args:
        sites: Where the module is computed, for one without a bias.

    Raises:
        InputRefused: The bias is inside another operator.
    """
    own, users = uses_of_bias(graph, module)
    for node in users:
        if node.op_type == "Add":
            output = next(value for value in node.inputs if value is not own)
            if output.shape is None and node.outputs[0].shape is not None:
                output.shape = ir.Shape(list(node.outputs[0].shape))  # adding a bias keeps it
            _add_bias(graph, module, bias, after=node, output=output, replaced=node.outputs[0])
        elif node.op_type in ("Gemm", "LayerNormalization"):
            node.replace_input_with(list(node.inputs).index(own), None)
            _add_bias(graph, module, bias, after=node, output=node.outputs[0], replaced=node.outputs[0])
        else:
            raise InputRefused(
                "A module's bias is part of an operator that takes one for the whole batch only",
                where=f"{module}.bias ({node.op_type})",
                next_step="merge the adapter instead",
            )
    for site in () if users else sites:
        if site.output.shape is None:
            site.output.shape = ir.Shape(site.output_dims)
        _add_bias(graph, module, bias, after=site.node, output=site.output, replaced=site.output)


def _add_bias(
    graph: ir.Graph, module: str, bias: ir.Value, *, after: ir.Node, output: ir.Value, replaced: ir.Value
) -> None:
    """Add `bias` to `output`, the result of or an input of `after`, in place of `replaced`."""
    users = tuple(replaced.uses())
    tape = Tape(graph, after)
    is_shared = is_shared_by_rows(graph, output)
    y = output if is_shared else with_row_axis(graph, tape, output, features=bias.shape[2], module=module)
    total = tape.op("Add", [y, bias], list(y.shape), y.dtype or bias.dtype)
    if y is not output:
        total = reshaped_as(tape, total, output, dims=None if output.shape is None else list(output.shape))
    put_in_place_of(graph, replaced, total, users=users)
    if is_shared:
        let_rows_through(graph, total, module)
