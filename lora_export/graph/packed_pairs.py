"""Pairs of modules that share an input, packed: one A side by side, one block-diagonal B, for all of them.

`[x A_1 … x A_n] = x [A_1 … A_n]`, and `[(x A_1) B_1 … (x A_n) B_n] = (x [A_1 … A_n]) diag(B_1 … B_n)`. On a GPU a pair
costs its launches, not its arithmetic. Queries, keys and values together take two products and one sum, where three
pairs take six products and three sums.

1. `sibling_groups` says which modules are packed; `insert_pairs` gives them one pair, whose result is split.
2. Fusion packs the modules' own products as well (`pack.py`), and splits that result, too.
3. `add_before_splitting` turns the sums of the parts into one sum of the wholes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from lora_export.graph.sites import Site, module_of, sites_in
from lora_export.graph.tape import Tape, has_row_axis
from lora_export.site_choice import SiteChoice


def sibling_groups(
    graph: ir.Graph, sites: Mapping[str, Sequence[Site]], choice: SiteChoice
) -> list[dict[str, Sequence[Site]]]:
    """The modules of `sites` in groups, each of which has one pair, with their sites in the order of the graph; a group
    of one module has a pair of its own.

    Modules are packed where they have one parent, read one value `[batch, tokens, in]`, are called once each, and take
    the same parts besides: a gate or none, no gain of DoRA. Where one module of a group is chosen, the others come
    along: their products are packed into one, so a part of its own would cost more. Where chosen modules differ by
    their gate, none comes along, as a module is in one group only.
    """
    together: dict[tuple, dict[str, Sequence[Site]]] = {}
    for module, found in _siblings(graph, sites).items():
        if len(found) == 1 and _has_only_a_pair(module, choice) and has_row_axis(graph, found[0].input):
            key = (found[0].input, found[0].dtype, module.rpartition(".")[0])
            together.setdefault(key, {})[module] = found
    groups = [part for group in together.values() for part in _by_gate(group, sites, choice)]
    group_of = {module: group for group in groups if len(group) > 1 for module in group}
    found = [group_of.get(module, {module: own}) for module, own in sites.items()]
    return list({tuple(group): group for group in found}.values())


def _by_gate(
    group: Mapping[str, Sequence[Site]], chosen: Collection[str], choice: SiteChoice
) -> list[dict[str, Sequence[Site]]]:
    """`group` as it is where its chosen modules all have a gate, or none; else these and those without the others."""
    gated = {module for module in group if module in chosen and module in choice.gate_modules}
    plain = {module for module in group if module in chosen} - gated
    if not gated or not plain:
        return [dict(group)]
    return [{module: group[module] for module in group if module in part} for part in (gated, plain)]


def _siblings(graph: ir.Graph, sites: Mapping[str, Sequence[Site]]) -> dict[str, list[Site]]:
    """The sites of all modules that read what one of `sites` reads, in the order of the graph."""
    read = {site.input for found in sites.values() for site in found}
    nodes = {node for value in read for node, index in value.uses() if index == 0}
    named = dict.fromkeys(module for node in graph.all_nodes() if node in nodes and (module := module_of(node)))
    return {module: found for module, found in sites_in(graph, named).items() if found}


def _has_only_a_pair(module: str, choice: SiteChoice) -> bool:
    return module not in (*choice.gain_modules, *choice.replaced_modules, *choice.bias_modules)


def add_before_splitting(model: ir.Model) -> ir.Model:
    """Turn `Split(x)_i + y_i` of all parts into `Split(x + y)_i`, where `y_i` are the parts of a `Split` into the same
    sizes, or stored numbers for the last axis of each part, which are put side by side (`model` is changed in place and
    returned)."""
    graph = model.graph
    for split in [node for node in graph if node.op_type == "Split"]:
        while (sums := _sums(split)) is not None:
            terms = [_other(node, part) for node, part in zip(sums, split.outputs, strict=True)]
            whole = whole_of(terms) or _side_by_side(graph, split, terms)
            if whole is None:
                break
            _add_first(graph, split, whole, sums=sums)
    return model


def whole_of(parts: Sequence[ir.Value]) -> ir.Value | None:
    """What `parts` are all parts of, in order, along the last axis, if nothing else reads them; else None."""
    node = parts[0].producer()
    if node is None or node.op_type != "Split" or tuple(node.outputs) != tuple(parts):
        return None
    is_last = node.attributes.get_int("axis", 0) in (-1, len(node.inputs[0].shape or ()) - 1)
    return node.inputs[0] if is_last and all(len(tuple(part.uses())) == 1 for part in parts) else None


def _sums(split: ir.Node) -> list[ir.Node] | None:
    """The sums that are all that reads the parts of `split`, in their order; None if there are others."""
    users = [tuple(part.uses()) for part in split.outputs]
    if any(len(uses) != 1 or uses[0].node.op_type != "Add" for uses in users):
        return None
    if any(part.is_graph_output() for part in split.outputs) or split.inputs[0].shape is None:
        return None
    return [uses[0].node for uses in users]


def _other(node: ir.Node, operand: ir.Value) -> ir.Value:
    return node.inputs[1] if node.inputs[0] is operand else node.inputs[0]


def _side_by_side(graph: ir.Graph, split: ir.Node, terms: Sequence[ir.Value]) -> ir.Value | None:
    """Stored `terms`, each `[size]`, as one; ONNX Runtime folds that when it loads the graph."""
    sizes = [part.shape[-1] if part.shape is not None else None for part in split.outputs]
    is_stored = all(term.is_initializer() and not term.is_graph_input() for term in terms)
    if not is_stored or [list(term.shape) for term in terms] != [[size] for size in sizes]:
        return None
    before = Tape(graph, split.inputs[0].producer())
    return before.op("Concat", list(terms), [sum(sizes)], terms[0].dtype, axis=0)


def _add_first(graph: ir.Graph, split: ir.Node, term: ir.Value, *, sums: Sequence[ir.Node]) -> None:
    whole = split.inputs[0]
    total = ir.node("Add", [whole, term], metadata_props=dict(sums[-1].metadata_props))
    total.outputs[0].shape, total.outputs[0].dtype = whole.shape, whole.dtype
    graph.insert_before(split, total)
    split.replace_input_with(0, total.outputs[0])
    for node, part in zip(sums, split.outputs, strict=True):
        part.name, part.shape = node.outputs[0].name, node.outputs[0].shape or part.shape
        node.outputs[0].replace_all_uses_with(part, replace_graph_outputs=True)
        graph.remove(node, safe=True)
