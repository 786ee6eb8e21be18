"""What the machine is said to be, and what it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_export import environment
from lora_export.artifact import read_manifest
from lora_export.check import run
from lora_export.check.context import CheckOptions
from lora_export.environment import lack_of_memory
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import check


def test_too_little_memory_is_said_with_numbers(exports, monkeypatch):
    folder = exports["classifier-merged"]
    manifest = read_manifest(folder)
    monkeypatch.setattr(environment, "available_memory", lambda: 1_000)
    assert "PyTorch at a wider dtype beside the rest needs about 0.0 GB, 0.0 GB are free" in lack_of_memory(
        manifest, folder
    )
    for free in (10**15, None):
        monkeypatch.setattr(environment, "available_memory", lambda free=free: free)
        assert lack_of_memory(manifest, folder) is None


def test_without_the_memory_the_other_gates_still_judge(exports, own, monkeypatch):
    monkeypatch.setattr(run, "lack_of_memory", lambda manifest, folder: "Rounding: too little.")
    report, _ = check(own(exports["classifier-merged"]), SourceOverrides(), CheckOptions(provider="cpu"))
    assert report.verdict == "pass" and "Rounding: too little." in report.skipped
    assert all(case.rounding is None and case.measured("top1") is not None for case in report.cases)


def _kernel(folder: Path, groups: str, files: dict[str, str]) -> dict[str, Path]:
    """What a kernel with 8 GB free tells, with a process in `groups`."""
    files = {"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n", "proc/self/cgroup": groups, **files}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return {"proc": folder / "proc", "cgroups": folder / "cgroups"}


def _v2(group: str, limit: str, used: int = 100, files: int = 0) -> dict[str, str]:
    folder = f"cgroups/{group}".rstrip("/")
    stat = f"anon 5\nfile 9\ninactive_file {files}\n"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


def _v1(group: str, limit: int, used: int = 100, files: int = 0) -> dict[str, str]:
    folder = f"cgroups/memory/{group}".rstrip("/")
    stat = f"inactive_file 1\ntotal_inactive_file {files}\n"
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


_FREE, _V1_LINES = 8_000_000 * 1024, "9:name=systemd:/\n4:memory,hugetlb:/docker/abc\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, _FREE),
        ("0::/\n", _v2("", "max"), _FREE),
        ("0::/\n", _v2("", "1000"), 900),
        ("0::/\n", _v2("", "1000", used=700, files=200), 500),
        ("0::/\n", _v2("", "1000", used=1100), 0),
        ("0::/a/b\n", _v2("a/b", "max") | _v2("a", "1000"), 900),
        ("0::/a/b\n", _v2("a/b", "600") | _v2("a", "1000"), 500),
        ("0::/of/the/host\n", _v2("", "1000"), 900),
        (_V1_LINES, _v1("docker/abc", 1000, files=50), 950),
        (_V1_LINES, _v1("", 1000), 900),
        (_V1_LINES, _v1("docker/abc", 2**63 - 4096), _FREE),
        (_V1_LINES, _v1("docker/abc", 2**63 - 4096) | _v1("docker", 1000), 900),
    ],
    ids=[
        "no groups", "no limit", "a limit", "files that can go", "over it", "of the group around", "of both",
        "a container that does not see its group", "v1", "v1, not seen", "v1, no limit", "v1, around",
    ],
)  # fmt: skip
def test_a_containers_limit_is_what_is_free(groups, files, expected, tmp_path):
    assert environment.available_memory(**_kernel(tmp_path, groups, files)) == expected


def test_where_the_kernel_says_nothing(tmp_path):
    assert environment.available_memory(tmp_path / "proc", tmp_path / "cgroups") is None
