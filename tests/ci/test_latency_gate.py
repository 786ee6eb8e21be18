"""The benchmark of the latency gate: its slowdowns are real, its comparisons are right, its result holds all ratios."""

from __future__ import annotations

import json
import random
import sys
import time
from itertools import combinations
from pathlib import Path

import latency_gate
import naive_methods
import pytest
from readme_tables import table_in_readme

RESULT = Path(__file__).parents[2] / "ci/benchmarks/results/latency-gate.json"


class Spinner:
    """Stands for an ONNX Runtime session whose runs take 2 ms of the processor."""

    get_inputs = get_outputs = io_binding = None

    def run_with_iobinding(self, binding: object) -> None:
        end = time.thread_time() + 0.002
        while time.thread_time() < end:
            pass


def test_a_slowdown_is_a_share_of_each_run_s_own_time():
    def fastest(run) -> float:
        found = []
        for _ in range(30):
            start = time.thread_time()
            run(None)
            found.append(time.thread_time() - start)
        return min(found)

    plain, slowed = Spinner(), latency_gate._Slowed(Spinner(), 0.5)
    assert fastest(slowed.run_with_iobinding) == pytest.approx(1.5 * fastest(plain.run_with_iobinding), rel=0.02)


def test_a_run_finds_what_takes_twice_as_long(exports):
    """No noise hides it."""
    (found,) = latency_gate.one_run(exports["llama-merged"], 1, {"double": 1.0}, 6)
    assert (found.run, found.candidate, found.verdict) == (1, "double", "fail")
    assert len(found.block_ratios) == 6 and 1.02 < found.low <= found.median <= found.high


def test_the_result_is_written_with_every_ratio(exports, tmp_path, monkeypatch, capsys, short_timing):
    out = tmp_path / "gate.json"
    command = ["latency_gate.py", "--work", str(tmp_path), "--export", str(exports["llama-merged"]), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--equal", "2", "--slowed", "1", "--blocks", "6"])
    code = latency_gate.main()
    found = json.loads(out.read_text("utf-8"))
    assert code == int(any(target["verdict"] == "fail" for target in found["targets"]))
    assert [target["detail"].split(" of ")[1] for target in found["targets"]] == ["2 runs", "1 runs", "1 runs"]
    raw = found["block_ratios_in_ten_thousandths"]
    assert [line.split(":")[0] for line in raw] == ["1 equal", "2 5 % slower", "2 10 % slower", "3 equal"]
    assert all(len(line.split(";")[1].split()) == 6 for line in raw)
    assert {sum(counts.values()) for counts in found["verdicts"].values()} == {1, 2}
    assert "paired blocks of fastest runs (the gate)" in capsys.readouterr().out


def exact_p(reference: list[float], other: list[float]) -> float:
    """How often a split of the pooled samples at random has `other` at least as slow, by its U."""

    def u(mine: list[float], theirs: list[float]) -> float:
        return sum((b > a) + (b == a) / 2 for a in mine for b in theirs)

    pooled, seen, hits, found = [*reference, *other], 0, 0, u(reference, other)
    for chosen in combinations(range(len(pooled)), len(other)):
        theirs = [pooled[i] for i in chosen]
        mine = [value for i, value in enumerate(pooled) if i not in chosen]
        seen, hits = seen + 1, hits + (u(mine, theirs) >= found)
    return hits / seen


@pytest.mark.parametrize("seed", range(4))
def test_mann_whitney_is_near_the_exact_test(seed):
    rng = random.Random(seed)
    reference = [round(rng.gauss(10, 1), 1) for _ in range(7)]
    other = [round(rng.gauss(10.5, 1), 1) for _ in range(7)]
    assert naive_methods.mann_whitney_p(reference, other) == pytest.approx(exact_p(reference, other), abs=0.02)


def test_naive_methods_on_halves_and_on_all():
    """A machine that becomes 10 % slower half-way: what ran in turn is equal, what ran one after the other is not."""
    drifting = [10 + 0.01 * (n % 5) + (n >= 30) for n in range(60)]
    found = naive_methods.verdicts(drifting, drifting, "means")
    assert found == {
        "Mann-Whitney p < .05, means in turn": False, "medians differ by 5 %, means in turn": False,
        "Mann-Whitney p < .05, means one after the other": True, "medians differ by 5 %, means one after the other": True,
    }  # fmt: skip


def test_both_kinds_of_runs_are_spread():
    kinds = [len(shares) for shares in latency_gate.schedule(4, 2)]
    assert kinds == [0, 2, 0, 0, 2, 0]


def test_the_recorded_run_is_whole_and_its_targets_follow_from_its_lines():
    """A figure in the file that its own verdicts do not give has been typed."""
    found = json.loads(RESULT.read_text("utf-8"))
    lines = [line.split(";")[0].split(" ", 1)[1].rsplit(": ", 1) for line in found["block_ratios_in_ten_thousandths"]]
    for target, candidate in zip(found["targets"], ("equal", "5 % slower", "10 % slower"), strict=True):
        verdicts = [verdict for name, verdict in lines if name == candidate]
        assert target["value"] == verdicts.count("fail") / len(verdicts)
        assert len(verdicts) >= (200 if candidate == "equal" else 100)


def test_the_docs_have_the_records_table():
    assert table_in_readme("latency_gate") == latency_gate.readme_table(json.loads(RESULT.read_text("utf-8")))
