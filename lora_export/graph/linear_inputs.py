"""Adapter inputs of linear modules: the gate, pairs, DoRA's gain, and modules replaced as a whole.

`y[i] = (W x[i]) ⊙ g[i] + (x[i] A[i]) B[i] + b[i]`, of which a module has the parts that an adapter needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lora_export.contract import ROWS, AdapterInputKind
from lora_export.graph.bias_inputs import insert_biases
from lora_export.graph.declare import DeclaredInputs
from lora_export.graph.packed_pairs import sibling_groups
from lora_export.graph.shared_by_rows import is_shared_by_rows, let_rows_through, refuse_gate
from lora_export.graph.sites import BIAS_INSIDE, Site, bias_inside, find_sites
from lora_export.graph.tape import Tape, put_in_place_of, reshaped_as, with_row_axis
from lora_export.packed import PackedPart
from lora_export.site_choice import SiteChoice


def insert_gate(inputs: DeclaredInputs, choice: SiteChoice) -> None:
    """Give the graph the gate that `insert_pairs` multiplies the pairs of `choice.gate_modules` by."""
    for module in choice.gate_modules[:1]:
        dtype = find_sites(inputs.graph, [module])[module][0].dtype
        inputs.declare(AdapterInputKind.GATE, "", dtype)


def insert_pairs(inputs: DeclaredInputs, choice: SiteChoice) -> None:
    """Give `choice.lora_modules` a pair each, and those that are chosen for it the gain.

    Raises:
        InputRefused: A module is no linear map of this graph, or its input has an unsupported layout.
    """
    gate, graph = inputs.value(AdapterInputKind.GATE, ""), inputs.graph
    chosen = find_sites(graph, choice.lora_modules)
    alone = [{module: sites} for module, sites in chosen.items()]
    for group in sibling_groups(graph, chosen, choice) if inputs.packs_siblings else alone:
        own_gate = gate if any(module in choice.gate_modules for module in group) else None
        if len(group) > 1:
            sites = [site for found in group.values() for site in found]
            parts = [PackedPart(site.module, site.out_features) for site in sites]
            pair = inputs.declare_packed_pair(parts, sites[0].dtype, sites[0].in_features)
            add_packed_pair(graph, sites, pair, gate=own_gate)
            continue
        (module, sites), *_ = group.items()
        dtype, out = sites[0].dtype, sites[0].out_features
        pair = inputs.declare_pair(module, dtype, sites[0].in_features, out_features=out)
        is_dora = module in choice.gain_modules
        gain = inputs.declare(AdapterInputKind.GAIN, module, dtype, out_features=out) if is_dora else None
        for site in sites:
            add_pair(graph, site, pair, gain=gain, gate=own_gate)


def insert_replacements(inputs: DeclaredInputs, choice: SiteChoice) -> None:
    """Let the weight and bias of `choice.replaced_modules` be inputs.

    Raises:
        InputRefused: As `insert_pairs`.
    """
    for module, sites in find_sites(inputs.graph, choice.replaced_modules).items():
        dtype, bias = sites[0].dtype, None
        weight = inputs.declare(AdapterInputKind.WEIGHT, module, dtype, in_features=sites[0].in_features)
        if has_bias(sites[0]):
            bias = inputs.declare(AdapterInputKind.BIAS, module, dtype)
        for site in sites:
            replace_linear(inputs.graph, site, weight, bias=bias)


# A bias goes in before the pairs, which go in between the product and its bias.
LINEAR_INPUTS = (insert_gate, insert_biases, insert_pairs, insert_replacements)


def add_pair(
    graph: ir.Graph,
    site: Site,
    pair: tuple[ir.Value, ir.Value],
    *,
    gain: ir.Value | None,
    gate: ir.Value | None = None,
) -> None:
    """Add `(x A) B` to the output of `site`, which is multiplied by `gain` first; `gate` multiplies `x A`.

    Args:
        pair: A `[rows, in_features, rank]` and B `[rows, rank, out_features]`.

    Raises:
        InputRefused: The input has an unsupported layout, or a gate over the text's tokens has none to open for.
    """
    if gain is not None:
        _take_bias_out(graph, site)
    output, users = site.output, tuple(site.output.uses())
    dims = site.output_dims
    tape = Tape(graph, site.node)
    is_shared = is_shared_by_rows(graph, site.input)
    if is_shared and gate is not None:
        refuse_gate(site.module)
    x = site.input
    if not is_shared:
        x = with_row_axis(graph, tape, x, features=site.in_features, module=site.module)
    # The broadcast of `rows` against the batch is the batch, which shape inference cannot know.
    rows_and_tokens = [ROWS, x.shape[1]] if is_shared else list(x.shape[:2])
    delta = _product(tape, x, pair, gate=gate, rows_and_tokens=rows_and_tokens)
    base = output
    if gain is not None:
        by_row = [*rows_and_tokens, site.out_features]
        base = output if x is site.input else _reshaped(graph, tape, output, site=site)
        base = tape.op("Mul", [base, gain], by_row, x.dtype)
        total = tape.op("Add", [base, delta], by_row, x.dtype)
        total = total if x is site.input else reshaped_as(tape, total, output, dims=dims)
    else:
        delta = delta if x is site.input else reshaped_as(tape, delta, output, dims=dims)
        total = tape.op("Add", [base, delta], dims, x.dtype)
    put_in_place_of(graph, output, total, users=users)
    if is_shared:
        let_rows_through(graph, total, site.module)


def add_packed_pair(
    graph: ir.Graph, sites: Sequence[Site], pair: tuple[ir.Value, ir.Value], *, gate: ir.Value | None = None
) -> None:
    """Add to the output of each of `sites`, which read one value, its part of `(x A) B`; `gate` multiplies `x A`.

    Args:
        pair: A `[rows, in_features, rank]` and B `[rows, rank, Σ out_features]`.
    """
    tape, x = Tape(graph, sites[0].node), sites[0].input
    delta = _product(tape, x, pair, gate=gate, rows_and_tokens=list(x.shape[:2]))
    parts = tape.split(delta, [site.out_features for site in sites])
    for site, part in zip(sites, parts, strict=True):
        users = tuple(site.output.uses())
        last = tape if site is sites[0] else Tape(graph, site.node)
        total = last.op("Add", [site.output, part], list(part.shape), x.dtype)
        put_in_place_of(graph, site.output, total, users=users)


def _product(
    tape: Tape, x: ir.Value, pair: tuple[ir.Value, ir.Value], *, gate: ir.Value | None, rows_and_tokens: list
) -> ir.Value:
    """`(x A) B`, `[*rows_and_tokens, out]`; `gate` multiplies `x A`."""
    a, b = pair
    low = tape.op("MatMul", [x, a], [*rows_and_tokens, a.shape[2]], a.dtype)
    if gate is not None:
        low = tape.op("Mul", [low, gate], list(low.shape), low.dtype)
    return tape.op("MatMul", [low, b], [*rows_and_tokens, b.shape[2]], x.dtype)


def _take_bias_out(graph: ir.Graph, site: Site) -> None:
    """Turn a `Gemm` with a bias into one without and an `Add`: a gain multiplies the product, not the bias."""
    bias = bias_inside(site.node)
    if bias is None:
        return
    output, users = site.output, tuple(site.output.uses())
    site.node.replace_input_with(BIAS_INSIDE[site.node.op_type], None)
    total = Tape(graph, site.node).op("Add", [output, bias], site.output_dims, output.dtype)
    put_in_place_of(graph, output, total, users=users)


def _reshaped(graph: ir.Graph, tape: Tape, output: ir.Value, *, site: Site) -> ir.Value:
    if output.shape is None:
        output.shape = ir.Shape(site.output_dims)
    return with_row_axis(graph, tape, output, features=site.out_features, module=site.module)


def replace_linear(graph: ir.Graph, site: Site, weight: ir.Value, *, bias: ir.Value | None) -> None:
    """Compute `site` from `weight` `[rows, in, out]` and `bias` `[rows, 1, out]` instead of the base's own."""
    add = _bias_add(site) if bias_inside(site.node) is None else None
    last = add or site.node
    replaced, users = last.outputs[0], tuple(last.outputs[0].uses())
    tape = Tape(graph, last)
    x = with_row_axis(graph, tape, site.input, features=site.in_features, module=site.module)
    out = weight.shape[2]
    y = tape.op("MatMul", [x, weight], [*list(x.shape[:2]), out], x.dtype)
    if bias is not None:
        y = tape.op("Add", [y, bias], [*list(x.shape[:2]), out], x.dtype)
    if x is not site.input:
        leading = tape.op("Shape", [site.input], None, ir.DataType.INT64, start=0, end=-1)
        shape = tape.op("Concat", [leading, tape.ints([-1])], None, ir.DataType.INT64, axis=0)
        y = tape.op("Reshape", [y, shape], [*list(site.input.shape)[:-1], out], x.dtype)
    put_in_place_of(graph, replaced, y, users=users)
    _forget_last_axis_downstream(y, site.out_features, out)


def _bias_add(site: Site) -> ir.Node | None:
    for node, _ in site.output.uses():
        if node.op_type == "Add" and any(v.is_initializer() and v.name == f"{site.module}.bias" for v in node.inputs):
            return node
    return None


def has_bias(site: Site) -> bool:
    """Whether the linear map of `site` has a bias of its own."""
    return bias_inside(site.node) is not None or _bias_add(site) is not None


def _forget_last_axis_downstream(value: ir.Value, static: int, symbol: object) -> None:
    """Let what is computed from a replaced head have its variable size instead of the base's."""
    pending, seen = [value], set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.shape is not None and len(current.shape) and current.shape[-1] == static:
            current.shape = ir.Shape([*list(current.shape)[:-1], symbol])
        for user, _ in current.uses():
            pending.extend(user.outputs)
