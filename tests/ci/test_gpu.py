"""The stages of a GPU run as far as a CPU allows: the bundle gives the same bytes again, runs are timed, nothing is faked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_tables
import numpy as np
import onnx_ir as ir
import pytest
from gpu import captured_stage, plan, swaps_stage
from gpu.adapter_layers import write_adapter_layers
from gpu.attention_stage import FORMS, _heads_first, _run
from gpu.bundle import Writer, restore
from gpu.provider_stage import answer_adapter_copies, answer_operand_rank, answer_rank_zero
from gpu.stage import Stage
from gpu.timing import Candidate, candidate_runs, race, ratio_lines
from readme_tables import table_in_readme

from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.session import cuda_problem

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", ["ci/gpu", "ci/demo", "ci/test", "ci/setup", "ci/report_accessibility", ".ci/run"])
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", ROOT / script], capture_output=True).returncode == 0


def gpu_run(*options: str | Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(["bash", ROOT / "ci/gpu", *options], env=environment, capture_output=True, text=True)


def test_every_stage_is_listed_with_its_module():
    listed = gpu_run("--list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == [stage.name for stage in plan.STAGES]
    for stage in plan.STAGES:
        assert (ROOT / f"ci/benchmarks/gpu/{stage.name}_stage.py").exists()


def test_a_stage_is_owed_until_a_gpu_has_run_it(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    assert list(plan.owed()) == [stage.name for stage in plan.STAGES]
    for name, provider in (("attention", "cuda"), ("swaps", "cpu")):
        (tmp_path / f"gpu-{name}.json").write_text(json.dumps({"environment": {"provider": provider}}))
    assert "attention" not in plan.owed() and plan.owed()["swaps"] == "no result of a GPU"


def test_a_stage_is_owed_again_when_the_graphs_changed(tmp_path, monkeypatch):
    git = ["git", "log", "-2", "--format=%H", "--", "lora_export/graph"]
    commits = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.split()
    if len(commits) < 2:
        pytest.skip("no history here")
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    made = {"decode": commits[0], "swaps": commits[1], "attention": commits[1], "peers": "0" * 40}
    for name, commit in made.items():
        result = {"environment": {"provider": "cuda"}, "bundle_commit": commit}
        (tmp_path / f"gpu-{name}.json").write_text(json.dumps(result))
    found = plan.owed()
    assert "decode" not in found and "attention" not in found
    assert found["swaps"] == "1 changes of the graphs since its exports were made"
    assert found["peers"] == "its exports were made at 0000000, which this history lacks"


@pytest.fixture(scope="module")
def bundle(exported, tmp_path_factory) -> Path:
    """A dynamic export as a real one, whose base is a source, and as a random one."""
    folder, base = exported
    out = tmp_path_factory.mktemp("bundle")
    writer = Writer(out)
    writer.add_source(base, "base")
    writer.add_export(folder, "real", real=True)
    writer.add_export(folder, "random", real=False)
    writer.close()
    return out


@pytest.fixture(scope="module")
def exported(exports, bases) -> tuple[Path, Path]:
    return exports["llama-dynamic"], bases["llama"]


def test_a_real_export_comes_back_byte_for_byte(bundle, exported, tmp_path):
    back = restore(bundle, "real", tmp_path)
    for name in ("model.onnx", "model.onnx.data", "lora_export.json"):
        assert (back / name).read_bytes() == (exported[0] / name).read_bytes()
    weights = json.loads((back / "weights.json").read_text())["model.onnx.data"]["tensors"]
    assert any(tensor["source"] == "base/model.safetensors" for tensor in weights), "nothing is stored twice"


def test_a_random_export_has_the_same_files_and_other_numbers(bundle, exported, tmp_path):
    back = restore(bundle, "random", tmp_path)
    data, original = (folder / "model.onnx.data" for folder in (back, exported[0]))
    assert data.stat().st_size == original.stat().st_size and data.read_bytes() != original.read_bytes()
    assert json.loads((back / "lora_export.json").read_text())["adapters"] == []
    assert restore(bundle, "random", tmp_path / "again").joinpath("model.onnx.data").read_bytes() == data.read_bytes()


def test_candidates_are_timed_side_by_side(bundle, tmp_path):
    folder = restore(bundle, "random", tmp_path)
    candidates = [
        Candidate("no adapter", folder, 1, 0),
        Candidate("one adapter", folder, 1, 4),
        Candidate("another in each row", folder, 2, 4),
        Candidate("too many rows", folder, 3, 4),
    ]
    runs, failed = candidate_runs(candidates, "cpu", (2, 1, 3), 40, {})
    assert list(runs) == ["no adapter", "one adapter", "another in each row"]
    assert list(failed) == ["too many rows"]
    found = race(runs, [("one adapter", "no adapter")], 6)
    assert found["blocks"] == 6 and found["ratios"][0]["median"] > 0
    assert "× no adapter" in ratio_lines(found)[0]


def test_swaps_are_rehearsed(exported, tmp_path):
    """Every way of changing adapters, and the composition's numbers beside those that the host stacks."""
    writer = Writer(tmp_path / "bundle")
    writer.add_export(exported[0], "llama-all-float16", real=False)
    writer.close()
    found = swaps_stage.run(Stage("swaps", tmp_path / "bundle", tmp_path, tmp_path, "cpu", 6, small=True))
    assert found["inputs_that_differ"] == [] and found["median_us"]["a new composition of all rows"] > 0
    assert json.loads((tmp_path / "gpu-swaps.json").read_text())["median_us"]


