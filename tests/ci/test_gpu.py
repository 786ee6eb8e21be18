"""The GPU script as far as a CPU allows: its questions are answered on the CPU provider, and CUDA is never faked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_export.runtime.session import cuda_problem

ROOT = Path(__file__).parents[2]
QUESTIONS = ROOT / "ci/gpu_questions.py"


@pytest.mark.parametrize("script", ["ci/gpu", "ci/demo", "ci/test", "ci/setup", ".ci/run"])
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


@pytest.mark.skipif(cuda_problem() is None, reason="CUDA is usable here")
def test_cuda_is_refused_where_it_is_not_usable():
    done = subprocess.run([sys.executable, QUESTIONS, "--provider", "cuda"], capture_output=True, text=True)
    assert done.returncode == 4
    assert "CUDA provider was asked for and is not usable here" in done.stderr
    assert "Traceback" not in done.stderr
