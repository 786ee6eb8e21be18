"""What the machine is said to be, and what it lacks."""

from __future__ import annotations

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
