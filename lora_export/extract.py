"""The main path of `extract`: the difference between a full fine-tune and its base, as a PEFT adapter.

base, fine-tune ─► differences (one tensor at a time) ─► placement (pairs, whole modules, refusals)
                ─► one decomposition after another, written as it is made ─► PEFT loads it ─► the folder appears
"""

from __future__ import annotations

import datetime
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_export.adapters.peft_writer import PREFIX, WEIGHTS
from lora_export.artifact import REPORTS, carried_files, sha256_of, versions
from lora_export.base.checkpoint import Checkpoint, locate
from lora_export.base.stored import weight_files
from lora_export.base.tasks import CLASSIFICATION, peft_task_type, resolve_task
from lora_export.extraction.differences import Difference, Kind, Pair, find_differences, open_pair
from lora_export.extraction.peft_folder import TensorFile, pair_tensors, prove_loads, write_config
from lora_export.extraction.placement import PairPlan, Placement, place
from lora_export.extraction.results import ExtractReport, LeftOut, ModuleResult, WholeResult
from lora_export.extraction.svd import RankChoice, Spectrum, decompose, frobenius, remaining_error
from lora_export.plan import local_path
from lora_export.report.extract_html import write_extract_reports
from lora_export.staging import refuse_existing, staging

# What tells an extracted adapter from anything else, so that `overwrite` replaces nothing but one.
MARKER = f"{REPORTS}/extract.json"
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """The default progress: none."""


@dataclass(frozen=True)
class ExtractRequest:
    """What the user asked for.

    Attributes:
        base, tuned: Folders or hub ids.
        leave_out: Kinds of parameters (`placement.LEAVABLE`) that stay the base's where they differ.
        exact: All singular values of every module, however large.
    """

    base: str
    tuned: str
    choice: RankChoice
    task: str | None = None
    leave_out: frozenset[str] = frozenset()
    exact: bool = False


@dataclass(frozen=True)
class _Found:
    pair: Pair
    differences: list[Difference]
    placement: Placement


def _find(request: ExtractRequest, progress: Progress) -> _Found:
    base = Checkpoint.open(locate(request.base, kind="base"))
    tuned = Checkpoint.open(locate(request.tuned, kind="fine-tune"))
    task = resolve_task(request.task, tuned.config, {}, str(tuned.path))
    pair = open_pair(base, tuned, task)
    total, done = len(pair.model.state_dict()), 0

    def count(path: str, n_bytes: int) -> None:
        nonlocal done
        done += 1
        progress("comparing tensors", done, total)

    differences = find_differences(pair, count)
    return _Found(pair, differences, place(pair, differences, request.leave_out))


def describe_extraction(request: ExtractRequest, out: Path, progress: Progress = silent) -> dict:
    """What `extract` would write, without decomposing or writing anything.

    Raises:
        LoraExportError: What `extract` itself would raise before it writes.
    """
    found = _find(request, progress)
    full = request.choice.rank or math.inf
    return {
        "folder": str(out),
        "task": found.pair.task,
        "n_equal": len(found.pair.model.state_dict()) - len(found.differences),
        "pairs": {plan.module: int(min(full, *plan.shape)) for plan in found.placement.pairs},
        "wholes": found.placement.wholes,
        "biases": found.placement.has_bias,
        "left_out": [difference.path for difference in found.placement.left_out],
        "notes": _notes(found.pair),
        "bytes": _bytes_needed(found, request.choice),
    }


