"""Strict JSON, and files that appear whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lora_export.bench.results import BenchReport
from lora_export.check.results import CheckReport
from lora_export.report import write
from lora_export.report.as_json import file_name, render_json
from lora_export.report.write import write_reports


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def _parsed(report: CheckReport | BenchReport) -> dict:
    return json.loads(render_json(report), parse_constant=_no_constant)


def test_check_values_survive(failing_check: CheckReport, hostile: str) -> None:
    found = _parsed(failing_check)
    assert (found["report"], found["verdict"], found["schema"]) == ("check", "fail", 2)
    by_name = {case["name"]: case for case in found["cases"]}
    assert by_name["topic"]["largest_error"] == 1.5e-06
    topic = {entry["name"]: entry for entry in by_name["topic"]["measures"]}
    assert topic["rounding"] == {"name": "rounding", "value": 1.18, "limit": 2.0, "failed": False}
    assert {entry["name"]: entry["value"] for entry in by_name[hostile]["measures"]}["effect"] is None  # infinite
    assert by_name["half precision"]["largest_error"] is None  # NaN
    assert (found["partial"], found["stopped"]) == (False, None)
    assert by_name["half precision"]["passed"] is False


def test_bench_keeps_every_sample(gated_bench: BenchReport, ungated_bench: BenchReport, hostile: str) -> None:
    found = _parsed(gated_bench)
    assert len(found["workloads"][0]["variants"][0]["samples_ms"]) == 300
    assert found["workloads"][1]["name"] == "1 × 1 on 512 tokens"
    assert {entry["variant"]: entry["peak_mb"] for entry in found["memory"]}[hostile] is None
    assert [len(swap["samples_us"]) for swap in found["swaps"]] == [3, 3]
    assert found["placements"][1]["operators"] == {"Shape": 3}
    assert _parsed(ungated_bench)["swaps"] == [] and found["against"] is None


def test_text_is_stable_and_readable(passing_check: CheckReport) -> None:
    text = render_json(passing_check)
    keys = [line.split('"')[1] for line in text.splitlines() if line.startswith('  "')]
    assert keys == sorted(keys)
    assert "topic → kind" in text and text.endswith("}\n")


def test_undecodable_name_is_written(passing_check: CheckReport, tmp_path: Path) -> None:
    named = replace(passing_check, subject=replace(passing_check.subject, folder="out/\udc80"))
    paths = write_reports(named, tmp_path)
    assert json.loads(paths["json"].read_text("utf-8"))["subject"]["folder"] == "out/?"


def test_file_names(passing_check: CheckReport, gated_bench: BenchReport, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "reports"
    assert write_reports(passing_check, folder) == {
        s: folder / f"check.{s}" for s in ("html", "md", "junit.xml", "json")
    }
    assert write_reports(gated_bench, folder)["html"] == folder / file_name(gated_bench, "html")
    assert sorted(path.name for path in folder.iterdir()) == [
        "bench.html", "bench.json", "bench.junit.xml", "bench.md",
        "check.html", "check.json", "check.junit.xml", "check.md",
    ]  # fmt: skip


def test_written_again_replaces(passing_check: CheckReport, failing_check: CheckReport, tmp_path: Path) -> None:
    write_reports(failing_check, tmp_path)
    paths = write_reports(passing_check, tmp_path)
    assert json.loads(paths["json"].read_text("utf-8"))["verdict"] == "pass"


def test_report_that_cannot_be_rendered_leaves_the_folder(
    passing_check: CheckReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: CheckReport) -> str:
        raise ValueError("cannot be rendered")

    before = write_reports(passing_check, tmp_path)["html"].read_bytes()
    monkeypatch.setattr(write, "render_json", broken)
    with pytest.raises(ValueError, match="cannot be rendered"):
        write_reports(passing_check, tmp_path)
    assert (tmp_path / "check.html").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 4


def test_failed_write_leaves_no_temporary(
    passing_check: CheckReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, target: Path) -> None:
        raise PermissionError(str(target))

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(PermissionError):
        write_reports(passing_check, tmp_path)
    assert list(tmp_path.iterdir()) == []
