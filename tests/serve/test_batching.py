"""`Batcher`, with runs that wait for the test."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import pytest
from live import WAIT_S, wait_until

from lora_export.serve.batching import Batcher, Limits
from lora_export.serve.problems import Problem


class Runs:
    """Answers a row with its model and first token; each run waits until the test lets it go."""

    def __init__(self, *, waits: bool = False) -> None:
        self.seen: list[list[str]] = []
        self.go = threading.Event()
        self.watched: list[int] = []
        if not waits:
            self.go.set()

    def __call__(self, rows):
        self.seen.append([row.model for row in rows])
        assert self.go.wait(WAIT_S)
        if any(row.model == "bad" for row in rows):
            raise ValueError("bad")
        return [Problem(404, "gone") if row.model == "gone" else (row.model, row.ids[0]) for row in rows]

    def ran(self, rows, seconds) -> None:
        self.watched.append(len(rows))


@pytest.fixture
def start():
    started = []

    def make(runs, *, max_batch=4, max_tokens=1000, max_queue=8, max_wait_s=0.0):
        batcher = Batcher(runs, Limits(max_batch, max_tokens, max_queue, max_wait_s), runs)
        started.append((batcher, runs))
        return batcher

    yield make
    for batcher, runs in started:
        runs.go.set()
        batcher.close()
        assert not batcher.is_alive


def soon() -> float:
    return time.monotonic() + WAIT_S


def busy(batcher, runs):
    """A first request whose run waits, so that what follows gathers in the queue."""
    ticket = batcher.submit("first", [[0]], soon())
    wait_until(lambda: runs.seen)
    return ticket


def test_rows_of_different_models_share_a_run_and_get_their_own_answers(start):
    runs = Runs(waits=True)
    batcher = start(runs)
    busy(batcher, runs)
    one, two = batcher.submit("a", [[1], [2]], soon()), batcher.submit("b", [[3]], soon())
    assert batcher.models() == (["first"], ["a", "a", "b"])
    runs.go.set()
    assert one.future.result(WAIT_S) == [("a", 1), ("a", 2)]
    assert two.future.result(WAIT_S) == [("b", 3)]
    assert runs.seen == [["first"], ["a", "a", "b"]]
    wait_until(lambda: runs.watched == [1, 3])


def test_a_run_keeps_to_its_rows_and_tokens(start):
    runs = Runs(waits=True)
    batcher = start(runs, max_batch=3, max_tokens=12)
    busy(batcher, runs)
    rows = {"a": 4, "b": 5, "c": 4, "d": 20, "e": 1}
    tickets = [batcher.submit(name, [[0] * length], soon()) for name, length in rows.items()]
    runs.go.set()
    for ticket in tickets:
        ticket.future.result(WAIT_S)
    # a, and c and e beside it: with b three rows of five would be 15 tokens. A row over the budget runs alone.
    assert runs.seen == [["first"], ["a", "b"], ["c", "e"], ["d"]]


def test_a_row_waits_for_as_many_as_came_before_and_not_for_long(start):
    runs = Runs(waits=True)
    batcher = start(runs, max_wait_s=0.3)
    busy(batcher, runs)
    tickets = [batcher.submit("a", [[0]], soon()) for _ in range(2)]
    runs.go.set()
    for ticket in tickets:
        ticket.future.result(WAIT_S)
    wait_until(lambda: runs.watched == [1, 2])
    began = time.monotonic()
    batcher.submit("alone", [[0]], soon()).future.result(WAIT_S)  # two were in the last run
    assert 0.25 < time.monotonic() - began < 5
    began = time.monotonic()
    batcher.submit("alone", [[0]], soon()).future.result(WAIT_S)
    assert time.monotonic() - began < 0.25


def test_a_client_alone_that_asks_again_at_once_waits_for_nobody(start):
    batcher = start(runs := Runs(), max_wait_s=WAIT_S)
    again = []
    first = batcher.submit("a", [[1]], soon())
    first.future.add_done_callback(lambda _: again.append(batcher.submit("a", [[2]], soon())))
    began = time.monotonic()
    assert first.future.result(WAIT_S) == [("a", 1)]
    wait_until(lambda: again)
    assert again[0].future.result(WAIT_S) == [("a", 2)]
    assert time.monotonic() - began < WAIT_S / 4 and runs.seen == [["a"], ["a"]]


def test_a_full_queue_turns_away_with_a_time_to_come_back(start):
    runs = Runs(waits=True)
    batcher = start(runs, max_queue=2)
    busy(batcher, runs)
    batcher.submit("a", [[0], [0]], soon())
    with pytest.raises(Problem) as found:
        batcher.submit("b", [[0]], soon())
    assert found.value.status == 429 and found.value.headers == {"retry-after": "1"}
    with pytest.raises(Problem) as found:
        batcher.submit("b", [[0]] * 3, soon())
    assert found.value.status == 400 and "at most 2 are taken" in found.value.message


def test_a_row_that_is_cancelled_leaves_the_queue_and_makes_room(start):
    runs = Runs(waits=True)
    batcher = start(runs, max_queue=1)
    first = busy(batcher, runs)
    ticket = batcher.submit("a", [[0]], soon())
    batcher.cancel(ticket)
    assert batcher.n_waiting == 0
    other = batcher.submit("b", [[5]], soon())
    batcher.cancel(first)  # it runs: its result goes nowhere
    runs.go.set()
    assert other.future.result(WAIT_S) == [("b", 5)]
    with pytest.raises(CancelledError):
        ticket.future.result(WAIT_S)
    assert runs.seen == [["first"], ["b"]]


def test_a_row_whose_deadline_passes_in_the_queue_is_not_run(start):
    runs = Runs(waits=True)
    batcher = start(runs)
    busy(batcher, runs)
    late, other = batcher.submit("late", [[0]], time.monotonic()), batcher.submit("b", [[1]], soon())
    runs.go.set()
    assert other.future.result(WAIT_S) == [("b", 1)]
    with pytest.raises(Problem) as found:
        late.future.result(WAIT_S)
    assert found.value.status == 504
    assert runs.seen == [["first"], ["b"]]


def test_one_row_s_mistake_is_not_the_others(start):
    runs = Runs(waits=True)
    batcher = start(runs)
    busy(batcher, runs)
    bad, good = batcher.submit("bad", [[0]], soon()), batcher.submit("good", [[1]], soon())
    gone = batcher.submit("gone", [[2]], soon())
    runs.go.set()
    assert good.future.result(WAIT_S) == [("good", 1)]
    with pytest.raises(ValueError, match="bad"):
        bad.future.result(WAIT_S)
    with pytest.raises(Problem, match="gone"):
        gone.future.result(WAIT_S)
    assert batcher.is_alive


def test_an_end_answers_what_waits_and_takes_nothing_more(start):
    runs = Runs(waits=True)
    batcher = start(runs)
    busy(batcher, runs)
    ticket = batcher.submit("a", [[1]], soon())
    ending = threading.Thread(target=batcher.close)
    ending.start()
    wait_until(lambda: not batcher._is_open)
    with pytest.raises(Problem) as found:
        batcher.submit("b", [[0]], soon())
    assert found.value.status == 503
    runs.go.set()
    ending.join(WAIT_S)
    assert ticket.future.result(0) == [("a", 1)]
