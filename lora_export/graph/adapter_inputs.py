"""Give a traced graph the optional inputs that carry adapters.

Contract (`y`, `x` are a module's output and input, `i` a row of the batch):

1. Linear: `y[i] = (W x[i]) ⊙ g[i] + (x[i] A[i]) B[i] + b[i]`: a pair A `[rows, in, rank]`, B `[rows, rank, out]`, scale
   and gain folded into B; where an adapter is DoRA, its gain g `[rows, 1, out]`; where one has a bias of its own,
   b `[rows, 1, out]`.
2. Replaced Linear: `y[i] = x[i] W[i] + b[i]`, W `[rows, in, out]`, b `[rows, 1, out]`; `out` may differ from the
   base's, so nothing downstream keeps a static size for it.
3. Embedding: a pair A `[rows, vocabulary, rank]`, B `[rows, rank, dim]`; changed tokens: ids `[rows, n]`, int64, and
   what is added to them `[rows, n, dim]`.
4. Convolution: a pair A `[rows, in·∏kernel, rank]`, B `[rows, rank, out]`, and a bias as of a Linear.
5. Where an adapter is active from some token on: the gate `[rows, length, 1]`, length that of the sequence or 1, which
   multiplies `x[i] A[i]` of the modules that such an adapter has a pair on.

`rows` is 1 or the batch size. Stock operators on any provider. This pass owns the model it is given and must run
before fusion, which drops the module paths. Inputs get no default here: a constant default would be packed by the
fusions as if it were a weight (`attach_defaults` runs after them).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_export.base.recipe import RECIPE, Recipe
from lora_export.contract import GATE_INPUT, AdapterInput, AdapterInputKind
from lora_export.graph.convolution_inputs import (
    add_convolution_bias,
    add_convolution_pair,
    convolutions_in,
    find_convolutions,
)
from lora_export.graph.embedding_inputs import add_embedding_pair, add_token_inputs, find_embeddings
from lora_export.graph.linear_inputs import add_bias_input, add_pair, has_bias, replace_linear, uses_of_bias
from lora_export.graph.sites import Site, find_sites

ROWS, GATE_LENGTH = "rows", "gate_length"
_PAIR = (AdapterInputKind.LORA_A, AdapterInputKind.LORA_B)
_TOKENS = (AdapterInputKind.TOKEN_IDS, AdapterInputKind.TOKEN_DELTA)


@dataclass(frozen=True)
class SiteChoice:
    """What adapters may bring to the graph, by module path.

    Attributes:
        lora_modules: Linear modules with a pair.
        replaced_modules: Linear modules replaced as a whole.
        gain_modules: Those of `lora_modules` with DoRA's gain.
        bias_modules: Modules whose bias is an input, replaced ones not counted.
        embedding_modules: Embeddings with a pair.
        token_modules: Embeddings with changed tokens.
        convolution_modules: Convolutions with a pair.
        gate_modules: Those of `lora_modules` whose pair may be active for some tokens only.
    """

    lora_modules: tuple[str, ...] = ()
    replaced_modules: tuple[str, ...] = ()
    gain_modules: tuple[str, ...] = ()
    bias_modules: tuple[str, ...] = ()
    embedding_modules: tuple[str, ...] = ()
    token_modules: tuple[str, ...] = ()
    convolution_modules: tuple[str, ...] = ()
    gate_modules: tuple[str, ...] = ()


def add_adapter_inputs(model: ir.Model, choice: SiteChoice) -> tuple[ir.Model, tuple[AdapterInput, ...]]:
    """Add the inputs of `choice` to `model` (changed in place and returned) and describe them.

    Raises:
        InputRefused: A module is not what `choice` takes it for in this graph, or its input has an unsupported layout.
    """
    graph = model.graph
    found: dict[str, list[AdapterInput]] = {}

    def register(module: str, kinds: Iterable[AdapterInputKind], values: Iterable[ir.Value], **facts: bool) -> None:
        for kind, value in zip(kinds, values, strict=False):
            graph.inputs.append(value)
            dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
            entry = AdapterInput(value.name, module, kind, str(value.dtype.numpy()), dims, **facts)
            found.setdefault(module, []).append(entry)

    lora_sites = find_sites(graph, choice.lora_modules)
    replaced_sites = find_sites(graph, choice.replaced_modules)
    for module, sites in find_embeddings(graph, choice.embedding_modules).items():
        dims, dtype = (sites[0].vocabulary, sites[0].dim), sites[0].node.inputs[0].dtype
        pair = _pair_inputs(module, dims, dtype)
        for site in sites:
            add_embedding_pair(graph, site, *pair)
        register(module, _PAIR, pair)
    for module, sites in find_embeddings(graph, choice.token_modules).items():
        tokens = _token_inputs(module, sites[0].dim, sites[0].node.inputs[0].dtype)
        for site in sites:
            add_token_inputs(graph, site, *tokens)
        register(module, _TOKENS, tokens)
    for module, sites in find_convolutions(graph, choice.convolution_modules).items():
        pair = _pair_inputs(module, (sites[0].in_features, sites[0].out_channels), sites[0].node.inputs[1].dtype)
        for site in sites:
            add_convolution_pair(graph, site, *pair)
        register(module, _PAIR, pair)
    gate = None
    if choice.gate_modules:
        gate = _graph_input(GATE_INPUT, lora_sites[choice.gate_modules[0]][0].weight.dtype, [ROWS, GATE_LENGTH, 1])
        register("", (AdapterInputKind.GATE,), (gate,))
    for module in choice.bias_modules:  # before the pairs, which go in between the product and its bias
        own, _ = uses_of_bias(graph, module)
        bias = _add_bias(graph, module, own, lora_sites.get(module, []))
        register(module, (AdapterInputKind.BIAS,), (bias,), base_has_default=own is not None)
    for module, sites in lora_sites.items():
        pair = _pair_inputs(module, (sites[0].in_features, sites[0].out_features), sites[0].weight.dtype)
        gain = _gain_input(sites[0]) if module in choice.gain_modules else None
        for site in sites:
            add_pair(graph, site, *pair, gain, gate if module in choice.gate_modules else None)
        register(module, (*_PAIR, AdapterInputKind.GAIN), (*pair, *([gain] if gain else [])))
    for module, sites in replaced_sites.items():
        inputs = _replacement_inputs(sites[0])
        for site in sites:
            replace_linear(graph, site, inputs)
        register(module, (AdapterInputKind.WEIGHT, AdapterInputKind.BIAS), inputs)
    return model, tuple(entry for entries in found.values() for entry in entries)


def _add_bias(graph: ir.Graph, module: str, own: ir.Value | None, sites: Sequence[Site]) -> ir.Value:
    """A bias input in place of the module's `own`, if it has one; `sites` of its Linear, where they are known."""
    if convolutions_in(graph, (module,))[module]:
        convolutions = find_convolutions(graph, (module,))[module]
        bias = _bias_input(module, convolutions[0].node.inputs[1].dtype, convolutions[0].out_channels)
        for site in convolutions:
            add_convolution_bias(graph, site, bias)
        return bias
    if own is None and not sites:
        sites = find_sites(graph, [module])[module]
    like, out = (own, own.shape[0]) if own is not None else (sites[0].weight, sites[0].out_features)
    bias = _bias_input(module, like.dtype, out)
    add_bias_input(graph, module, bias, sites)
    return bias


