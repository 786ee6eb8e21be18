"""Adapter inputs of convolutions: pairs, and biases.

`y[i] = W * x[i] + B[i]ᵀ (A[i] * x[i]) + b[i]`, `*` the convolution with the base's strides and padding; A's has `rank`
outputs before B maps them to the base's. A is `[rows, in_channels·∏kernel, rank]`: each column a kernel, flattened.

A convolution has the same kernels for the whole batch. So every row is convolved with the kernels of all rows, and then
takes the results of its own. That is `rows·rank` outputs beside the base's `out_channels`: 4 rows of rank 8 are 32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_export.errors import InputRefused
from lora_export.graph.declare import DeclaredInputs
from lora_export.graph.sites import module_of
from lora_export.graph.tape import Tape, put_in_place_of
from lora_export.site_choice import SiteChoice


@dataclass(frozen=True)
class ConvolutionSite:
    """One use of a convolution: `output = weight * input (+ bias)`, weight `[out, in, *kernel]`."""

    module: str
    node: ir.Node
    kernel: tuple[int, ...]
    in_channels: int
    out_channels: int

    @property
    def in_features(self) -> int:
        """Numbers that one output is computed from."""
        return self.in_channels * int(np.prod(self.kernel))


def convolutions_in(graph: ir.Graph, modules: tuple[str, ...]) -> dict[str, list[ConvolutionSite]]:
    """The uses of each of `modules`, in graph order; none for a module that this graph does not call."""
    sites: dict[str, list[ConvolutionSite]] = {module: [] for module in modules}
    for node in graph.all_nodes():
        if node.op_type == "Conv" and node.domain == "" and node.inputs[1].is_initializer():
            module, shape = module_of(node), node.inputs[1].shape
            if module in sites:
                sites[module].append(ConvolutionSite(module, node, tuple(shape[2:]), shape[1], shape[0]))
    return sites


def find_convolutions(graph: ir.Graph, modules: tuple[str, ...]) -> dict[str, list[ConvolutionSite]]:
    """As `convolutions_in`.

    Raises:
        InputRefused: A module is no convolution of this graph, the task's graph never calls it, or its input does not
            start with the batch.
    """
    sites = convolutions_in(graph, modules)
    batches = {value.shape[0] for value in graph.inputs if value.shape}  # of texts and of images
    for module, found in sites.items():
        shapes = [site.node.inputs[0].shape for site in found]
        if not found or any(shape is None or shape[0] not in batches for shape in shapes):
            raise InputRefused(
                "An adapted convolution is not called on the batch in the exported graph",
                where=module,
                expected="an input [batch, channels, …]",
                found=", ".join(map(str, shapes)) or "no call of it",
                next_step="merge the adapter instead",
            )
    return sites


def insert_convolution_pairs(inputs: DeclaredInputs, choice: SiteChoice) -> None:
    """Give `choice.convolution_modules` a pair each.

    Raises:
        InputRefused: See `find_convolutions`.
    """
    for module, sites in find_convolutions(inputs.graph, choice.convolution_modules).items():
        dtype = sites[0].node.inputs[1].dtype
        pair = inputs.declare_pair(module, dtype, sites[0].in_features, out_features=sites[0].out_channels)
        for site in sites:
            add_convolution_pair(inputs.graph, site, pair)


CONVOLUTION_INPUTS = (insert_convolution_pairs,)


def add_convolution_pair(graph: ir.Graph, site: ConvolutionSite, pair: tuple[ir.Value, ir.Value]) -> None:
    """Add `B (A * x)` to the output of `site`; A `[rows, in_features, rank]`, B `[rows, rank, out_channels]`."""
    a, b = pair
    output, users = site.node.outputs[0], tuple(site.node.outputs[0].uses())
    tape, x, dtype = Tape(graph, site.node), site.node.inputs[0], a.dtype
    # One rank of zeros more: a convolution has at least one output, and ONNX Runtime 1.31 does not write the result of
    # a transposed product of rank 0, which then is what the memory held before.
    a = tape.op("Pad", [a, tape.ints([0, 0, 0, 0, 0, 1])], [a.shape[0], site.in_features, None], dtype)
    b = tape.op("Pad", [b, tape.ints([0, 0, 0, 0, 1, 0])], [b.shape[0], None, site.out_channels], dtype)
    kernels = tape.op("Transpose", [a], [a.shape[0], None, site.in_features], dtype, perm=[0, 2, 1])
    shape = [-1, site.in_channels, *site.kernel]
    flat = tape.op("Reshape", [kernels, tape.ints(shape)], [None, *shape[1:]], dtype)
    attributes = {name: attribute.value for name, attribute in site.node.attributes.items()}
    low = _own_results(tape, tape.op("Conv", [x, flat], None, dtype, **attributes), kernels, x=x)
    b_transposed = tape.op("Transpose", [b], [b.shape[0], site.out_channels, None], dtype, perm=[0, 2, 1])
    delta = tape.op("MatMul", [b_transposed, low], [x.shape[0], site.out_channels, None], dtype)
    like = tape.op("Shape", [output], None, ir.DataType.INT64)
    dims = None if output.shape is None else list(output.shape)
    total = tape.op("Add", [output, tape.op("Reshape", [delta, like], dims, dtype)], dims, output.dtype or dtype)
    put_in_place_of(graph, output, total, users=users)


def _own_results(tape: Tape, all_rows: ir.Value, kernels: ir.Value, *, x: ir.Value) -> ir.Value:
    """Of `[batch, rows·rank, *sizes]`, each row's own `[batch, rank, positions]`; `rows` is 1 or the batch."""
    int64, dtype = ir.DataType.INT64, all_rows.dtype
    batch = tape.op("Shape", [x], [1], int64, start=0, end=1)
    rows = tape.op("Shape", [kernels], [1], int64, start=0, end=1)
    rank = tape.op("Shape", [kernels], [1], int64, start=1, end=2)
    shape = tape.op("Concat", [batch, rows, rank, tape.ints([-1])], [4], int64, axis=0)
    by_row = tape.op("Reshape", [all_rows, shape], None, dtype)
    n_rows = tape.op("Squeeze", [batch], [], int64)
    counted = tape.op("Range", [tape.scalar(0), n_rows, tape.scalar(1)], [x.shape[0]], int64)
    last = tape.op("Sub", [rows, tape.ints([1])], [1], int64)
    own = tape.op("Unsqueeze", [tape.op("Min", [counted, last], None, int64), tape.ints([1])], None, int64)
    return tape.op("GatherND", [by_row, own], [x.shape[0], None, None], dtype, batch_dims=1)


def add_convolution_bias(graph: ir.Graph, site: ConvolutionSite, bias: ir.Value) -> None:
    """Let `bias` `[rows, 1, out_channels]` take the place of the module's own, which a convolution adds itself."""
    if len(site.node.inputs) > 2:
        site.node.replace_input_with(2, None)
    output, users = site.node.outputs[0], tuple(site.node.outputs[0].uses())
    tape = Tape(graph, site.node)
    by_channel = tape.op("Transpose", [bias], [bias.shape[0], bias.shape[2], 1], bias.dtype, perm=[0, 2, 1])
    if len(site.kernel) > 1:
        axes = tape.ints(list(range(3, len(site.kernel) + 2)))
        by_channel = tape.op("Unsqueeze", [by_channel, axes], None, bias.dtype)
    dims = None if output.shape is None else list(output.shape)
    put_in_place_of(graph, output, tape.op("Add", [output, by_channel], dims, output.dtype or bias.dtype), users=users)
