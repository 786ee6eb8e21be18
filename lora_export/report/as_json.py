"""The report for programs, its published schema, and what its files are called."""

from __future__ import annotations

import json
import math
from importlib.resources import files

from lora_export.bench.results import BenchReport
from lora_export.check.results import CheckReport

Report = CheckReport | BenchReport


def file_name(report: Report, suffix: str) -> str:
    """`check` or `bench` with a suffix such as "json"."""
    return f"{'check' if isinstance(report, CheckReport) else 'bench'}.{suffix}"


def json_value(report: Report) -> dict:
    """The report as `report_schema` describes it: numbers that JSON lacks (NaN, infinities) become null."""
    return _strict(report.to_dict())


def render_json(report: Report) -> str:
    """Strict JSON with sorted keys."""
    return json.dumps(json_value(report), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def report_schema() -> dict:
    """The JSON Schema (draft 2020-12) of `check.json` and `bench.json`; its `$id` ends with the reports' `schema`."""
    return json.loads(files("lora_export.report").joinpath("schema/report-2.schema.json").read_text("utf-8"))


def _strict(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        # A name of undecodable bytes holds lone surrogates, which UTF-8 cannot hold.
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_strict(str(key)): _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    return value
