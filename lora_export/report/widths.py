"""Ratios of latencies whose interval is too wide to tell what a bench is asked for, and what narrows it."""

from __future__ import annotations

import math

from lora_export.bench.results import BenchReport, Ratio
from lora_export.report import format as fmt
from lora_export.verdict import Verdict

# Allowances lie 3 to 15 % above the base (ci/latency-budget.toml): an interval of a tenth holds most of them.
WIDE = 0.10


def is_wide(ratio: Ratio) -> bool:
    """Whether the ends of the interval lie more than a tenth of the median apart: 0.960 to 1.085 of 1.002 is 12.5 %."""
    return _width(ratio) > WIDE


def _width(ratio: Ratio) -> float:
    return (ratio.high - ratio.low) / ratio.median


def wide_sentence(report: BenchReport) -> str:
    """How many ratios are too uncertain to tell a small difference, and what to do; empty where none is.

    A gate that has passed or failed needs no narrower interval. The width falls with the square root of the number of
    blocks: 12.5 % of 8 blocks become 10 % of 8 · 1.25² = 12.5, so 13.
    """
    ratios = [ratio for workload in report.workloads for ratio in workload.ratios]
    wide = [ratio for ratio in ratios if is_wide(ratio) and ratio.verdict not in (Verdict.PASS, Verdict.FAIL)]
    if not wide:
        return ""
    blocks = max(math.ceil(len(ratio.block_ratios) * (_width(ratio) / WIDE) ** 2) for ratio in wide)
    one = len(wide) == 1
    return (
        f"{'The interval' if one else 'Intervals'} of {fmt.counted(len(wide), 'ratio')} of {len(ratios)} "
        f"{'is wide: its' if one else 'are wide: their'} ends lie more than {WIDE:.0%} apart, so the median tells no "
        f"difference as small as that. End other work on this machine and run again; with as much noise, "
        f"--blocks {blocks} would do."
    )
