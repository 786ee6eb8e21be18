"""An export's linear maps stored as small integers: what cannot be, and the graphs so changed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import onnx_ir as ir
import torch

from lora_export.base.tasks import Task
from lora_export.base.weightless import is_conv1d
from lora_export.contract import SINGLE
from lora_export.errors import InputRefused, UsageProblem, some_of
from lora_export.export.plan import Plan
from lora_export.export.resolve import Resolved
from lora_export.export.weights import Parameters
from lora_export.graph.pack import pack_siblings
from lora_export.graph.quantize import quantize_weights
from lora_export.graph.unbound import unbound
from lora_export.progress import Remark
from lora_export.quantization import Method, Quantization
from lora_export.site_choice import SiteChoice

# Floats that are worth a word: of what stays as it is, as a share of all.
_WORTH_A_WORD = 0.05
# Its zero lies in the grid, which such a block's may not. Of 32 random numbers, all have one sign once in 2**31.
_K_QUANT_LEAST_BLOCK = 32
_HQQ_BITS = 4


def require_possible(plan: Plan, resolved: Resolved) -> None:
    """Refuse a name to keep that names nothing, blocks that a method spoils, and integers that are not there.

    Raises:
        UsageProblem: A name to keep names no linear module; K-quant in blocks so small that some have one sign; HQQ in
            8 bits.
        InputRefused: The base's own integers were asked for, and none can be taken as they are.
    """
    how = plan.request.quantization
    if how is None:
        return
    if how.method is Method.AS_STORED and not resolved.parameters.own.grids:
        raise InputRefused(
            "None of the base's weights can be taken as it is stored",
            where=str(plan.checkpoint.path),
            expected="GPTQ without desc_act, AWQ, or integers of compressed-tensors or bitsandbytes 8-bit",
            found=f"{plan.checkpoint.quantization or 'floats'}: {resolved.parameters.own.reason}",
            next_step=_instead(resolved.parameters.own.reason),
        )
    if how.method is Method.HQQ and how.bits != _HQQ_BITS:
        raise UsageProblem(
            "ONNX Runtime multiplies by numbers whose zeros are floats, as hqq makes them, in 4 bits only",
            where=f"--quantize {how.name} --quantize-method hqq",
            next_step="add --quantize int4, or choose --quantize-method rtn or k_quant",
        )
    if how.method is Method.K_QUANT and how.block_size < _K_QUANT_LEAST_BLOCK:
        raise UsageProblem(
            "ONNX Runtime's k-quant has no zero for a block whose numbers all have one sign, and some of 16 have",
            where="--quantize-method k_quant --block-size 16",
            expected=f"blocks of at least {_K_QUANT_LEAST_BLOCK}",
            next_step="leave --block-size out, or choose --quantize-method rtn or hqq",
        )
    linear = linear_weights(resolved.model)
    unknown = [name for name in how.keep if not any(replace(how, keep=(name,)).keeps(path) for path in linear)]
    if unknown:
        raise UsageProblem(
            f"--keep {unknown[0]!r} names no linear module of the base",
            expected="one of " + ", ".join(sorted({path.split(".")[-2] for path in linear})),
        )


def _instead(reason: str) -> str:
    wider = "add --dtype float32; or " if "scales exactly" in reason else ""
    return f"{wider}choose --quantize int4 or int8, which round the base's floats to integers of ONNX Runtime's own"


def linear_weights(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """The weights of linear modules, by path: `(in_features, out_features)`."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            found[f"{name}.weight"] = (module.weight.shape[1], module.weight.shape[0])
        elif is_conv1d(module):
            found[f"{name}.weight"] = tuple(module.weight.shape)
    return found


def planned_sizes(plan: Plan, resolved: Resolved, choice: SiteChoice) -> dict[str, int]:
    """Bytes of the weights that would be quantized, by path; empty without quantization."""
    how, item = plan.request.quantization, 4 if plan.dtype == "float32" else 2
    if how is None:
        return {}
    linear = linear_weights(resolved.model)
    grids = {path: resolved.parameters.grid_of(path) for path in linear if path not in choice.parameters}
    return {path: how.on(grid).n_bytes(*linear[path], item) for path, grid in grids.items() if grid is not None}


