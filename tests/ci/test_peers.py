"""The table of docs/evidence.md is that of the recorded results, and its verdicts go by intervals."""

from __future__ import annotations

import json

from peers import export_targets, peers_table, race_targets
from readme_tables import table_in_readme
from results import RESULTS


def test_the_table_is_that_of_the_results():
    (path,) = RESULTS.glob("peers-*.json")
    assert table_in_readme("peers") == peers_table(json.loads(path.read_text(encoding="utf-8")))


def test_a_race_is_judged_by_its_interval():
    def ratio(variant: str, low: float, high: float) -> dict:
        return {"variant": variant, "reference": "peer", "median": (low + high) / 2, "low": low, "high": high}

    races = [{"name": "decode", "ratios": [
        ratio("merged", 0.9, 1.0), ratio("one adapter", 1.0, 1.1), ratio("another in each row", 1.1, 1.2),
        ratio("again", 0.5, 2.0),
    ]}]  # fmt: skip
    assert [target.verdict for target in race_targets(races)] == ["pass", "ambiguous", "fail"]


def test_an_export_is_judged_by_medians():
    def samples(*seconds: float) -> list[dict]:
        return [{"seconds": each, "peak_bytes": 100 * each} for each in seconds]

    found = [
        {
            "layers": 8,
            "samples": {"builder": samples(10, 11, 12), "cold": samples(10, 99, 1), "cached": samples(7, 7, 7)},
        }
    ]
    targets = export_targets(found)
    assert [round(target.value, 3) for target in targets] == [round(10 / 11, 3), round(7 / 11, 3), round(10 / 11, 3)]
    assert [target.verdict for target in targets] == ["pass", "fail", "fail"]
