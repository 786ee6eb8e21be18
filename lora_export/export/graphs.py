"""The finished weightless graphs of a plan: traced, given their adapter inputs, fused; cached at both steps."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace

import numpy as np
import onnx_ir as ir

from lora_export.artifact import versions
from lora_export.base.layers import Stack, alike_stacks, deep_paths, repeats_one, shortened
from lora_export.base.tasks import Task, graphs_of
from lora_export.base.trace import longest_texts, sliding_windows, trace
from lora_export.contract import SINGLE, AdapterInput, GraphContract
from lora_export.errors import InputRefused, refused_if_it_fails
from lora_export.export.given_graph import given_graph
from lora_export.export.plan import Plan
from lora_export.export.resolve import Resolved
from lora_export.export.tied import untied_modules
from lora_export.export.untraced import why_untraced
from lora_export.export.weights import digest
from lora_export.graph.adapter_inputs import add_adapter_inputs, attach_defaults, present_in
from lora_export.graph.cache import cache_key, cached_graph, kept_graph
from lora_export.graph.derived import Derived, fold_derived
from lora_export.graph.fuse import fuse
from lora_export.graph.head import keep_last_logits
from lora_export.graph.layer_names import derived_of_all, is_uniform, stamped_inputs, stand_ins, traced_choice
from lora_export.graph.runnable import refuse_bfloat16
from lora_export.graph.sentence import add_sentence_embedding
from lora_export.graph.sites import find_sites, refuse_unlinked, sites_in
from lora_export.graph.stamp import holds, stamp
from lora_export.graph.unbound import bind_small, rename_weight, untie
from lora_export.progress import Remark
from lora_export.site_choice import SiteChoice

_ADAPTER_INPUTS = "lora_export.adapter_inputs"
# What a config holds besides the architecture; it changes no graph.
_NOT_ARCHITECTURE = ("_name_or_path", "architectures", "transformers_version", "id2label", "label2id", "torch_dtype")


@dataclass(frozen=True)
class FinishedGraph:
    """A graph to bind, and its adapter inputs (none for a merge)."""

    model: ir.Model
    adapter_inputs: tuple[AdapterInput, ...]


def finished_graphs(
    plan: Plan, resolved: Resolved, choice: SiteChoice, *, use_cache: bool, remark: Remark
) -> dict[str, FinishedGraph]:
    """The graphs of the plan's task by stem, in the order they run.

    Large weights stay unbound; norms and biases are bound, as fusions use them, but those that an adapter replaces.

    Raises:
        InputRefused: A chosen module is a linear map of none of the graphs.
    """
    if plan.given_graph is not None:
        is_merged = plan.request.mode == "merge"
        model, inputs = given_graph(plan.given_graph, resolved, choice, is_merged=is_merged, remark=remark)
        model = _with_embedding(plan, model)
        return {SINGLE: FinishedGraph(model, _with_known_defaults(inputs, resolved))}
    once = functools.cache(remark)
    found = {
        graph: _finished_graph(plan, resolved, choice, graph=graph, use_cache=use_cache, remark=once)
        for graph in graphs_of(plan.task)
    }
    served = {m for finished in found.values() for entry in finished.adapter_inputs for m in entry.modules}
    chosen = dict.fromkeys(module for modules in asdict(choice).values() for module in modules)
    refuse_unlinked([module for module in chosen if module not in served])
    return found


@dataclass(frozen=True)
class _Facts:
    """All that decides one finished graph.

    Attributes:
        traced_from: What decides its trace.
        finished_from: What decides the rest, `traced_from` included.
        small: The norms and biases to bind, by path.
        untied: See `untied_modules`.
        kept: The parameters that are not quantized although they could be.
    """

    graph: str
    choice: SiteChoice
    traced_from: dict
    finished_from: dict
    small: dict[str, np.ndarray]
    untied: dict[str, str]
    kept: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The finished graph's, in the cache."""
        return cache_key(self.finished_from | {"step": "finished"})


def _finished_graph(
    plan: Plan, resolved: Resolved, choice: SiteChoice, *, graph: str, use_cache: bool, remark: Remark
) -> FinishedGraph:
    facts = _facts(plan, resolved, choice, graph=graph)
    build = functools.partial(_build, plan, resolved, facts, use_cache=use_cache, remark=remark)
    return _reattached(cached_graph(facts.key, build, use_cache=use_cache), resolved)


