"""Adapters on a graph that another tool made: located, matched with the base, refused where it is not the base's.

The graph stays what it is: its inputs, outputs and operators. Added are the adapters' inputs (`dynamic`) or their
deltas (`merge`), at the weights whose numbers are those of the adapted modules (`graph/matching.py`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass

import numpy as np
import onnx_ir as ir
import torch

from lora_export.adapters.merging import change_of
from lora_export.base.weightless import TORCH_DTYPES, as_numpy, is_conv1d
from lora_export.contract import AdapterInput
from lora_export.errors import InputRefused, refused_if_it_fails, some_of
from lora_export.export.given_files import GivenGraph
from lora_export.export.resolve import Resolved
from lora_export.export.weights import Parameters
from lora_export.graph.adapter_inputs import add_adapter_inputs, attach_defaults
from lora_export.graph.given import normalized, order_tokens, without_unused
from lora_export.graph.given_names import name_biases, name_weights, rename
from lora_export.graph.joining import join
from lora_export.graph.matching import BaseMatrix, GivenWeight, Matcher, given_weights
from lora_export.graph.unpacking import unpack
from lora_export.progress import Remark
from lora_export.site_choice import SiteChoice

_SHOWN = 6
_LOOKUPS = ("Gather", "Shape")


@dataclass(frozen=True)
class MatchedGraph:
    """A given graph whose weights are named by the base's paths.

    Attributes:
        weights: Its matrices, those whose module is not known included.
        biases: The modules whose bias it has in a place of its own.
    """

    given: GivenGraph
    model: ir.Model
    weights: tuple[GivenWeight, ...]
    biases: frozenset[str]

    @property
    def described(self) -> str:
        """What was found, as a sentence."""
        linear = [weight for weight in self.weights if not weight.is_table]
        found, integers = [w for w in linear if w.modules], [w for w in linear if w.modules and w.is_integers]
        stored = f", {len(integers)} of them as integers" if integers else ""
        others = len(linear) - len(found)
        rest = f"; {others} other matrices stay as they are" if others else ""
        return f"{len(found)} of the given graph's matrices are the base's by their numbers{stored}{rest}"


def matched_graph(given: GivenGraph, resolved: Resolved, choice: SiteChoice) -> MatchedGraph:
    """Read the graph, and find the base's modules in it; those that adapters of `choice` need are taken apart.

    Raises:
        InputRefused: The graph cannot be read, or not with adapters.
    """
    config = resolved.model.config
    model = given.take_model()
    normalized(model, given.path, head_size=_head_size(config), image=_image_of(config))
    rows = _Rows(resolved)
    weights, matrices = given_weights(model.graph), _matrices(resolved)
    matcher = Matcher(matrices, rows)
    matcher.match(weights)
    modules = {module for names in asdict(choice).values() for module in names}
    changed = modules.union(path.removesuffix(".weight") for path in _changed(resolved))
    weights = join(model.graph, weights, matrices, matcher=matcher, modules=changed)
    weights = unpack(model.graph, weights, modules)
    name_weights(model.graph, weights)
    named = {each.module for weight in weights for each in weight.modules}
    biases = {
        module: rows.whole(f"{module}.bias") for module in named if f"{module}.bias" in resolved.parameters.shapes
    }
    return MatchedGraph(given, model, tuple(weights), name_biases(model.graph, weights, biases))


def given_graph(
    given: GivenGraph, resolved: Resolved, choice: SiteChoice, *, is_merged: bool, remark: Remark
) -> tuple[ir.Model, tuple[AdapterInput, ...]]:
    """The graph to write, and its adapter inputs.

    Raises:
        InputRefused: The graph lacks a module that is adapted, by name, or holds it in a way that adapters cannot be
            put onto.
    """
    unread = "leave --graph out, or make the graph again"
    with refused_if_it_fails("The given graph could not be read", where=str(given.path), next_step=unread):
        matched = matched_graph(given, resolved, choice)
    (_require_foldable if is_merged else _require_served)(matched, resolved, choice)
    remark(matched.described)
    for weight in matched.weights:
        _give_its_name_up(matched.model.graph, weight, resolved, choice=choice)
    model, inputs = add_adapter_inputs(matched.model, choice)
    without_unused(model)
    order_tokens(model, given.path)
    attach_defaults(model.graph, inputs)
    return model, inputs


def _give_its_name_up(graph: ir.Graph, weight: GivenWeight, resolved: Resolved, *, choice: SiteChoice) -> None:
    """Name a weight that is read elsewhere too, such as a head that is an embedding's table, by another of its paths,
    where an adapter's input is to have its name."""
    module = weight.modules[0].module if len(weight.modules) == 1 else None
    if module in choice.replaced_modules and _is_read_elsewhere(weight):
        path = f"{module}.weight"
        others = [other for other in resolved.parameters.aliases.get(path, ()) if other != path]
        rename(graph, weight.value, others[0] if others else f"{path}_base")


