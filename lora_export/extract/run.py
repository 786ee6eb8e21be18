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
from functools import partial
from pathlib import Path

from lora_export.adapters.peft_writer import WEIGHTS
from lora_export.artifact import REPORTS, sha256_of, versions
from lora_export.base.checkpoint import Checkpoint, locate
from lora_export.base.stored import source_files
from lora_export.base.tasks import CLASSIFICATION, peft_task_type, resolve_task
from lora_export.carried import carried_files
from lora_export.errors import some_of
from lora_export.export.plan import local_path
from lora_export.extract.differences import Checkpoints, Difference, DifferenceKind, find_differences, open_checkpoints
from lora_export.extract.pairs import write_pairs, write_wholes
from lora_export.extract.peft_folder import TensorFile, prove_loads, write_config
from lora_export.extract.placement import Placement, kinds_only_merged, place
from lora_export.extract.results import ExtractReport, LeftOut
from lora_export.extract.svd import RankChoice, frobenius
from lora_export.progress import Progress
from lora_export.staging import refuse_existing, staging

# What tells an extracted adapter from anything else, so that `overwrite` replaces nothing but one.
MARKER = f"{REPORTS}/extract.json"


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
    checkpoints: Checkpoints
    differences: list[Difference]
    placement: Placement

    @property
    def biases(self) -> set[str]:
        return {difference.path for difference in self.differences if difference.kind is DifferenceKind.BIAS}


def _find(request: ExtractRequest, progress: Progress) -> _Found:
    base = Checkpoint.open(locate(request.base, kind="base"))
    tuned = Checkpoint.open(locate(request.tuned, kind="fine-tune"))
    task = resolve_task(request.task, tuned.config, {}, where=str(tuned.path))
    checkpoints = open_checkpoints(base, tuned, task)
    total, done = sum(tensor.numel() for tensor in checkpoints.model.state_dict().values()), 0

    def count(path: str, n_elements: int) -> None:
        nonlocal done
        done += n_elements
        progress("comparing tensors", done, total)

    differences = find_differences(checkpoints, count)
    return _Found(checkpoints, differences, place(checkpoints, differences, request.leave_out))


def describe_extraction(request: ExtractRequest, out: Path, progress: Progress = silent) -> dict:
    """What `extract` would write, without decomposing or writing anything.

    Raises:
        LoraExportError: What `extract` itself would raise before it writes.
    """
    found = _find(request, progress)
    full = request.choice.rank or math.inf
    return {
        "folder": str(out),
        "task": found.checkpoints.task,
        "n_equal": len(found.checkpoints.model.state_dict()) - len(found.differences),
        "pairs": {plan.module: int(min(full, *plan.shape)) for plan in found.placement.pairs},
        "wholes": found.placement.wholes,
        "biases": found.placement.has_bias,
        "left_out": [difference.path for difference in found.placement.left_out],
        "notes": _notes(found),
        "bytes": _bytes_needed(found, request.choice),
    }


