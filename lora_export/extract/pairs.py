"""The decomposition of one difference after another, each written as it is made."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection
from dataclasses import replace

import torch

from lora_export.adapters.peft_writer import PREFIX
from lora_export.extract.differences import Checkpoints, DifferenceKind
from lora_export.extract.peft_folder import TensorFile, pair_tensors
from lora_export.extract.placement import PairPlan, Placement
from lora_export.extract.results import ModuleResult, WholeResult
from lora_export.extract.svd import RankChoice, Spectrum, decompose, remaining_error

_Factored = tuple[ModuleResult, torch.Tensor, torch.Tensor]


def write_pairs(
    checkpoints: Checkpoints,
    placement: Placement,
    biases: Collection[str],
    *,
    choice: RankChoice,
    file: TensorFile,
    progress: Callable[[int, int], None],
    exact: bool,
) -> dict[str, ModuleResult]:
    """Decompose and write every pair of `placement`; results of those whose weight differs, by module.

    Args:
        biases: Paths of the biases that differ.
        progress: Called before each pair with the elements of the weights that are done, and of all.
        exact: As `decompose` takes it.
    """
    results: dict[str, ModuleResult] = {}
    tied: dict[str, _Factored] = {}
    sizes = [0 if plan.weight is None else math.prod(plan.shape) for plan in placement.pairs]
    for plan, done in zip(placement.pairs, itertools.accumulate(sizes, initial=0), strict=False):
        progress(done, sum(sizes))
        if plan.weight is None:
            a, b = torch.zeros(1, plan.shape[1]), torch.zeros(plan.shape[0], 1)
        else:
            factored = tied.get(plan.weight) or _factor(checkpoints, plan, choice, exact=exact)
            tied |= {alias: factored for alias in checkpoints.aliases[plan.weight] if alias != plan.weight}
            result, a, b = factored
            kind = DifferenceKind.EMBEDDING if plan.is_embedding else DifferenceKind.LINEAR
            results[plan.module] = replace(result, module=plan.module, kind=kind)
        bias = _bias_delta(checkpoints, plan, biases) if placement.has_bias else None
        for name, tensor in pair_tensors(plan, a, b, bias=bias).items():
            file.add(name, tensor)
    return results


def _factor(checkpoints: Checkpoints, plan: PairPlan, choice: RankChoice, *, exact: bool) -> _Factored:
    delta = checkpoints.delta(plan.weight)
    spectrum, rank = decompose(delta, choice, exact=exact)
    a, b = spectrum.factors(rank)
    error = remaining_error(delta, a, b) / spectrum.norm
    curve = _known_curve(delta, spectrum)
    shape = tuple(delta.shape)
    result = ModuleResult(
        plan.module, DifferenceKind.LINEAR, shape, rank, min(shape), spectrum.norm, error, curve, spectrum.complete
    )
    return result, a, b


def _known_curve(delta: torch.Tensor, spectrum: Spectrum) -> tuple[float, ...]:
    """The curve to four digits, where all of it is known not below the rounding, which full rank's factors measure."""
    curve = spectrum.curve()
    if spectrum.complete:
        rounding = remaining_error(delta, *spectrum.factors(len(curve) - 1)) / spectrum.norm
        curve = tuple(max(error, rounding) for error in curve)
    return tuple(float(f"{error:.4g}") for error in curve)


def _bias_delta(checkpoints: Checkpoints, plan: PairPlan, biases: Collection[str]) -> torch.Tensor:
    path = f"{plan.module}.bias"
    return (
        checkpoints.delta(path) if path in biases else torch.zeros(plan.shape[1] if plan.transposed else plan.shape[0])
    )


def write_wholes(checkpoints: Checkpoints, placement: Placement, file: TensorFile) -> tuple[WholeResult, ...]:
    """Write the fine-tune's own tensors of the modules that are saved whole."""
    results = []
    for module, why in sorted(placement.wholes.items()):
        paths = [f"{module}.{name}" for name in checkpoints.model.get_submodule(module).state_dict()]
        for path in paths:
            file.add(f"{PREFIX}{path}", checkpoints.read_tuned(path))
        n_elements = sum(math.prod(file.shapes[f"{PREFIX}{path}"]) for path in paths)
        results.append(WholeResult(module, why, n_elements))
    return tuple(results)