def extract(
    request: ExtractRequest, out: Path, *, overwrite: bool = False, progress: Progress = silent
) -> tuple[ExtractReport, dict[str, Path]]:
    """Extract the adapter to folder `out`; the report, and the files it was written to.

    Raises:
        LoraExportError: Refused or failed; nothing is left behind.
    """
    started, start = datetime.datetime.now(datetime.UTC), time.monotonic()
    refuse_existing(out, overwrite=overwrite, marker=MARKER)
    found = _find(request, progress)
    pair, placement = found.pair, found.placement
    with (
        ThreadPoolExecutor(max_workers=1) as hashing,
        staging(out, overwrite=overwrite, n_bytes=_bytes_needed(found, request.choice), marker=MARKER) as folder,
    ):
        hashed = hashing.submit(lambda: {"base": _hashes(pair.base), "fine-tune": _hashes(pair.tuned)})
        file = TensorFile(folder / WEIGHTS)
        results = _write_pairs(found, request, file, progress)
        wholes = _write_wholes(found, file)
        file.close()
        ranks = {plan.module: results[plan.module].rank if plan.weight else 1 for plan in placement.pairs}
        modules = [name for name, _ in pair.model.named_modules()]
        base = local_path(pair.base.located.given)
        write_config(folder, placement, ranks, modules, base, peft_task_type(pair.task))
        _carry(pair, folder)
        report = ExtractReport(
            folder=str(out),
            asked=f"rank {request.choice.rank}" if request.choice.rank else f"energy {request.choice.energy:g}",
            task=pair.task,
            base=base,
            tuned=local_path(pair.tuned.located.given),
            sha256=hashed.result(),
            modules=tuple(results.values()),
            wholes=wholes,
            left_out=tuple(_left_out(pair, difference) for difference in placement.left_out),
            notes=_notes(pair),
            biases=placement.has_bias,
            n_equal=len(pair.model.state_dict()) - len(found.differences),
            n_tensors=len(pair.model.state_dict()),
            n_parameters=sum(map(math.prod, file.shapes.values())),
            n_parameters_tuned=sum(math.prod(info.shape) for info in pair.tuned.files.tensors.values()),
            n_bytes=(folder / WEIGHTS).stat().st_size,
            n_bytes_tuned=sum(path.stat().st_size for path in weight_files(pair.tuned.path)),
            versions=versions(),
            started_at=started.isoformat(timespec="seconds"),
            seconds=time.monotonic() - start,
        )
        progress("loading it with PEFT", 0, 1)
        prove_loads(folder, pair.model, file.shapes)
        written = write_extract_reports(report, folder / REPORTS)
    return report, {suffix: out / REPORTS / path.name for suffix, path in written.items()}


def _write_pairs(
    found: _Found, request: ExtractRequest, file: TensorFile, progress: Progress
) -> dict[str, ModuleResult]:
    """Decompose and write one pair after another; results of those with a weight that differs, by module."""
    results: dict[str, ModuleResult] = {}
    tied: tuple[tuple[str, ...], ModuleResult, tuple[torch.Tensor, torch.Tensor]] | None = None
    for done, plan in enumerate(found.placement.pairs):
        progress("decomposing differences", done, len(found.placement.pairs))
        bias = _bias_delta(found, plan) if found.placement.has_bias else None
        if plan.weight is None:
            a, b = torch.zeros(1, plan.shape[1]), torch.zeros(plan.shape[0], 1)
        elif tied and plan.weight in tied[0]:
            a, b = tied[2]
            results[plan.module] = _result(plan, tied[1])
        else:
            result, a, b = _factor(found.pair, plan, request)
            results[plan.module] = result
            aliases = found.pair.aliases.get(plan.weight, ())
            tied = (aliases, result, (a, b)) if len(aliases) > 1 else tied
        for name, tensor in pair_tensors(plan, a, b, bias).items():
            file.add(name, tensor)
    return results


def _factor(pair: Pair, plan: PairPlan, request: ExtractRequest) -> tuple[ModuleResult, torch.Tensor, torch.Tensor]:
    delta = pair.delta(plan.weight)
    spectrum, rank = decompose(delta, request.choice, exact=request.exact)
    a, b = spectrum.factors(rank)
    error = remaining_error(delta, a, b) / spectrum.norm
    kind = Kind.EMBEDDING if plan.is_embedding else Kind.LINEAR
    curve = _known_curve(delta, spectrum)
    result = ModuleResult(
        plan.module, kind, plan.shape, rank, min(plan.shape), spectrum.norm, error, curve, spectrum.complete
    )
    return result, a, b


