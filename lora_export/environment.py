"""Where a result was obtained."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import sys
from pathlib import Path

import onnxruntime as ort

from lora_export.artifact import Manifest, versions
from lora_export.contract import graph_file
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


# Of the weights' bytes: the export's session (1 ×), one that shows what is inside (1 ×, and once more while it packs
# them), the reference at its dtype (1 ×), and that at a wider one (2 ×, but at float32 both have the same weights).
_MEMORY, _MEMORY_OF_A_PRECISE_REFERENCE = 4, 2


def memory_of_references(manifest: Manifest, folder: Path, *, precisely: bool) -> int:
    """Bytes that a check's session and references need, `precisely` with one at a wider dtype."""
    shares_weights = manifest.dtype == "float32" and manifest.quantization is None
    copies = _MEMORY_OF_A_PRECISE_REFERENCE if precisely and not shares_weights else 0
    return manifest.weights_bytes(folder) * (_MEMORY + copies)


def lack_of_memory(manifest: Manifest, folder: Path) -> str | None:
    """Why the reference cannot also run at a wider dtype, a sentence; None if the memory suffices or is unknown."""
    needed, free = memory_of_references(manifest, folder, precisely=True), available_memory()
    if free is None or needed <= free:
        return None
    return (
        f"Rounding: PyTorch at a wider dtype beside the rest needs about {needed / 1e9:.1f} GB, "
        f"{free / 1e9:.1f} GB are free, so errors are not judged by what PyTorch itself loses at this dtype."
    )


def give_back_memory() -> None:
    """Let the C library return what it has freed to the system, where it is glibc: large arrays leave holes behind."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def available_memory() -> int | None:
    """Bytes that new processes can have without swapping; None where the kernel does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


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