def run_extract(
    request: ExtractRequest,
    out: Path,
    write_reports: Callable[[ExtractReport, Path], dict[str, Path]],
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> tuple[ExtractReport, dict[str, Path]]:
    """Extract the adapter to folder `out`; the report, and the files it was written to.

    Args:
        write_reports: Writes the report into a folder and returns the files by suffix; they appear with the adapter.

    Raises:
        LoraExportError: Refused or failed; nothing is left behind.
    """
    started, start = datetime.datetime.now(datetime.UTC), time.monotonic()
    refuse_existing(out, overwrite=overwrite, marker=MARKER)
    found = _find(request, progress)
    checkpoints, placement = found.checkpoints, found.placement
    n_bytes = _bytes_needed(found, request.choice)
    with (
        ThreadPoolExecutor(max_workers=1) as hashing,
        staging(out, overwrite=overwrite, n_bytes=n_bytes, marker=MARKER) as folder,
    ):
        hashed = hashing.submit(lambda: {"base": _hashes(checkpoints.base), "fine-tune": _hashes(checkpoints.tuned)})
        file = TensorFile(folder / WEIGHTS)
        meter = partial(progress, "decomposing differences")
        results = write_pairs(
            checkpoints, placement, found.biases, choice=request.choice, file=file, progress=meter, exact=request.exact
        )
        wholes = write_wholes(checkpoints, placement, file)
        file.close()
        ranks = {plan.module: results[plan.module].rank if plan.weight else 1 for plan in placement.pairs}
        modules = [name for name, _ in checkpoints.model.named_modules()]
        write_config(
            folder,
            placement,
            ranks,
            modules=modules,
            base=local_path(checkpoints.base.located.given),
            task_type=peft_task_type(checkpoints.task),
        )
        _carry(checkpoints, folder)
        report = ExtractReport(
            folder=str(out),
            asked=f"rank {request.choice.rank}" if request.choice.rank else f"energy {request.choice.energy:g}",
            sha256=hashed.result(),
            modules=tuple(results.values()),
            wholes=wholes,
            n_parameters=sum(map(math.prod, file.shapes.values())),
            n_bytes=(folder / WEIGHTS).stat().st_size,
            started_at=started.isoformat(timespec="seconds"),
            seconds=time.monotonic() - start,
            **_facts(found),
        )
        progress("loading it with PEFT", 0, 1)
        prove_loads(folder, checkpoints.model, file.shapes)
        written = write_reports(report, folder / REPORTS)
    return report, {suffix: out / REPORTS / path.name for suffix, path in written.items()}


def _facts(found: _Found) -> dict[str, object]:
    """What a report says of the two checkpoints, however they were decomposed."""
    checkpoints, placement = found.checkpoints, found.placement
    tensors = checkpoints.tuned.files.tensors
    n_tensors = len(checkpoints.model.state_dict())
    return {
        "task": checkpoints.task,
        "base": local_path(checkpoints.base.located.given),
        "tuned": local_path(checkpoints.tuned.located.given),
        "left_out": tuple(_left_out(checkpoints, difference) for difference in placement.left_out),
        "notes": _notes(found),
        "biases": placement.has_bias,
        "n_equal": n_tensors - len(found.differences),
        "n_tensors": n_tensors,
        "n_parameters_tuned": sum(math.prod(info.shape) for info in tensors.values()),
        "n_bytes_tuned": sum(path.stat().st_size for path in {info.file for info in tensors.values()}),
        "versions": versions(),
    }


def _left_out(checkpoints: Checkpoints, difference: Difference) -> LeftOut:
    norm = frobenius(checkpoints.read_base(difference.path).float().reshape(1, -1))
    change = frobenius(checkpoints.delta(difference.path).reshape(1, -1))
    return LeftOut(difference.path, difference.kind, change / norm if norm else None)


def _notes(found: _Found) -> tuple[str, ...]:
    checkpoints, notes = found.checkpoints, []
    if kinds := kinds_only_merged(checkpoints, found.placement):
        notes.append(
            "A dynamic graph has no inputs for whole modules that are not Linear, so `merge` takes this adapter and "
            f"`dynamic` refuses it; `dynamic` takes it without them: {' '.join(f'--leave-out {k}' for k in kinds)}."
        )
    if unused := checkpoints.unused():
        notes.append(f"Not part of the fine-tune's model, so not looked at: {some_of(unused, 6)}.")
    base, tuned = checkpoints.base.dtype, checkpoints.tuned.dtype
    if base != tuned:
        notes.append(
            f"The base is stored in {base} and the fine-tune in {tuned}: what the narrower one cannot hold is no "
            "difference."
        )
    return tuple(notes)


def _bytes_needed(found: _Found, choice: RankChoice) -> int:
    """Bytes of the adapter; with an energy, whose ranks are not known yet, of its whole modules only."""
    state = found.checkpoints.model.state_dict()
    wholes = tuple(f"{module}." for module in found.placement.wholes)
    n_elements = sum(tensor.numel() for path, tensor in state.items() if path.startswith(wholes))
    if choice.rank:
        n_elements += sum(min(choice.rank, *plan.shape) * sum(plan.shape) for plan in found.placement.pairs)
    return 4 * n_elements


def _hashes(checkpoint: Checkpoint) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in source_files(checkpoint.path)}


def _carry(checkpoints: Checkpoints, folder: Path) -> None:
    """The fine-tune's tokenizer and licences; for a classifier its config too, which names the labels."""
    for path in carried_files(checkpoints.tuned.path):
        shutil.copyfile(path, folder / path.name)
    if checkpoints.task in CLASSIFICATION:
        shutil.copyfile(checkpoints.tuned.path / "config.json", folder / "config.json")