def quantize_graphs(
    models: Mapping[str, ir.Model], plan: Plan, resolved: Resolved, *, remark: Remark
) -> Quantization | None:
    """Let `models` (changed in place) read integers, and say what was done; None where nothing is quantized.

    Raises:
        InputRefused: No weight of the graphs is a linear map's.
    """
    parameters = resolved.parameters
    how = parameters.quantization
    if plan.given_graph is not None:
        return _as_given(models[SINGLE])
    if how is None:
        return None
    if plan.task is Task.TEXT_GENERATION and plan.request.provider == "cpu":  # for CUDA they are packed already
        for model in models.values():
            pack_siblings(model, lambda recipe: parameters.may_pack(recipe.parameters))
    found = (path for model in models.values() for path in quantize_weights(model, how, parameters.grid_of))
    weights = dict.fromkeys(found)
    if not weights:
        raise InputRefused(
            f"The graph has no linear map to quantize to {how.name}",
            where=str(plan.checkpoint.path),
            next_step="export it without --quantize, or keep fewer modules",
        )
    if plan.request.mode == "merge" and plan.folders:
        remark(f"adapters are folded into the floats first; the sums are quantized to {how.name} after")
    if how.has_float_zeros and plan.request.provider == "cpu":
        remark("hqq's zeros are floats, for which ONNX Runtime has no fast kernel on a CPU: slower there than floats")
    for sentence in (*_left(models, how, parameters, weights=weights), *_left_by_reason(parameters, weights)):
        remark(sentence)
    is_own = how.method is Method.AS_STORED
    quantizer = plan.checkpoint.quantization if is_own else f"onnxruntime {_onnxruntime_version()}"
    return replace(how, weights=tuple(weights), quantizer=quantizer)


def _as_given(model: ir.Model) -> Quantization | None:
    """How another tool quantized most of its products in `model`; None where they are floats."""
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits"]
    if not nodes:
        return None
    sizes = [
        (node.attributes.get_int("bits", 4), node.attributes.get_int("block_size"),
         len(node.inputs) < 4 or node.inputs[3] is None, node.attributes.get_int("accuracy_level", 0))
        for node in nodes
    ]  # fmt: skip
    weights = dict.fromkeys(path for node in nodes for path in node.inputs[1].name.rpartition("_Q")[0].split("+"))
    quantizer = " ".join(filter(None, (model.producer_name, model.producer_version)))
    most = max(sizes, key=sizes.count)
    return Quantization(*most, method=Method.GIVEN, weights=tuple(weights), quantizer=quantizer or "unknown")


def _left(
    models: Mapping[str, ir.Model],
    how: Quantization,
    parameters: Parameters,
    *,
    weights: Collection[str],
) -> list[str]:
    """What stays in floats, if it is worth a word."""
    aliases, own = parameters.aliases, parameters.own
    floats: dict[str, int] = {}
    total = 0
    for model in models.values():
        for value, recipe in unbound(model.graph):
            n = math.prod(dim for dim in value.shape if isinstance(dim, int)) * value.dtype.itemsize
            total += n
            if recipe.quantized is None and own.reasons.keys().isdisjoint(recipe.parameters):
                # A tensor that is quantized as a head's and looked up in goes by its other name.
                names = [next((p for p in aliases.get(q, ()) if p not in weights), q) for q in recipe.parameters]
                floats["+".join(names)] = int(n)
    left = {name: n for name, n in sorted(floats.items(), key=lambda item: -item[1]) if n > _WORTH_A_WORD * total}
    if not left:
        return []
    shown = some_of([f"{name} ({n / 1e6:,.1f} MB)" for name, n in left.items()], 4)
    if how.method is Method.AS_STORED:
        return [f"in floats, as they are no integers of a linear map in the base, or were to be kept: {shown}"]
    return [f"not quantized to {how.name}, as they are no linear maps or were to be kept: {shown}"]


def _left_by_reason(parameters: Parameters, weights: Collection[str]) -> list[str]:
    """What the base stores as integers and the graph has in floats, by reason."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in parameters.own.reasons.items():
        if path not in weights and not parameters.quantization.keeps(path):
            by_reason.setdefault(reason, []).append(path)
    return [
        f"in floats, though the base stores integers: {some_of(paths, 2)}: {reason}"
        for reason, paths in by_reason.items()
    ]


def _onnxruntime_version() -> str:
    import onnxruntime

    return onnxruntime.__version__
