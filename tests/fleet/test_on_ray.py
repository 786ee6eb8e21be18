"""Ray's actors are workers as processes are: what dies, hangs or swells is replaced, and what they make is the same."""

from __future__ import annotations

import os
import sys
from contextlib import closing

import pytest
from command_line import fails
from strange_worker import Order

from lora_export.errors import EnvironmentUnusable
from lora_export.fleet.on_ray import HERE, Actors
from lora_export.fleet.outcomes import AdapterOutcome, Outcome
from lora_export.fleet.pool import Limits, Pool


@pytest.fixture(scope="module")
def engine(ray_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # as pytest has it, for the actors
        with closing(Actors("strange_worker:work", HERE)) as actors:
            yield actors


def broken(order: Order, reason: str) -> AdapterOutcome:
    return AdapterOutcome(order.name, "", Outcome.BROKEN, reason=reason)


def outcomes(engine: Actors, orders: list[Order], limits: Limits) -> dict[str, AdapterOutcome]:
    with Pool(engine, n_workers=2, limits=limits, broken=broken) as pool:
        found = list(pool.outcomes(orders))
    assert len(found) == len(orders)
    return {outcome.name: outcome for outcome in found}


def test_what_hangs_swells_or_raises_takes_no_other_with_it(engine):
    """One that dies is killed from outside in test_run.py."""
    good = [Order(f"good{i}", "answer") for i in range(5)]
    # Two that start the actors, so that the one that hangs does not get a fresh one's time.
    orders = [*good[:2], Order("hangs", "hang"), Order("raises", "raise"), Order("swells", "swell"), *good[2:]]
    found = outcomes(engine, orders, Limits(8, 330_000_000, attempts=1))
    assert {outcome.attempts for outcome in found.values()} == {1}
    assert {name: outcome.reason for name, outcome in found.items() if outcome.outcome is Outcome.BROKEN} == {
        "hangs": "it took more than 8 s",
        "swells": "its worker took more than 0.3 GB of memory",
        "raises": "a defect: KeyError: 'a key'",
    }
    assert all(found[order.name].outcome is Outcome.SERVED for order in good)


def test_a_machine_without_disk_ends_everything(engine):
    with (
        pytest.raises(EnvironmentUnusable, match="The disk is full"),
        Pool(engine, n_workers=1, limits=Limits(60), broken=broken) as pool,
    ):
        list(pool.outcomes([Order("good", "answer"), Order("stops", "no disk"), Order("never", "hang")]))


def test_a_cluster_that_cannot_be_and_a_ray_that_is_not_there(engine, adapters, bases, tmp_path, monkeypatch):
    engine.close()
    command = ("fleet", adapters["chat"].parent, bases["llama"], "-o", tmp_path / "out", "--limit", 1)
    said = fails(4, *command, "--ray", "nowhere")
    assert "Ray cannot be used" in said and "--ray nowhere" in said and "ray status" in said
    assert "Invalid address format: nowhere" in said
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'lora-export[fleet]'" in fails(4, *command, "--ray", "local")
    assert not (tmp_path / "out").exists()
