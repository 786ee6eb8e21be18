"""A worker that dies, hangs or swells takes its own adapter with it and no other."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from strange_worker import Order

from lora_export.errors import EnvironmentUnusable
from lora_export.fleet.outcomes import AdapterOutcome, Outcome
from lora_export.fleet.pool import Limits, Pool
from lora_export.fleet.processes import Processes


def pool(n_workers: int = 2, seconds: float = 60, n_bytes: int | None = None) -> Pool:
    def broken(order: Order, reason: str) -> AdapterOutcome:
        return AdapterOutcome(order.name, "", Outcome.BROKEN, reason=reason)

    return Pool(Processes("strange_worker:work"), n_workers=n_workers, limits=Limits(seconds, n_bytes), broken=broken)


def outcomes(orders: list[Order], **options) -> dict[str, AdapterOutcome]:
    with pool(**options) as workers:
        found = list(workers.outcomes(orders))
    assert len(found) == len(orders)
    return {outcome.name: outcome for outcome in found}


def test_every_order_has_its_outcome_and_workers_go_on(tmp_path):
    orders = [Order(f"good{i}", "answer") for i in range(6)]
    strange = [
        Order("dies", "die"),
        Order("exits", "exit"),
        Order("raises", "raise"),
        Order("dies once", "answer", tmp_path / "x"),
    ]
    found = outcomes([*strange, *orders])
    assert all(found[order.name].outcome is Outcome.SERVED for order in orders)
    said = {
        name: (found[name].outcome.value, found[name].reason, found[name].attempts)
        for name in ("dies", "exits", "raises")
    }
    assert said == {
        "dies": ("broken", "its worker died (killed by signal 9)", 2),
        "exits": ("broken", "its worker died (exit code 7)", 2),
        "raises": ("broken", "a defect: KeyError: 'a key'", 1),
    }
    assert (found["dies once"].outcome, found["dies once"].attempts) == (Outcome.SERVED, 2)


def test_one_that_hangs_is_ended_in_time_and_not_tried_again():
    started = time.monotonic()
    found = outcomes([Order("hangs", "hang"), Order("good", "answer")], n_workers=1, seconds=1.5)
    assert time.monotonic() - started < 30
    assert (found["hangs"].reason, found["hangs"].attempts) == ("it took more than 1.5 s", 1)
    assert found["good"].outcome is Outcome.SERVED


def test_one_that_swells_is_ended():
    found = outcomes([Order("swells", "swell"), Order("good", "answer")], n_workers=1, n_bytes=250_000_000)
    assert (found["swells"].reason, found["swells"].attempts) == ("its worker took more than 0.2 GB of memory", 2)
    assert found["good"].outcome is Outcome.SERVED


def test_a_machine_without_disk_ends_everything_and_no_worker_stays():
    with pytest.raises(EnvironmentUnusable, match="The disk is full"), pool() as workers:
        served = next(workers.outcomes([Order("good", "answer")]))
        list(workers.outcomes([Order("stops", "no disk"), Order("never", "hang")]))
    with pytest.raises(ProcessLookupError):
        os.kill(int(served.given), 0)


def test_a_worker_leaves_ctrl_c_to_its_leader():
    """Also while it begins: a terminal sends it to all, and each worker would print a traceback."""
    worker = Processes("strange_worker:work").start()
    try:
        for name in ("begins", "waits"):
            os.kill(worker._process.pid, signal.SIGINT)
            worker.send(Order(name, "answer"))
            assert worker.answer().outcome is Outcome.SERVED
    finally:
        worker.kill()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_workers_that_find_no_processor_hold_nothing_back_and_none_at_all_is_told(monkeypatch):
    engine = Processes("strange_worker:work")
    start_one, placed = engine.start, []
    first = start_one()

    def start():
        worker = first if not placed else start_one()
        placed.append(worker)
        worker.has_place = lambda: worker is first
        return worker

    monkeypatch.setattr(engine, "start", start)
    with Pool(engine, n_workers=2, limits=Limits(60), broken=lambda order, why: None) as workers:
        found = list(workers.outcomes([Order(f"good{i}", "answer") for i in range(4)]))
        assert len(placed) == 2 and len({outcome.given for outcome in found}) == 1
        first.has_place = lambda: False
        monkeypatch.setattr("lora_export.fleet.pool.MOST_SECONDS_WITHOUT_A_PLACE", 0.3)
        with pytest.raises(EnvironmentUnusable, match="No worker has found a processor"):
            list(workers.outcomes([Order("never", "answer")]))


_LEADER = """
from strange_worker import Order
from lora_export.fleet.processes import Processes
if __name__ == "__main__":
    worker = Processes("strange_worker:work").start()
    worker.send(Order("first", "answer"))
    print(worker.answer().given, flush=True)
    worker.send(Order("second", "hang"))
    input()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends a process with its parent")
def test_a_worker_ends_with_a_leader_that_is_killed(tmp_path):
    script = tmp_path / "leader.py"
    script.write_text(_LEADER, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [Path(__file__).parent, *sys.path]))}
    leader = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    worker = int(leader.stdout.readline())
    os.kill(worker, 0)
    leader.send_signal(signal.SIGKILL)
    leader.wait()
    until = time.monotonic() + 20
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < until:
            os.kill(worker, 0)
            time.sleep(0.02)
        pytest.fail("the worker goes on")
