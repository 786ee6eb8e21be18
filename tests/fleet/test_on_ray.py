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
def engine():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", f"/tmp/ray-{os.getpid()}")  # a socket's path is short, and pytest's folders are not
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


def test_what_dies_hangs_swells_or_raises_takes_no_other_with_it(engine, tmp_path):
    good = [Order(f"good{i}", "answer") for i in range(6)]
    strange = [Order("hangs", "hang"), Order("raises", "raise"), Order("dies", "die"), Order("swells", "swell")]
    # Two that start the actors, so that the one that hangs does not get a fresh one's time.
    orders = [*good[:2], *strange, Order("dies once", "answer", tmp_path / "x"), *good[2:]]
    found = outcomes(engine, orders, Limits(12, 330_000_000))
    assert {name: outcome.attempts for name, outcome in found.items()} == {
        "dies": 2, "hangs": 1, "swells": 2, "raises": 1, "dies once": 2, **{f"good{i}": 1 for i in range(6)},
    }  # fmt: skip
    assert {name for name, outcome in found.items() if outcome.outcome is Outcome.BROKEN} == {
        "dies", "hangs", "swells", "raises",
    }  # fmt: skip
    assert found["dies"].reason.startswith("its worker died (Ray: The actor died unexpectedly")
    assert found["hangs"].reason == "it took more than 12 s"
    assert found["swells"].reason == "its worker took more than 0.3 GB of memory"
    assert found["raises"].reason == "a defect: KeyError: 'a key'"


def test_a_machine_without_disk_ends_everything(engine):
    with (
        pytest.raises(EnvironmentUnusable, match="The disk is full"),
        Pool(engine, n_workers=1, limits=Limits(60), broken=broken) as pool,
    ):
        list(pool.outcomes([Order("good", "answer"), Order("stops", "no disk"), Order("never", "hang")]))


def test_a_cluster_that_does_not_answer_and_a_ray_that_is_not_there(adapters, bases, tmp_path, monkeypatch):
    command = ("fleet", adapters["chat"].parent, bases["llama"], "-o", tmp_path / "out", "--limit", 1)
    said = fails(4, *command, "--ray", "auto")
    assert "Ray cannot be used" in said and "--ray auto" in said and "ray status" in said
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'lora-export[fleet]'" in fails(4, *command, "--ray", "local")
    assert not (tmp_path / "out").exists()
