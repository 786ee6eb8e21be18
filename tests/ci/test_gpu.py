"""The GPU script as far as a CPU allows: its questions are answered on the CPU provider, and CUDA is never faked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_export.runtime.session import cuda_problem

ROOT = Path(__file__).parents[2]
QUESTIONS = ROOT / "ci/gpu_questions.py"


@pytest.mark.parametrize("script", ["ci/gpu", "ci/demo", "ci/test", "ci/setup", "ci/report_accessibility", ".ci/run"])
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", ROOT / script], capture_output=True).returncode == 0


def test_questions_are_answered_on_the_cpu(tmp_path):
    out = tmp_path / "answers.json"
    subprocess.run([sys.executable, QUESTIONS, "--provider", "cpu", "--out", out], check=True, capture_output=True)
    answers = json.loads(out.read_text())
    assert set(answers["rank 0"].values()) == {"zeros"}
    assert answers["operand rank, µs"]["[1, in, rank] / 2-D"] > 0
    assert answers["adapter copies, µs"]["bound"] > 0
    assert answers["placement"] == {"CPUExecutionProvider": {"MatMul": 2}}


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A Python that trains and exports nothing: it notes what the script asks for; `check` exits with $CHECK."""
    stub = tmp_path / "python"
    stub.write_text("""#!/usr/bin/env bash
echo "$*" >> "$LOG"
case "$*" in
  samples/tiny_decoder.py*) mkdir -p "$WORK/decoder-adapters/"{legal,shout} ;;
  "-m lora_export.cli.main check "*) mkdir -p "$4/reports"; echo "{}" > "$4/reports/check.json"; exit "$CHECK" ;;
  "-m lora_export.cli.main bench "*) echo "{}" > "$4/reports/bench.json" ;;
  ci/gpu_questions.py*) exit "$QUESTIONS" ;;
esac
""")
    stub.chmod(0o755)
    return stub


def run_script(stub: Path, *, check: int = 0, questions: int = 0) -> tuple[int, list[str]]:
    """Exit code of ci/gpu and what it ran."""
    folder = stub.parent
    variables = {"PYTHON": stub, "WORK": folder / "work", "RESULTS": folder / "results", "LOG": folder / "log"}
    variables |= {"CHECK": check, "QUESTIONS": questions}
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    done = subprocess.run(["bash", ROOT / "ci/gpu"], env=environment, capture_output=True)
    return done.returncode, (folder / "log").read_text().splitlines()


def test_the_script_checks_and_times_every_export_on_cuda(stub):
    code, log = run_script(stub)
    assert code == 0
    for command in ("check", "bench"):
        calls = [line for line in log if line.startswith(f"-m lora_export.cli.main {command} ")]
        assert len(calls) == 6 and all("--provider cuda" in call for call in calls)
    exported = [
        line for line in log if re.search(r"cli\.main (dynamic|merge) .*--provider cuda --dtype float(32|16)", line)
    ]
    assert len(exported) == 6
    assert len(list((stub.parent / "results").glob("*-cuda.json"))) == 12


def test_the_script_s_exit_codes(stub):
    code, log = run_script(stub, check=1)
    assert code == 1 and sum("cli.main bench" in line for line in log) == 6, (
        "a failed check ends nothing but the verdict"
    )
    (stub.parent / "log").unlink()
    code, log = run_script(stub, check=4)
    assert code == 4 and not any("cli.main bench" in line for line in log)
    (stub.parent / "log").unlink()
    code, log = run_script(stub, questions=4)
    assert code == 4 and not any("lora_export.cli.main" in line for line in log)


@pytest.mark.skipif(cuda_problem() is None, reason="CUDA is usable here")
def test_cuda_is_refused_where_it_is_not_usable():
    done = subprocess.run([sys.executable, QUESTIONS, "--provider", "cuda"], capture_output=True, text=True)
    assert done.returncode == 4
    assert "CUDA provider was asked for and is not usable here" in done.stderr
    assert "Traceback" not in done.stderr
