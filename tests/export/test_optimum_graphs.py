"""Adapters on graphs that Optimum itself wrote, in an environment of its own: its decoders and a classifier."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from lora_export.export.plan import Request
from lora_export.pipeline import ExportOptions, check, export
from lora_export.verdict import Verdict

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("LORA_EXPORT_OPTIMUM_PYTHON", ROOT / ".venv-optimum/bin/python"))
TASKS = {
    "llama": "text-generation-with-past", "gpt2": "text-generation-with-past", "classifier": "text-classification",
}  # fmt: skip
SCRIPT = """
import sys
from optimum.exporters.onnx import main_export
for place in range(1, len(sys.argv), 3):
    base, out, task = sys.argv[place : place + 3]
    main_export(base, out, task=task, do_validation=False)
"""


@pytest.fixture(scope="module")
def graphs(bases, tmp_path_factory) -> dict[str, Path]:
    """Optimum's folder of each base, all in one process."""
    if not PYTHON.is_file():
        pytest.skip("there is no .venv-optimum: run ci/setup-optimum")
    folder = tmp_path_factory.mktemp("optimum")
    asked = [part for name, task in TASKS.items() for part in (str(bases[name]), str(folder / name), task)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([PYTHON, "-c", SCRIPT, *asked], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: folder / name for name in TASKS}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "adapter", "mode"),
    [("llama", "chat", "dynamic"), ("gpt2", "poet", "merge"), ("classifier", "shades", "dynamic")],
)
def test_an_adapter_on_optimums_graph_is_proven(base, adapter, mode, graphs, bases, adapters, tmp_path):
    said: list[str] = []
    request = Request(str(bases[base]), ((str(adapters[adapter]), None),), mode, graph=str(graphs[base]))
    manifest = export(request, ExportOptions(tmp_path / "out"), remark=said.append)
    assert manifest.given_graph.given == str(graphs[base] / "model.onnx")
    assert any("of the given graph's matrices are the base's by their numbers" in each for each in said)
    report, _ = check(tmp_path / "out")
    assert report.verdict is Verdict.PASS, [case.failures for case in report.cases if case.failures]