class _Rows:
    """The base's matrices as `[out, in]` arrays; the last one is kept, as it is asked for in pieces."""

    def __init__(self, resolved: Resolved) -> None:
        self._parameters = resolved.parameters
        self._last: tuple[str, torch.Tensor] | None = None

    def whole(self, path: str) -> np.ndarray:
        return as_numpy(self._parameters.base(path).float().contiguous())

    def __call__(self, matrix: BaseMatrix, rows: slice, dtype: str) -> np.ndarray:
        path = f"{matrix.module}.weight"
        if self._last is None or self._last[0] != path:
            self._last = path, self._parameters.base(path)
        tensor = self._last[1].T if matrix.is_in_out else self._last[1]
        return as_numpy(tensor[rows].to(TORCH_DTYPES[dtype]).contiguous())


def _matrices(resolved: Resolved) -> list[BaseMatrix]:
    found = []
    for name, module in resolved.model.named_modules():
        if resolved.parameters.stored_name(f"{name}.weight") is None:
            continue
        if isinstance(module, torch.nn.Linear):
            found.append(BaseMatrix(name, module.weight.shape[1], module.weight.shape[0]))
        elif is_conv1d(module):
            found.append(BaseMatrix(name, *module.weight.shape, is_in_out=True))
        elif isinstance(module, torch.nn.Embedding):
            found.append(BaseMatrix(name, module.weight.shape[1], module.weight.shape[0], is_table=True))
    return found


