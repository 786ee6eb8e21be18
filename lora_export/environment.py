"""Where a result was obtained."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from lora_export.artifact import ExportKind, Manifest, versions
from lora_export.contract import SINGLE, graph_file
from lora_export.runtime.session import device_name
from lora_export.verdict import Environment, Subject


def environment(provider: str, reason: str, settings: dict[str, str]) -> Environment:
    """This machine, now."""
    return Environment(
        provider=provider,
        provider_reason=reason,
        device=device_name(provider),
        cpu=_cpu_name(),
        n_cores=n_cores(),
        python=platform.python_version(),
        platform=platform.platform(),
        versions=versions() | {"onnxruntime": ort.__version__},
        settings={"use_tf32": "0"} | settings if provider == "cuda" else settings,
        started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


# Of the weights' bytes. A session takes them once; while it packs them, twice. The reference takes them once at its
# dtype, and twice more at a wider one: at float32 both have the same weights, but for T5, an encoder-decoder, which
# casts to the dtype of its weights. PEFT's merges are summed up beside the base and one of them.
_SESSION, _REFERENCE, _WIDER, _SUM = 2, 1, 2, 4
# Beside all of that, where it is there at once: another session, and one that shows what is inside.
_OTHERS = 1
# Of a larger export's sides one is in memory at a time.
_LARGE_BYTES = 1e8
# The number of glibc's option, in malloc.h.
_M_MMAP_THRESHOLD = -3


def is_large(manifest: Manifest, folder: Path) -> bool:
    """Whether a check of an export keeps one of its sides in memory at a time."""
    return manifest.weights_bytes(folder) >= _LARGE_BYTES


def memory_of_references(manifest: Manifest, folder: Path, *, precisely: bool) -> int:
    """Bytes that a check's session and references need, `precisely` with one at a wider dtype."""
    shares_weights = manifest.dtype == "float32" and manifest.quantization is None and SINGLE in manifest.graphs
    reference = _REFERENCE + (_WIDER if precisely and not shares_weights else 0)
    if manifest.kind is ExportKind.MERGED and len(manifest.adapters) > 1:
        reference = max(reference, _SUM)
    copies = max(_SESSION, reference) if is_large(manifest, folder) else _SESSION + _OTHERS + reference
    return manifest.weights_bytes(folder) * copies


def lack_of_memory(manifest: Manifest, folder: Path) -> str | None:
    """Why the reference cannot also run at a wider dtype, a sentence; None if the memory suffices or is unknown."""
    needed, free = memory_of_references(manifest, folder, precisely=True), available_memory()
    if free is None or needed <= free:
        return None
    return (
        f"Rounding: PyTorch at a wider dtype beside the rest needs about {needed / 1e9:.1f} GB, "
        f"{free / 1e9:.1f} GB are free, so errors are not judged by what PyTorch itself loses at this dtype."
    )


def return_large_arrays() -> None:
    """Have the C library return each array of a megabyte or more to the system when it is freed, where it is glibc.

    By default glibc keeps arrays of up to 32 MB for later ones, once one of them was freed, and between those that are
    still in use they stay: an activation here and there keeps hundreds of megabytes.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if tune is not None:
        tune(_M_MMAP_THRESHOLD, 1 << 20)


def give_back_memory() -> None:
    """Let the C library return what it has freed to the system, where it is glibc: large arrays leave holes behind."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that new processes can have without swapping; None where the kernel does not say.

    Of a container it is what its own limit leaves, and the limits of the groups around it, if that is less.

    Args:
        proc, cgroups: Where the kernel tells of processes and of control groups.
    """
    try:
        lines = (proc / "meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    of_machine = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return min([*of_machine, *_left_in_groups(proc, cgroups)], default=None)


@dataclass(frozen=True)
class _MemoryFiles:
    """What a version of control groups calls them: https://docs.kernel.org/admin-guide/cgroup-v2.html and -v1/memory.

    Attributes:
        reclaimable: The line of `memory.stat` that has the pages of files which the kernel drops before it refuses.
    """

    limit: str
    used: str
    reclaimable: str


_OF_V1 = _MemoryFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_OF_V2 = _MemoryFiles("memory.max", "memory.current", "inactive_file")


def _left_in_groups(proc: Path, cgroups: Path) -> list[int]:
    """What each limit of a control group of this process, and of those around it, leaves."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, files = (cgroups / "memory", _OF_V1) if controllers else (cgroups, _OF_V2)
        group = root / path.lstrip("/")  # which a container may not see: then its own is the root
        found += [_left(folder, files) for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return [left for left in found if left is not None]


def _left(group: Path, files: _MemoryFiles) -> int | None:
    """What a group's limit leaves; None where it has none (`max`, which `isdigit` is not)."""
    try:
        limit, used = ((group / name).read_text(encoding="ascii").strip() for name in (files.limit, files.used))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    if not limit.isdigit() or not used.isdigit():
        return None
    stat = dict(line.split() for line in lines)
    return max(0, int(limit) - int(used) + int(stat.get(files.reclaimable, 0)))


def n_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def subject(folder: Path, manifest: Manifest) -> Subject:
    """The export under examination."""
    names = [name for name in manifest.files if name in manifest.graph_files or name.startswith("adapters/")]
    return Subject(
        folder=str(folder),
        kind=manifest.kind,
        task=manifest.task,
        dtype=manifest.dtype,
        base=manifest.base.given,
        fused_for=manifest.provider,
        adapters=tuple(record.name for record in manifest.adapters),
        graph_sha256=" ".join(manifest.files[graph_file(graph)] for graph in manifest.graphs),
        n_bytes={name: (folder / name).stat().st_size for name in names},
    )
