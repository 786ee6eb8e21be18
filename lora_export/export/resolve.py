"""A plan's tensors: the adapters as PEFT resolves them, and the source of every parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from lora_export.adapters.factors import Adapter
from lora_export.adapters.folder import AdapterFolder
from lora_export.adapters.peft_reader import read_trained_adapter
from lora_export.base.checkpoint import checkpoint_names, stored_apart
from lora_export.base.computed import computed_parameters
from lora_export.base.tasks import HEADED, Task
from lora_export.base.weightless import build_weightless, is_conv1d, parameter_aliases, untie
from lora_export.export.as_stored import stored_grids
from lora_export.export.completion import completed
from lora_export.export.plan import Plan
from lora_export.export.weights import Parameters
from lora_export.quantization import Method, Quantization

# An adapter's folder and a weightless base.
Reader = Callable[[AdapterFolder, torch.nn.Module], Adapter]


@dataclass(frozen=True)
class Resolved:
    """A plan's tensors: adapters as PEFT resolved them, and the source of every parameter.

    Attributes:
        model: The weightless model; None where all this was recalled, as the graphs are there.
        model_class: The name of its class.
    """

    adapters: tuple[Adapter, ...]
    parameters: Parameters
    model: torch.nn.Module | None
    model_class: str

    def quantized(self, how: Quantization | None) -> Resolved:
        """The same, of a graph that stores linear maps as `how` says."""
        return replace(self, parameters=replace(self.parameters, quantization=how))


def resolve(
    plan: Plan, *, zeros_for_missing_head: bool = False, read_adapter: Reader = read_trained_adapter
) -> Resolved:
    """Read the adapters on the weightless base and map the checkpoint's names.

    Args:
        zeros_for_missing_head: Give a head that the checkpoint lacks zeros instead of refusing (a benchmark's base).
        read_adapter: Reads an adapter on a float32 base.

    Raises:
        InputRefused: An adapter does not fit the base, or holds numbers that are not finite.
    """
    model = plan.model
    if model is None or plan.dtype != "float32" or model.config.to_dict() != plan.config.to_dict():
        model = build_weightless(plan.task, plan.config, plan.dtype, most_parameters=plan.checkpoint.most_parameters)
    read = _read_adapters(plan, model, read_adapter)
    shapes = {path: tuple(tensor.shape) for path, tensor in model.state_dict().items()}
    head = head_parameters(read, model, plan.task, everything=zeros_for_missing_head)
    brought = {path for adapter in read for path in (*adapter.replaced, *adapter.base_copies)}
    replaced = frozenset(brought) if plan.request.mode == "merge" else frozenset()
    names = checkpoint_names(model, plan.checkpoint.files, replaced)
    untie(model, stored_apart(model, names, plan.checkpoint.files))
    aliases = parameter_aliases(model)
    computed = computed_parameters(model, (path for path in shapes if names.keys().isdisjoint(aliases[path])))
    modules = dict(model.named_modules())
    in_out = frozenset(f"{name}.weight" for name, module in modules.items() if is_conv1d(module))
    tables = frozenset(f"{name}.weight" for name, each in modules.items() if isinstance(each, torch.nn.Embedding))
    stored = {"quantization": plan.request.quantization, "dtype": plan.dtype}
    how = plan.request.quantization
    if how is not None and how.method is Method.AS_STORED:
        own = stored_grids(plan.checkpoint.files, names, shapes, dtype=plan.dtype, in_out=in_out)
        stored |= {"own": own, "quantization": how if own.most is None else how.on(own.most)}
    stored |= {"zeros_for": head, "computed": computed, "in_out": in_out, "embeddings": tables}
    base = Parameters(plan.checkpoint, names, aliases, shapes, **stored)
    adapters = tuple(
        completed(adapter, base, model, mode=plan.request.mode, convert_rank=plan.request.convert_rank)
        for adapter in read
    )
    merged = tuple(zip(adapters, plan.request.weight_of_each, strict=True)) if plan.request.mode == "merge" else ()
    return Resolved(adapters, replace(base, adapters=merged), model, type(model).__name__)


def _read_adapters(plan: Plan, model, read_adapter: Reader) -> tuple[Adapter, ...]:
    """The adapters, each read on a float32 base of its own sizes: PEFT rounds an adapter to the dtype of the base that
    it is loaded onto. Bases of the same sizes are one."""
    bases = {} if plan.model is None else {_sizes_of(plan.model.config): plan.model}
    if plan.dtype == "float32":
        bases[_sizes_of(plan.config)] = model
    found = []
    for folder, config in zip(plan.folders, plan.adapter_configs, strict=True):
        sizes = _sizes_of(config)
        if sizes not in bases:
            bases[sizes] = build_weightless(plan.task, config, "float32")
        found.append(read_adapter(folder, bases[sizes]))
    return tuple(found)


def _sizes_of(config) -> tuple[int, int | None]:
    """What the configs of a plan's adapters may differ in, their labels' names aside."""
    return config.num_labels, getattr(config.get_text_config(), "vocab_size", None)


def head_parameters(adapters: Sequence[Adapter], model, task: Task, *, everything: bool) -> frozenset[str]:
    """The parameters that may default to zeros: those that adapters replace; for a benchmark, any but the body's."""
    replaced = {path for adapter in adapters for path in adapter.replaced}
    if everything and task in HEADED:
        prefix = f"{model.base_model_prefix}."
        replaced |= {path for path in model.state_dict() if not path.startswith(prefix) or ".pooler." in path}
    return frozenset(replaced)