def test_captured_sessions_are_rehearsed(exported, exports, tmp_path, monkeypatch):
    """Both sessions without a CUDA graph here, so with the same outputs."""
    writer = Writer(tmp_path / "bundle")
    writer.add_export(exported[0], "llama-all-float16", real=False)
    writer.add_export(exports["bert-dynamic"], "encoder-dynamic-float16", real=False)
    writer.close()
    found = captured_stage.run(Stage("captured", tmp_path / "bundle", tmp_path, tmp_path, "cpu", 6, small=True))
    assert not found["failed"] and len(found["steps"]) == 2
    for each in (*found["encoder"].values(), *found["steps"].values()):
        assert each["largest difference"] < 1e-4
    assert found["encoder"]["2 × 6"]["between the adapters"] > 1e-3
    monkeypatch.setattr(gpu_tables, "RESULTS", tmp_path)
    encoders, steps = gpu_tables._captured()
    assert "| 2 × 6 |" in encoders and "| 8 rows on 5 |" in steps


def test_the_forms_of_attention_agree(tmp_path):
    stage = Stage("attention", tmp_path, tmp_path, tmp_path, "cpu", 6, small=True)
    shape = (2, 1, 5)
    outputs = {}
    for name, build in FORMS.items():
        run = _run(stage, *build("float32", *shape), shape, "float32")
        run()
        outputs[name] = _heads_first(run.outputs["y"].numpy(), shape)
    for y in outputs.values():
        assert np.abs(y - outputs["expanded"]).max() < 1e-5


def test_questions_are_answered_on_the_cpu():
    assert set(answer_rank_zero("cpu").values()) == {"zeros"}
    assert answer_operand_rank("cpu")["[1, in, rank] / 2-D"] > 0
    assert answer_adapter_copies("cpu")["bound"] > 0


@pytest.mark.skipif(cuda_problem() is None, reason="CUDA is usable here")
def test_cuda_is_refused_where_it_is_not_usable(bundle, tmp_path):
    done = gpu_run("provider", "parity", "--bundle", bundle, "--results", tmp_path)
    assert done.returncode == 4
    assert "CUDA provider was asked for and is not usable here" in done.stderr
    assert "Traceback" not in done.stderr and "parity" not in done.stderr


def test_the_page_has_the_tables_of_the_results():
    assert gpu_tables.tables() == table_in_readme("gpu_tables")


@pytest.mark.parametrize(("kind", "n_after"), [("L", 1), ("H", 2)])
def test_adapter_layers_lie_behind_the_papers_modules(kind, n_after, exports, own, tmp_path):
    """They change the result, cost what they should, and leave the base's weights where they are."""
    base = own(exports["gpt2-merged"])  # ONNX's checker refuses weights with two names
    out = write_adapter_layers(base, tmp_path / kind, kind, 4000)
    added = len(ir.load(out / "model.onnx").graph) - len(ir.load(base / "model.onnx").graph)
    n_layers = 2
    assert added == n_layers * n_after * (7 if kind == "L" else 6)
    sessions = [AdapterSession(folder, "cpu") for folder in (base, out)]
    ids = np.array([[3, 5, 7]])
    found, other = (each.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"] for each in sessions)
    assert found.shape == other.shape and np.abs(found - other).max() > 1e-4
