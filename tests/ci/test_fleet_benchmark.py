"""The page of fleets quotes what was measured, and the verdicts follow from the figures."""

from __future__ import annotations

import json
from dataclasses import replace

import fleet
import fleet_at_scale
import fleet_nodes
import pytest
from readme_tables import table_in_readme


def test_the_page_has_the_records_table():
    result = fleet.read_result()
    assert table_in_readme("fleet") == fleet.summary(result)
    assert [vars(target) for target in fleet.targets(result["figures"])] == result["targets"]


def test_the_simulation_is_that_of_the_recorded_rates():
    result = json.loads(fleet_at_scale.RESULT.read_text(encoding="utf-8"))
    assert table_in_readme("fleet_at_scale") == fleet_at_scale.summary(result)
    rates = fleet_at_scale.Rates(**result["rates"] | {"work": tuple(result["rates"]["work"])})
    case = result["cases"][-1]
    workers = {"n": result["n"], "n_workers": case["nodes"] * case["cores"], "storage": case["storage"]}
    assert case == case | fleet_at_scale.simulated(rates, **workers)


def test_a_cluster_whose_node_was_killed_lost_nothing_and_made_the_same_bytes():
    result = json.loads(fleet_nodes.RESULT.read_text(encoding="utf-8"))
    assert table_in_readme("fleet_nodes") == fleet_nodes.summary(result)
    found = result["figures"]
    assert (found["n_nodes"], found["n_workers"], found["n_killed"]) == (3, 3, 1)
    assert found["n_lost"] == 0 and found["differ"] == [] and found["files"] > found["n_adapters"]
    assert found["n_tried_again"] >= 1, "the node that was killed had an adapter"


def test_a_simulation_of_one_thing_at_a_time_is_its_sum():
    nothing = {"lead": 0.0, "hash_bytes": 1e30, "hand_out": 0.0, "start": 0.0, "work": (2.0,), "adapter_bytes": 1.0}
    rates = fleet_at_scale.Rates(**nothing, manifest_bytes=0.0)
    assert fleet_at_scale.simulated(rates, n=10, n_workers=5, storage=1e30)["seconds"] == pytest.approx(4.0)
    slow = fleet_at_scale.simulated(replace(rates, hand_out=3.0), n=10, n_workers=5, storage=1e30)
    assert slow["seconds"] == pytest.approx(10 * 3.0 + 2.0)
    assert max(slow["busy"], key=slow["busy"].get) == "leader, handing out"
    stored = fleet_at_scale.simulated(rates, n=10, n_workers=5, storage=0.5)
    assert stored["seconds"] == pytest.approx(10 * 4.0 + 2.0)
    led = fleet_at_scale.simulated(replace(rates, lead=1.5), n=10, n_workers=10, storage=1e30)
    assert led["seconds"] == pytest.approx(15.0 + 2.0)
