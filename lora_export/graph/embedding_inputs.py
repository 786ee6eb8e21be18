"""Adapter inputs of embeddings: pairs, and rows of some tokens changed.

With `t` the token ids of a row of the batch:

1. A pair: `e[i] = W[t] + A[i][t] B[i]`, A `[rows, vocabulary, rank]`, B `[rows, rank, dim]`. The rows' tables lie one
   behind the other, so that one Gather finds `A[i][t]` at `t + i·vocabulary`.
2. Changed tokens: `e[i] = W[t] + Σ_j [t = ids[i, j]] · delta[i, j]`, ids `[rows, n]`, delta `[rows, n, dim]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from lora_export.contract import AdapterInputKind
from lora_export.errors import InputRefused
from lora_export.graph.declare import DeclaredInputs
from lora_export.graph.sites import module_of
from lora_export.graph.tape import Tape, put_in_place_of
from lora_export.site_choice import SiteChoice


@dataclass(frozen=True)
class EmbeddingSite:
    """One lookup of an embedding: `output = weight[ids]`."""

    module: str
    node: ir.Node
    vocabulary: int
    dim: int

    @property
    def ids(self) -> ir.Value:
        return self.node.inputs[1]


def find_embeddings(graph: ir.Graph, modules: tuple[str, ...]) -> dict[str, list[EmbeddingSite]]:
    """The lookups of each of `modules`, in graph order.

    Raises:
        InputRefused: A module is no embedding of this graph, or the task's graph never calls it.
    """
    sites = embeddings_in(graph, modules)
    missing = [module for module, found in sites.items() if not found]
    if missing:
        raise InputRefused(
            "Adapted embeddings are not looked up in the exported graph",
            where=", ".join(missing),
            next_step="merge the adapter instead, or export the task that the adapter was trained for (--task)",
        )
    return sites


def embeddings_in(graph: ir.Graph, modules: tuple[str, ...]) -> dict[str, list[EmbeddingSite]]:
    """As `find_embeddings`, with none for a module that this graph does not call."""
    sites: dict[str, list[EmbeddingSite]] = {module: [] for module in modules}
    for node in graph.all_nodes():
        if node.op_type == "Gather" and node.inputs[0].is_initializer() and node.inputs[0].const_value is None:
            module, shape = module_of(node), node.inputs[0].shape
            if module in sites and len(shape) == 2:
                sites[module].append(EmbeddingSite(module, node, shape[0], shape[1]))
    return sites


def insert_embedding_pairs(inputs: DeclaredInputs, choice: SiteChoice) -> None:
    """Case 1, for `choice.embedding_modules`.

    Raises:
        InputRefused: See `find_embeddings`.
    """
    for module, sites in find_embeddings(inputs.graph, choice.embedding_modules).items():
        dtype = sites[0].node.inputs[0].dtype
        pair = inputs.declare_pair(module, dtype, sites[0].vocabulary, out_features=sites[0].dim)
        for site in sites:
            add_embedding_pair(inputs.graph, site, pair)


def insert_tokens(inputs: DeclaredInputs, choice: SiteChoice) -> None:
    """Case 2, for `choice.token_modules`.

    Raises:
        InputRefused: See `find_embeddings`.
    """
    for module, sites in find_embeddings(inputs.graph, choice.token_modules).items():
        dtype = sites[0].node.inputs[0].dtype
        ids = inputs.declare(AdapterInputKind.TOKEN_IDS, module, dtype)
        delta = inputs.declare(AdapterInputKind.TOKEN_DELTA, module, dtype, embedding_dim=sites[0].dim)
        for site in sites:
            add_token_inputs(inputs.graph, site, ids, delta=delta)


EMBEDDING_INPUTS = (insert_embedding_pairs, insert_tokens)


def add_embedding_pair(graph: ir.Graph, site: EmbeddingSite, pair: tuple[ir.Value, ir.Value]) -> None:
    """Case 1."""
    a, b = pair
    output, users = site.node.outputs[0], tuple(site.node.outputs[0].uses())
    tape, int64 = Tape(graph, site.node), ir.DataType.INT64
    rows = tape.op("Shape", [a], [1], int64, start=0, end=1)
    vocabulary = tape.ints([site.vocabulary])
    n_rows = tape.op("Squeeze", [rows], [], int64)
    counted = tape.op("Range", [tape.scalar(0), n_rows, tape.scalar(1)], [None], int64)
    starts = tape.op("Mul", [counted, vocabulary], [None], int64)
    column = tape.op("Unsqueeze", [starts, tape.ints([1])], [None, 1], int64)
    index = tape.op("Add", [site.ids, column], None, int64)
    rank = tape.op("Shape", [a], [1], int64, start=2, end=3)
    flat_shape = tape.op("Concat", [tape.op("Mul", [rows, vocabulary], [1], int64), rank], [2], int64, axis=0)
    # A rank of 0 makes a size of 0, which without allowzero would mean "as it was".
    flat = tape.op("Reshape", [a, flat_shape], [None, a.shape[2]], a.dtype, allowzero=1)
    low = tape.op("Gather", [flat, index], None, a.dtype, axis=0)
    delta = tape.op("MatMul", [low, b], None, a.dtype)
    _add(graph, tape, output, delta=delta, users=users)


def add_token_inputs(graph: ir.Graph, site: EmbeddingSite, ids: ir.Value, *, delta: ir.Value) -> None:
    """Case 2; an id of -1 is no token."""
    output, users = site.node.outputs[0], tuple(site.node.outputs[0].uses())
    tape = Tape(graph, site.node)
    asked = tape.op("Unsqueeze", [site.ids, tape.ints([2])], None, ir.DataType.INT64)
    changed = tape.op("Unsqueeze", [ids, tape.ints([1])], None, ir.DataType.INT64)
    same = tape.op("Equal", [asked, changed], None, ir.DataType.BOOL)
    mask = tape.op("Cast", [same], None, delta.dtype, to=int(delta.dtype))
    _add(graph, tape, output, delta=tape.op("MatMul", [mask, delta], None, delta.dtype), users=users)


def _add(graph: ir.Graph, tape: Tape, output: ir.Value, *, delta: ir.Value, users: tuple) -> None:
    dims = None if output.shape is None else list(output.shape)
    put_in_place_of(graph, output, tape.op("Add", [output, delta], dims, output.dtype or delta.dtype), users=users)
