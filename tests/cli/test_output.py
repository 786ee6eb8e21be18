"""How far a command is, on a terminal and without one."""

from __future__ import annotations

import pytest

from lora_export.cli import output
from lora_export.cli.output import Display, time_left


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
        "   5.0 s  packing",
        "  35.0 s  packing, 300 of 1,000, 10 a second, 1 min 10 s left",
        "  65.0 s  packing, 600 of 1,000, 10 a second, 40 s left",
        "  95.0 s  packing, 900 of 1,000, 10 a second, 10 s left",
        " 105.9 s  writing",
    ]
    quiet = Display(as_json=True, quiet=False)
    quiet.progress("packing", 0, 1)
    assert capsys.readouterr().err == ""