def _head_size(config) -> int | None:
    config = config.get_text_config()
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    return getattr(config, "head_dim", None) or (hidden // heads if heads and hidden else None)


def _image_of(config) -> tuple[int, int, int] | None:
    config = getattr(config, "vision_config", None) or config
    size = getattr(config, "image_size", None)
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else ()
    return (getattr(config, "num_channels", 3), *sides) if len(sides) == 2 else None


def _require_served(matched: MatchedGraph, resolved: Resolved, choice: SiteChoice) -> None:
    """Refuse modules of `choice` that the graph has not, or cannot give what it asks for."""
    products = {m.module: w for w in matched.weights if w.is_product and len(w.modules) == 1 for m in w.modules}
    tables = {m.module for w in matched.weights if w.is_table and not w.is_integers for m in w.modules}
    linear = (*choice.lora_modules, *choice.replaced_modules)
    missing = [module for module in linear if module not in products]
    missing += [module for module in (*choice.embedding_modules, *choice.token_modules) if module not in tables]
    missing += [module for module in linear if module in products and _is_multiplied_elsewhere(products[module])]
    _refuse_missing(matched, missing)
    integers = [m for m in (*choice.gain_modules, *choice.replaced_modules) if products[m].is_integers]
    if integers:
        raise InputRefused(
            "The given graph stores modules as integers that an adapter replaces, or has a DoRA gain on",
            where=some_of(integers, _SHOWN),
            expected="plain pairs on modules of integers",
            next_step="give a graph in floats, or leave --graph out and use --quantize",
        )
    with_biases = (*choice.bias_modules, *choice.replaced_modules)
    own = {module for module in with_biases if f"{module}.bias" in resolved.parameters.shapes}
    others = [module for module in with_biases if module not in products or module in own - matched.biases]
    others += choice.convolution_modules
    if others:
        raise InputRefused(
            "The given graph has no place of their own for biases or convolutions that adapters bring",
            where=some_of(list(dict.fromkeys(others)), _SHOWN),
            expected="pairs on linear modules, and biases that one Add adds to them",
            next_step="leave --graph out: this tool's own graph takes them",
        )


def _require_foldable(matched: MatchedGraph, resolved: Resolved, choice: SiteChoice) -> None:
    """Refuse a merge that changes what the graph has not, has in another size or as integers, or reads in other places
    as well."""
    parameters = resolved.parameters
    _require_same_sizes(parameters)
    held: dict[str, GivenWeight | None] = {f"{module}.bias": None for module in matched.biases}
    held |= {f"{each.module}.weight": weight for weight in matched.weights for each in weight.modules}
    changed = _changed(resolved)
    _refuse_missing(matched, [path.removesuffix(".weight") for path in changed if path not in held])
    weights = {path: held[path] for path in changed if held[path] is not None}
    integers = [path for path, weight in weights.items() if weight.is_integers]
    if integers:
        raise InputRefused(
            "The given graph stores its weights as integers, and a merge would have to quantize them anew",
            where=some_of(integers, _SHOWN),
            next_step="give the graph in floats, leave --graph out and use --quantize, or serve the adapter (dynamic)",
        )
    shared = [path for path in changed if len(parameters.aliases.get(path, ())) > 1]
    shared += [path for path, weight in weights.items() if _is_read_elsewhere(weight)]
    if shared:
        raise InputRefused(
            "An adapter changes a weight that the given graph, or the base, uses in several places",
            where=some_of(list(dict.fromkeys(shared)), _SHOWN),
            next_step="leave --graph out: this tool's own graph takes them apart",
        )


def _require_same_sizes(parameters: Parameters) -> None:
    """Refuse what an adapter brings as a whole and the base, whose numbers the graph has, has not in that size."""
    brought = {path: tensor for adapter, _ in parameters.adapters for path, tensor in adapter.replaced.items()}
    others = [path for path in brought if parameters.stored_name(path) is None]
    if others:
        raise InputRefused(
            "An adapter brings a module that the base, and so the given graph, has not, or in another size",
            where=some_of(others, _SHOWN),
            found=str(list(brought[others[0]].shape)),
            next_step="leave --graph out; a head of another number of labels can also be served (dynamic)",
        )


def _changed(resolved: Resolved) -> list[str]:
    """The parameters that the merged adapters change."""
    parameters = resolved.parameters
    return [
        path
        for path in parameters.shapes
        if any(change_of(adapter, weight, path, read=parameters.base) for adapter, weight in parameters.adapters)
    ]


def _readers(weight: GivenWeight) -> set[ir.Node]:
    """The nodes that read the weight, as it is or transposed, and are not those that were matched."""
    readers = {node for node, _ in weight.value.uses()}
    through = {user for node in readers if node.op_type == "Transpose" for user, _ in node.outputs[0].uses()}
    return {node for node in readers | through if node.op_type != "Transpose"} - set(weight.nodes)


def _is_read_elsewhere(weight: GivenWeight) -> bool:
    return bool(_readers(weight))


def _is_multiplied_elsewhere(weight: GivenWeight) -> bool:
    """Whether anything but a lookup reads the weight beside its module's nodes: another use of the module, perhaps."""
    return not weight.is_integers and any(node.op_type not in _LOOKUPS for node in _readers(weight))


def _refuse_missing(matched: MatchedGraph, missing: Collection[str]) -> None:
    if not missing:
        return
    inside = {m.module: w.node.op_type for w in matched.weights for m in w.modules}
    found = [f"{name} (inside {inside[name]})" if name in inside else name for name in dict.fromkeys(missing)]
    raise InputRefused(
        "The given graph lacks modules that adapters change",
        where=f"{matched.given.path}: {some_of(found, _SHOWN)}",
        expected="products by the base's own numbers, as they are, transposed, packed or rounded to integers",
        found=matched.described,
        next_step="export that graph from this base, without an optimizer after it, or leave --graph out",
    )