def _known_curve(delta: torch.Tensor, spectrum: Spectrum) -> tuple[float, ...]:
    """The curve to four digits, where all of it is known not below the rounding, which full rank's factors measure."""
    curve = spectrum.curve()
    if spectrum.complete:
        rounding = remaining_error(delta, *spectrum.factors(len(curve) - 1)) / spectrum.norm
        curve = tuple(max(error, rounding) for error in curve)
    return tuple(float(f"{error:.4g}") for error in curve)


def _result(plan: PairPlan, of: ModuleResult) -> ModuleResult:
    kind = Kind.EMBEDDING if plan.is_embedding else Kind.LINEAR
    return ModuleResult(plan.module, kind, plan.shape, of.rank, of.full_rank, of.norm, of.error, of.curve, of.complete)


def _bias_delta(found: _Found, plan: PairPlan) -> torch.Tensor:
    path = f"{plan.module}.bias"
    if any(d.path == path for d in found.differences):
        return found.pair.delta(path)
    return torch.zeros(plan.shape[1] if plan.transposed else plan.shape[0])


def _write_wholes(found: _Found, file: TensorFile) -> tuple[WholeResult, ...]:
    pair, results = found.pair, []
    for module, why in sorted(found.placement.wholes.items()):
        paths = [f"{module}.{name}" for name in pair.model.get_submodule(module).state_dict()]
        for path in paths:
            file.add(f"{PREFIX}{path}", pair.read_tuned(path))
        n_elements = sum(math.prod(file.shapes[f"{PREFIX}{path}"]) for path in paths)
        results.append(WholeResult(module, why, n_elements))
    return tuple(results)


def _left_out(pair: Pair, difference: Difference) -> LeftOut:
    norm = frobenius(pair.read_base(difference.path).float().reshape(1, -1))
    change = frobenius(pair.delta(difference.path).reshape(1, -1))
    return LeftOut(difference.path, difference.kind, change / norm if norm else None)


def _notes(pair: Pair) -> tuple[str, ...]:
    notes = []
    if unused := pair.unused():
        names = ", ".join(unused[:6]) + (f" and {len(unused) - 6} more" if len(unused) > 6 else "")
        notes.append(f"Not part of the fine-tune's model, so not looked at: {names}.")
    if pair.base.dtype != pair.tuned.dtype:
        notes.append(
            f"The base is stored in {pair.base.dtype} and the fine-tune in {pair.tuned.dtype}: what the narrower one "
            "cannot hold is no difference."
        )
    return tuple(notes)


def _bytes_needed(found: _Found, choice: RankChoice) -> int:
    """Bytes of the adapter; with an energy, whose ranks are not known yet, of its whole modules only."""
    state = found.pair.model.state_dict()
    wholes = tuple(f"{module}." for module in found.placement.wholes)
    n_elements = sum(tensor.numel() for path, tensor in state.items() if path.startswith(wholes))
    if choice.rank:
        n_elements += sum(min(choice.rank, *plan.shape) * sum(plan.shape) for plan in found.placement.pairs)
    return 4 * n_elements


def _hashes(checkpoint: Checkpoint) -> dict[str, str]:
    files = [checkpoint.path / "config.json", *weight_files(checkpoint.path)]
    return {path.name: sha256_of(path) for path in files}


def _carry(pair: Pair, folder: Path) -> None:
    """The fine-tune's tokenizer and licences; for a classifier its config too, which names the labels."""
    for path in carried_files(pair.tuned.path):
        shutil.copyfile(path, folder / path.name)
    if pair.task in CLASSIFICATION:
        shutil.copyfile(pair.tuned.path / "config.json", folder / "config.json")
