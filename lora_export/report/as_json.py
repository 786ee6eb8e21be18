"""The report for programs, and what its files are called."""

from __future__ import annotations

import json
import math

from lora_export.verify.results import BenchReport, CheckReport

Report = CheckReport | BenchReport


def file_name(report: Report, suffix: str) -> str:
    """`check` or `bench` with a suffix such as "json"."""
    return f"{'check' if isinstance(report, CheckReport) else 'bench'}.{suffix}"


def render_json(report: Report) -> str:
    """Strict JSON with sorted keys; numbers that JSON lacks (NaN, infinities) become null."""
    return json.dumps(_strict(report.to_dict()), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _strict(value: object) -> object:
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
