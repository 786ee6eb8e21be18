"""Faults injected into commands: what is recorded, and a few of them, chosen by a seed, in every run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import fault_injection as faults
import pytest
from injection.kill import Tally
from readme_tables import table_in_readme

SCRIPT = Path(faults.__file__)


@pytest.fixture(scope="module")
def recorded() -> dict:
    return faults.recorded(faults.RESULT)


def test_the_page_has_the_recorded_figures(recorded):
    assert table_in_readme("fault_injection") == faults.summary(recorded)


@pytest.mark.parametrize("part", faults.PARTS)
def test_nothing_recorded_was_lost_or_left_behind(part, recorded):
    for figures in recorded.get(part, {"scenarios": {}})["scenarios"].values():
        for tally in figures.values():
            assert tally["points"] > 0 and tally["lost"] == [] and tally["left"] == []


def test_what_is_recorded_is_much(recorded):
    assert set(faults.PARTS) <= set(recorded)
    assert faults.BESIDE in recorded["together"]["scenarios"]
    for name in ("serve", faults.IN_FLIGHT):
        assert sum(tally["points"] for tally in recorded["serve"]["scenarios"][name].values()) >= 50
    for tally in recorded["serve"]["scenarios"][faults.IN_FLIGHT].values():
        assert tally["in_flight"] >= tally["points"] and tally["requests"]["whole"] > tally["points"]
    kill, errors = recorded["kill"]["scenarios"], recorded["errors"]["scenarios"]
    assert len(kill) >= 4 <= len(errors)
    for name in ("merge --overwrite", "add --replace", "remove", "fleet", "fleet, renewed", "dynamic --sign-key"):
        assert {"-9", "143", "130"} <= {code for tally in kill[name].values() for code in tally["ended"]}
        assert kill[name]["SIGKILL at a call"]["points"] >= 20
        assert sum(tally["points"] for way, tally in kill[name].items() if way.endswith("moment")) >= 50
    newest = ("fleet", "fleet, renewed", "add --sign-key", "dynamic", "merge", "add", "merge of kohya's")
    for name in ("merge --overwrite", "add --replace", "remove", *newest):
        assert {"4"} <= {code for tally in errors[name].values() for code in tally["ended"]}
    assert kill["add --replace"]["SIGKILL at a call"]["old"] > 0 < kill["add --replace"]["SIGKILL at a call"]["new"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_few_faults_lose_nothing(tmp_path):
    result = tmp_path / "result.json"
    seed = f"{os.environ['LORA_EXPORT_TEST_SEED']} ci"
    few = ("--calls", "3", "--moments", "0", "--seed", seed, "--part", "kill", "--part", "errors")
    command = [sys.executable, SCRIPT, "--work", tmp_path, "--result", result, "--scenario", "extract", *few]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    found = json.loads(result.read_text(encoding="utf-8"))
    assert found["kill"]["scenarios"]["extract"]["SIGKILL at a call"]["ended"] == {"-9": 3}
    assert found["errors"]["scenarios"]["extract"]["ENOSPC from here on"]["points"] == 3


def test_a_request_that_is_cut_off_or_wrong_is_told():
    from injection.in_flight import CUT, REFUSED, Asked, problems_of

    expected, moment = {"one": "a text"}, 5.0

    def told(number: int, *asked: tuple[float, float, str]) -> list[str]:
        return problems_of([Asked("one", *each) for each in asked], expected, number, moment)

    before, across, after = (1.0, 2.0), (4.0, 6.0), (7.0, 8.0)
    assert told(signal.SIGTERM, (*before, "a text"), (*across, "a text"), (*across, REFUSED), (*after, CUT)) == []
    assert told(signal.SIGTERM, (*across, CUT)) == told(signal.SIGKILL, (*before, CUT)) == ["one was cut off"]
    assert told(signal.SIGKILL, (*across, CUT), (*after, REFUSED)) == []
    assert told(signal.SIGKILL, (*across, "a te")) == ["one wrote 'a te'"]
    assert told(signal.SIGINT, (*before, REFUSED)) == ["one was refused before the signal"]


def test_what_is_lost_is_told(tmp_path):
    """A judge that cannot fail is none."""
    from injection.judge import digest, listing

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("a")
    before = digest(tmp_path / "out")
    assert listing([tmp_path]) == [f"{tmp_path.name}/out"]
    (tmp_path / "out" / "file").write_text("b")
    assert digest(tmp_path / "out") != before and digest(tmp_path / "none") is None
    (tmp_path / "out" / "file").write_text("a")
    (tmp_path / "out" / ".left").touch()
    assert digest(tmp_path / "out") != before
    assert Tally(lost=["here"]).to_dict()["lost"] == ["here"]