def _bias_input(module: str, dtype: ir.DataType, out: int) -> ir.Value:
    return _graph_input(f"{module}.bias", dtype, [ROWS, 1, out])


def _graph_input(name: str, dtype: ir.DataType, dims: list) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims))


def _pair_inputs(module: str, dims: tuple[int, int], dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
    # One rank symbol a module: adapters differ in rank by module, and ONNX Runtime reuses buffers by symbol.
    rank = f"{module}.rank"
    return (
        _graph_input(f"{module}.lora_A.weight", dtype, [ROWS, dims[0], rank]),
        _graph_input(f"{module}.lora_B.weight", dtype, [ROWS, rank, dims[1]]),
    )


def _gain_input(site: Site) -> ir.Value:
    return _graph_input(f"{site.module}.lora_magnitude", site.weight.dtype, [ROWS, 1, site.out_features])


def _token_inputs(module: str, dim: int, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
    n_tokens = f"{module}.n_tokens"
    return (
        _graph_input(f"{module}.token_ids", ir.DataType.INT64, [ROWS, n_tokens]),
        _graph_input(f"{module}.token_delta", dtype, [ROWS, n_tokens, dim]),
    )


def _replacement_inputs(site: Site) -> tuple[ir.Value, ...]:
    out, dtype = f"{site.module}.out_features", site.weight.dtype
    weight = _graph_input(f"{site.module}.weight", dtype, [ROWS, site.in_features, out])
    return (weight, _graph_input(f"{site.module}.bias", dtype, [ROWS, 1, out])) if has_bias(site) else (weight,)


# What each optional input is where no adapter is fed; a replaced Linear and a bias default to the base's own.
_CONSTANTS = {
    AdapterInputKind.LORA_A: 0,
    AdapterInputKind.LORA_B: 0,
    AdapterInputKind.GAIN: 1,
    AdapterInputKind.GATE: 1,
    AdapterInputKind.TOKEN_IDS: -1,
    AdapterInputKind.TOKEN_DELTA: 0,
}


def attach_defaults(graph: ir.Graph, adapter_inputs: Iterable[AdapterInput]) -> None:
    """Make every adapter input optional, in place (after fusion).

    A pair gets a constant of rank 0, a gain and a gate ones, changed tokens none. A replaced Linear's input and a bias
    become unbound initializers made of the base's own tensor of the same name, which is bound like any other weight;
    the bias of a module without one is zeros.
    """
    by_name = {value.name: value for value in graph.inputs}
    for entry in adapter_inputs:
        value = by_name[entry.name]
        constant = _CONSTANTS.get(entry.kind)
        if constant is None and not entry.base_has_default:
            constant = 0
        if constant is not None:
            shape = tuple(dim if isinstance(dim, int) else int(dim in (ROWS, GATE_LENGTH)) for dim in entry.dims)
            value.const_value = ir.tensor(np.full(shape, constant, value.dtype.numpy()), name=value.name)
        else:
            recipe = Recipe((entry.name,), transposed=entry.kind is AdapterInputKind.WEIGHT)
            value.metadata_props[RECIPE] = recipe.to_json()
        graph.initializers[value.name] = value