def kept_graphs(plan: Plan, resolved: Resolved, choice: SiteChoice) -> dict[str, FinishedGraph] | None:
    """`finished_graphs` where all of them are kept; None if one is not, as it would have to be built."""
    keys = {graph: _facts(plan, resolved, choice, graph=graph).key for graph in graphs_of(plan.task)}
    found = {graph: kept_graph(key) for graph, key in keys.items()}
    if any(model is None for model in found.values()):
        return None
    return {graph: _reattached(model, resolved) for graph, model in found.items()}


def _facts(plan: Plan, resolved: Resolved, choice: SiteChoice, *, graph: str) -> _Facts:
    config = {key: value for key, value in plan.config.to_dict().items() if key not in _NOT_ARCHITECTURE}
    tied = sorted({group for group in resolved.parameters.aliases.values() if len(group) > 1})
    traced_from = {
        "config": config,
        "labels": plan.config.num_labels,
        "task": plan.task,
        "dtype": plan.dtype,
        "class": resolved.model_class,
        "versions": versions(),
        "graph": graph,
        "tied": tied,
        "named_inputs": plan.checkpoint.tokenizer_inputs,
        "image_size": plan.checkpoint.image_size,
        "attention_operator": _has_attention_operator(plan),
    }
    replaced = choice.parameters.union(*(adapter.replaced for adapter in resolved.adapters))
    small = resolved.parameters.small_parameters(plan.dtype, without=replaced | resolved.parameters.zeros_for)
    untied = untied_modules(resolved)
    finished_from = traced_from | {
        "provider": plan.request.provider,
        "small": digest(small),
        "untied": untied,
        "sites": asdict(choice),
        "unbound": sorted(replaced),
    }
    if plan.head is not None:  # its linear layers go by the hash of their files
        finished_from["embedding"] = asdict(plan.head.embedding) | {"source": None}
    # Of a decoder, whose attention holds no weights, the graph is the same one.
    if plan.request.quantization is not None and plan.task is not Task.TEXT_GENERATION:
        finished_from["holds_weights"] = False
    kept: tuple[str, ...] = ()
    if plan.request.quantization is not None and not resolved.parameters.may_pack(resolved.parameters.shapes):
        kept = tuple(path for path in resolved.parameters.shapes if not resolved.parameters.may_pack((path,)))
        finished_from["not_packed"] = kept
    return _Facts(graph, choice, traced_from, finished_from, small, untied, kept)


def _build(plan: Plan, resolved: Resolved, facts: _Facts, *, use_cache: bool, remark: Remark) -> ir.Model:
    """The finished graph: of few layers of each stack, copied, where they are alike; else of the whole model."""
    stacks = [stack for stack in alike_stacks(resolved.model) if _is_uniform(facts, stack)]
    made = None
    while stacks and made is None:
        made, stacks = _stamped(plan, resolved, facts, stacks=stacks, use_cache=use_cache)
    if made is None:
        made = _trace_and_fuse(plan, resolved, facts, use_cache=use_cache)[:2]
    traced = set(deep_paths(resolved.model)).difference(stack.path for stack in stacks)
    if repeats_one(resolved.model) or any(holds(made[0].graph, path) for path in traced):
        remark("The base's layers could not be copied from one another, so all are traced, which takes longer.")
    return _described(plan, *made)


def _stamped(
    plan: Plan, resolved: Resolved, facts: _Facts, *, stacks: list[Stack], use_cache: bool
) -> tuple[tuple[ir.Model, tuple[AdapterInput, ...]] | None, list[Stack]]:
    """The fused graph with the layers of `stacks` copied; or None, and the stacks to try next."""
    few = replace(facts, traced_from=facts.traced_from | {"layers": [asdict(stack) for stack in stacks]})
    for stack in stacks:
        few = replace(few, choice=traced_choice(few.choice, stack), small=stand_ins(few.small, stack))
    try:
        with shortened(resolved.model, stacks):
            model, inputs, derived = _trace_and_fuse(plan, resolved, few, use_cache=use_cache)
    except InputRefused:  # what the whole model's trace says of it, if that fails as well, is the truth
        return None, []
    for at, stack in enumerate(stacks):
        if not holds(model.graph, stack.path):
            continue
        of_all = derived_of_all(derived, facts.small, stack)
        if of_all is None or stamp(model, stack, facts.small | of_all) is None:
            return None, [*stacks[:at], *stack.wider(), *stacks[at + 1 :]]
        inputs = stamped_inputs(inputs, stack)
    return (model, inputs), stacks


def _is_uniform(facts: _Facts, stack: Stack) -> bool:
    """Whether adapters touch alike layers alike, leave the same parameters of them as the base has, and the same of
    them is quantized."""
    sites = asdict(facts.choice) | {"small": tuple(facts.small), "untied": tuple(facts.untied), "kept": facts.kept}
    return all(is_uniform(names, stack) for names in sites.values())


