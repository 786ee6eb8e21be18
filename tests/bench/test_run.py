"""What `bench` makes of figures that are missing or not settled: said or refused, never passed over."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lora_export.bench import latency, memory
from lora_export.bench.latency import bound_runs
from lora_export.bench.memory_job import MemoryJob
from lora_export.bench.plan import BenchOptions, BenchPlan, plan_bench
from lora_export.bench.results import Memory, Variant, WarmUp, Workload
from lora_export.bench.run import _race, _unsettled, measure_memory
from lora_export.errors import EnvironmentUnusable
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import bench
from lora_export.runtime.seq2seq_session import open_export
from lora_export.verdict import Verdict


def planned(folder: Path, tmp_path: Path, budget: str = "") -> BenchPlan:
    path = None
    if budget:
        path = tmp_path / "budget.toml"
        path.write_text(budget, encoding="utf-8")
    return plan_bench(folder, BenchOptions("cpu", [(1, 4, 0), (2, 8, 0)], budget=path))


def folders(folder: Path) -> dict[str, Path]:
    return {"export": folder, "base": folder / "base", "merged": folder / "merged"}


def quiet(stage: str, done: int, total: int) -> None:
    pass


def test_each_variant_has_a_process_that_runs_all_its_workloads(exports, tmp_path, monkeypatch):
    jobs: list[MemoryJob] = []

    def peaks(job: MemoryJob) -> dict[str, float]:
        jobs.append(job)
        return {"process": 100.0 * len(jobs), "device": 1000.0}

    monkeypatch.setattr(memory, "peaks_mb", peaks)
    folder = exports["bert-dynamic"]
    plan = planned(folder, tmp_path, "[memory_mb]\nbase = 99\nmerged = 201\n[device_memory_mb]\ndynamic = 999")
    found: list[Memory] = []
    notes = measure_memory(plan, folders(folder), "cuda", progress=quiet, found=found)
    ran = {Path(job.folder).name: [shape for shape, _, _ in job.runs] for job in jobs[:2]}
    assert ran == {"base": [(1, 4, 0), (2, 8, 0)], "merged": [(1, 4, 0), (2, 8, 0)]}
    assert jobs[3].runs == [((1, 4, 0), "topic", False), ((2, 8, 0), "topic", False)]
    assert jobs[4].runs == [((2, 8, 0), ["topic", "kind"], False)], "rows are mixed where there are two"
    assert jobs[5].runs == [((2, 8, 0), ["topic", "kind"], True)]
    process = {m.variant: (m.peak_mb, m.verdict) for m in found if m.place == "process"}
    assert process["base"] == (100.0, Verdict.FAIL) and process["merged"] == (200.0, Verdict.PASS)
    assert process["dynamic"] == (400.0, Verdict.NOT_GATED)
    device = {m.variant: m.verdict for m in found if m.place == "device"}
    assert device["dynamic"] is Verdict.FAIL and device["base"] is Verdict.NOT_GATED
    assert notes == ()


def test_an_unknown_peak_is_absent_and_said(exports, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "peaks_mb", lambda job: {"process": 5.0})
    folder = exports["bert-dynamic"]
    found: list[Memory] = []
    notes = measure_memory(planned(folder, tmp_path), folders(folder), "cuda", progress=quiet, found=found)
    assert {m.place for m in found} == {"process"}
    (note,) = notes
    assert note.startswith("Memory on the GPU: unknown, nvidia-smi does not name the process")
    assert measure_memory(planned(folder, tmp_path), folders(folder), "cpu", progress=quiet, found=[]) == ()


def test_an_unknown_peak_with_an_allowance_is_no_pass(exports, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "peaks_mb", lambda job: {})
    folder = exports["bert-dynamic"]
    with pytest.raises(EnvironmentUnusable, match="memory that this machine does not tell") as caught:
        measure_memory(
            planned(folder, tmp_path, "[memory_mb]\ndynamic = 9"), folders(folder), "cpu", progress=quiet, found=[]
        )
    assert "dynamic: no figure for the process" in str(caught.value)


def test_another_export_gets_the_same_inputs_in_its_own_dtype(exports):
    """Decoders take the cache in the dtype that they compute in."""
    plan = plan_bench(exports["llama-base"], BenchOptions("cpu", [(2, 1, 4)], against=exports["llama-f16-merged"]))
    race = _race(plan, plan.races[0])
    exported, other = race.inputs["export"]["model"], race.inputs["against"]["model"]
    past = "past_key_values.0.key"
    assert (exported[past].dtype, other[past].dtype) == (np.float32, np.float16)
    np.testing.assert_array_equal(exported[past].astype(np.float16), other[past])
    np.testing.assert_array_equal(exported["input_ids"], other["input_ids"])
    bound_runs(open_export(exports["llama-f16-merged"], "cpu"), None, race.inputs["against"])()


def test_a_warm_up_that_was_cut_is_named():
    settled, cut = WarmUp(9, 0.2, True), WarmUp(9, 2.0, False)

    def variant(name: str, *warm_ups: WarmUp) -> Variant:
        return Variant(name, "", (1.0,), (1.0,), 1.0, 1.0, warm_ups)

    quick = Workload(1, 8, 0, (variant("base", settled, settled), variant("dynamic", settled, settled)), ())
    noisy = Workload(4, 8, 2, (variant("base", settled, cut), variant("dynamic", cut, cut)), ())
    assert _unsettled([quick]) == ()
    (note,) = _unsettled([quick, noisy])
    assert note.endswith(
        "settled: base, 4 × 8 on 2 tokens (1 of 2 rounds); dynamic, 4 × 8 on 2 tokens (2 of 2 rounds)."
    )


def test_a_crash_in_the_last_shape_loses_nothing_that_was_measured(exports, own, monkeypatch, short_timing):
    folder = own(exports["classifier-dynamic"])
    original, samples = latency._sample_ms, []

    def raises_in_the_second_round(run, repeats):
        samples.append(repeats)
        if len(samples) > 40:
            raise MemoryError("no memory left")
        return original(run, 1)

    monkeypatch.setattr(latency, "_sample_ms", raises_in_the_second_round)
    with pytest.raises(MemoryError, match="no memory left"):
        bench(folder, SourceOverrides(), BenchOptions("cpu", [(1, 4, 0), (2, 4, 0)], blocks=8, max_ratio=100.0))
    stored = json.loads((folder / "reports/bench.json").read_text())
    assert (stored["partial"], stored["stopped"]) == (True, "MemoryError: no memory left")
    assert stored["memory"] and stored["placements"]
    (first, *_) = stored["workloads"]
    assert first["name"] == "1 × 4 tokens"
    n_samples = {len(variant["samples_ms"]) for variant in first["variants"]}
    assert len(n_samples) == 1 and n_samples.pop() % 2 == 0, "whole blocks only"
    assert stored["verdict"] == "ambiguous", "too few blocks to say that an allowance is kept"
    for suffix in ("html", "md", "junit.xml"):
        text = (folder / f"reports/bench.{suffix}").read_text()
        assert "Partial report: stopped by MemoryError: no memory left." in text
    assert '<error type="stopped"' in text
