"""The load test's table in docs/serve.md is that of its results, and its targets go by what was found."""

from __future__ import annotations

import json

import numpy as np
from readme_tables import table_in_readme
from results import RESULTS
from serving import find_targets, serving_table
from serving_models import distance


def recorded() -> dict:
    (path,) = RESULTS.glob("serving-x86_64-*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_table_is_that_of_the_results():
    assert table_in_readme("serving") == serving_table(recorded())


def test_all_stages_are_recorded_and_another_adapter_s_answer_would_not_have_passed():
    found = recorded()
    stages = {f"{stage}: {name}" for stage in ("mixed", "churn", "clients") for name in ("encoder", "decoder")}
    stages |= {"memory: encoder", "overhead: encoder", "mixed: encoder-decoder", "clients: encoder-decoder"}
    assert set(found["results"]) == stages
    assert found["results"]["memory: encoder"]["cycles"] == 10_000
    for name, result in found["results"].items():
        if "nearest_other_adapter" in result:
            least = 100 * found["tolerance"] if name.endswith(": encoder") else 1
            assert result["nearest_other_adapter"] >= least


def test_a_wrong_answer_a_lost_one_or_a_slow_one_fails():
    load = {"right": 9, "wrong": 0, "lost": {}}
    found = {
        "mixed: encoder": load,
        "churn: encoder": load | {"wrong": 1},
        "mixed: decoder": load | {"lost": {"APITimeoutError": 1}},
        "memory: encoder": load | {"growth_after_a_tenth": 0.03, "cycles": 10},
        "clients: decoder": {"gain": 2.9},
        "overhead: encoder": {"overhead_ms": 3.1, "quartiles_ms": [3, 3.2], "blocks_ms": [[1, 4.1]]},
    }
    verdicts = {target.name: target.verdict for target in find_targets(found)}
    assert [name for name, verdict in verdicts.items() if verdict == "pass"] == [
        "mixed: encoder: answers wrong or lost",
        "memory: encoder: answers wrong or lost",
    ]
    assert len(verdicts) == 7


def test_the_distance_of_answers():
    assert distance([1, 2, 3], [1, 5, 3]) == 1 and distance([1, 2], [1, 2, 3]) == 1 and distance([4], [4]) == 0
    assert distance(np.array([1.0, 2.0]), np.array([1.5, 2.0])) == 0.5
