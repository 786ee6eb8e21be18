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

from collections.abc import Iterable
from dataclasses import asdict

import numpy as np
import onnx_ir as ir

from lora_export.base.recipe import RECIPE, Recipe
from lora_export.contract import AdapterInput, Default
from lora_export.graph.bias_inputs import uses_of_bias
from lora_export.graph.convolution_inputs import CONVOLUTION_INPUTS, convolutions_in
from lora_export.graph.declare import DeclaredInputs
from lora_export.graph.embedding_inputs import EMBEDDING_INPUTS, embeddings_in
from lora_export.graph.linear_inputs import LINEAR_INPUTS
from lora_export.graph.sites import sites_in
from lora_export.site_choice import SiteChoice

_IN_ORDER = (*EMBEDDING_INPUTS, *CONVOLUTION_INPUTS, *LINEAR_INPUTS)


def add_adapter_inputs(
    model: ir.Model, choice: SiteChoice, *, packs_siblings: bool = False
) -> tuple[ir.Model, tuple[AdapterInput, ...]]:
    """Add the inputs of `choice` to `model` (changed in place and returned) and describe them.

    Args:
        packs_siblings: Linear modules that share an input share a pair (`packed_pairs.py`).

    Raises:
        InputRefused: A module is not what `choice` takes it for in this graph, or its input has an unsupported layout.
    """
    inputs = DeclaredInputs(model.graph, packs_siblings=packs_siblings)
    for insert in _IN_ORDER:
        insert(inputs, choice)
    return model, inputs.entries


def present_in(graph: ir.Graph, choice: SiteChoice) -> SiteChoice:
    """What of `choice` this graph, one of several, calls."""
    linear = sites_in(graph, (*choice.lora_modules, *choice.replaced_modules))
    tables = embeddings_in(graph, (*choice.embedding_modules, *choice.token_modules))
    convolutions = convolutions_in(graph, choice.convolution_modules)
    called = {module for module, sites in (linear | tables | convolutions).items() if sites}
    called |= {module for module in choice.bias_modules if uses_of_bias(graph, module)[1]}
    return SiteChoice(**{what: tuple(m for m in modules if m in called) for what, modules in asdict(choice).items()})


def attach_defaults(graph: ir.Graph, adapter_inputs: Iterable[AdapterInput]) -> None:
    """Make every adapter input optional, in place (after fusion).

    1. A stored default becomes an unbound initializer made of the base's own tensor of the same name, which is bound
       like any other weight.
    2. Others are constants, and so are the zeros in place of a stored default that the base has not.
    """
    by_name = {value.name: value for value in graph.inputs}
    for entry in adapter_inputs:
        value, spec = by_name[entry.name], entry.spec
        if spec.is_stored and entry.base_has_default:
            recipe = Recipe((entry.name,), transposed=spec.default is Default.BASE_TRANSPOSED)
            value.metadata_props[RECIPE] = recipe.to_json()
        else:
            value.const_value = ir.tensor(np.full(*spec.constant(entry.dims), value.dtype.numpy()), name=value.name)
        graph.initializers[value.name] = value
