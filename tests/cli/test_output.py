"""How far a command is, on a terminal and without one."""

from __future__ import annotations

import pytest

from lora_export.cli import output
from lora_export.cli.output import Display
from lora_export.cli.pace import Pace, time_left


@pytest.mark.parametrize(
    ("n_done", "n_left", "seconds", "said"),
    [
        (0, 10, 60.0, ""),  # nothing tells yet
        (10, 0, 60.0, ""),  # nothing is left
        (120, 880, 60.0, ", 2 a second, 7 min 20 s left"),
        (10, 5, 100.0, ", 0.1 a second, 50 s left"),
        (100, 100_000, 50.0, ", 2 a second, 13.9 h left"),
        (500_000_000, 250_000_000, 10.0, ", 5 s left"),  # bytes
    ],
)
def test_what_is_left_is_told_by_what_was_done(n_done, n_left, seconds, said):
    assert time_left(n_done, n_left, seconds) == said


def told(*reports: tuple[float, int], total: int = 100) -> str:
    """What is left after `(now, done)` of each report."""
    pace = Pace(0.0)
    for now, done in reports:
        pace = pace.at(now, done, total)
    return pace.left(reports[-1][0])


def test_what_is_left_is_told_by_all_of_the_work_and_not_by_one_step():
    begun = (50.0, 0)
    assert told(begun, (60.0, 1)) == "", "the first of them may be the largest"
    assert told(begun, (60.0, 1), (70.0, 1), (70.0, 1)) == "", "nothing more was done"
    assert told(begun, (60.0, 1), (61.0, 50)) == ", 4.55 a second, 11 s left", "50 in 11 s, whatever the first took"
    assert told((0.0, 60), (10.0, 61), (12.0, 62)) == ", 0.167 a second, 3 min 48 s left", "60 were there before"
    assert told(begun, (60.0, 40), (70.0, 80), (200.0, 0), (210.0, 5)) == "", "other work"
    assert told((0.0, 0), (2.0, 300_000), (4.0, 500_000), total=1_000_000) == ", 4 s left"


def test_parts_of_one_work_have_names_of_their_own_and_a_rest_in_common(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    display = Display(as_json=False, quiet=False)
    for done in range(4):
        now = 10.0 * done
        display.progress(f"checking {done}", done, 4)
    for done in (0, 400_000, 500_000):
        now += 35
        display.progress("writing weights", done, 1_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "after 0 s: checking 0",
        "after 10 s: checking 1",
        "after 20 s: checking 2, 2 of 4, 0.1 a second, 20 s left",
        "after 30 s: checking 3, 3 of 4, 0.1 a second, 10 s left",
        "after 1 min 5 s: writing weights",
        "after 1 min 40 s: writing weights, 40%",
        "after 2 min 15 s: writing weights, 50%, 1 min 10 s left",
    ]


def test_without_a_terminal_a_long_stage_says_how_far_it_is(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    display = Display(as_json=False, quiet=False)
    for done in range(1000):
        now = 5.0 + done * 0.1
        display.progress("packing", done, 1000)
    now += 1
    display.progress("writing", 0, 3)
    assert capsys.readouterr().err.splitlines() == [
        "after 5 s: packing",
        "after 35 s: packing, 300 of 1,000, 10 a second, 1 min 10 s left",
        "after 1 min 5 s: packing, 600 of 1,000, 10 a second, 40 s left",
        "after 1 min 35 s: packing, 900 of 1,000, 10 a second, 10 s left",
        "after 1 min 46 s: writing",
    ]
    quiet = Display(as_json=True, quiet=False)
    quiet.progress("packing", 0, 1)
    assert capsys.readouterr().err == ""