def _described(plan: Plan, model: ir.Model, inputs: Sequence[AdapterInput]) -> ir.Model:
    """`model` with the plan's embedding, its adapter inputs made optional, and their descriptions along as metadata."""
    model = _with_embedding(plan, model)
    attach_defaults(model.graph, inputs)
    model.metadata_props[_ADAPTER_INPUTS] = json.dumps(GraphContract((), (), tuple(inputs)).to_dict()["adapter_inputs"])
    return model


def _with_embedding(plan: Plan, model: ir.Model) -> ir.Model:
    return model if plan.head is None else add_sentence_embedding(model, plan.head.embedding, plan.head.weights())


def _trace_and_fuse(
    plan: Plan, resolved: Resolved, facts: _Facts, *, use_cache: bool
) -> tuple[ir.Model, tuple[AdapterInput, ...], tuple[Derived, ...]]:
    """Trace, untie, bind what is small, give adapter inputs, fuse. The graph, its inputs, and its derived constants."""
    key = cache_key(facts.traced_from | {"step": "trace"})
    with _refused(plan, "trace", "its trace"):
        options = {
            "named": plan.checkpoint.tokenizer_inputs,
            "image_size": plan.checkpoint.image_size,
            "attention_operator": _has_attention_operator(plan),
        }
        model = cached_graph(key, lambda: trace(plan.task, resolved.model, facts.graph, **options), use_cache=use_cache)
    is_only_graph = len(graphs_of(plan.task)) == 1
    for module, other_name in facts.untied.items():
        sites = find_sites(model.graph, [module]) if is_only_graph else sites_in(model.graph, [module])
        if sites[module]:
            untie(model, module, [site.node for site in sites[module]], other_name=other_name)
        else:
            rename_weight(model, f"{module}.weight", other_name)
    bind_small(model, facts.small)
    derived = fold_derived(model, facts.small)
    choice = facts.choice if is_only_graph else present_in(model.graph, facts.choice)
    model, inputs = add_adapter_inputs(model, choice, packs_siblings=plan.request.provider == "cuda")
    with _refused(plan, "fuse", f"its fusions for {plan.request.provider}"):
        model = fuse(
            model,
            plan.request.provider,
            sliding_windows(plan.config),
            longest=longest_texts(plan.config),
            holds_weights=plan.request.quantization is None,
            may_pack=lambda recipe: resolved.parameters.may_pack(recipe.parameters),
        )
    if plan.task is Task.TEXT_GENERATION:
        model = keep_last_logits(model)
    refuse_bfloat16(model, plan.request.provider)
    return model, inputs, derived


def _has_attention_operator(plan: Plan) -> bool:
    """Whether attention is traced to the standard operator. On CUDA, encoder-decoders have not been run
    with it: Transformers' own fusions make their attention."""
    return plan.request.provider == "cpu" or len(graphs_of(plan.task)) == 1


def _refused(plan: Plan, verb: str, step: str) -> AbstractContextManager:
    """Refuses this base by its type if a step of the export fails on it."""
    return refused_if_it_fails(
        f"A {plan.config.model_type} base cannot be exported for {plan.task}: {step} failed",
        where=f"{plan.checkpoint.path}/config.json: model_type {plan.config.model_type}",
        next_step=f"try another --task; docs/supported.md lists the architectures that are known to {verb}; "
        "LORA_EXPORT_DEBUG=1 shows all of the reason",
        found=why_untraced if verb == "trace" else None,
    )


def _reattached(model: ir.Model, resolved: Resolved) -> FinishedGraph:
    """A graph from the cache, or just built, with what goes along as metadata and what no cache may decide."""
    model.producer_name, model.producer_version = "lora-export", versions()["lora-export"]
    fields = {"inputs": [], "outputs": [], "adapter_inputs": json.loads(model.metadata_props.pop(_ADAPTER_INPUTS))}
    return FinishedGraph(model, _with_known_defaults(GraphContract.from_dict(fields).adapter_inputs, resolved))


def _with_known_defaults(inputs: Sequence[AdapterInput], resolved: Resolved) -> tuple[AdapterInput, ...]:
    """`inputs`, each with whether the base has a tensor for its stored default."""
    stored_name = resolved.parameters.stored_name
    has = {entry: not entry.spec.is_stored or stored_name(entry.name) is not None for entry in inputs}
    return tuple(replace(entry, base_has_default=has[entry]) for entry in inputs)
