"""Timing: sessions opened anew each round in another order, none taking the cores of another, no block left out."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest

from lora_export.artifact import read_manifest
from lora_export.bench import latency
from lora_export.bench.budget import Budget
from lora_export.bench.latency import ROUNDS, Candidate, Comparison, Race, bound_runs, changing_run, measure
from lora_export.bench.plan import candidates
from lora_export.bench.swap import measure_swap
from lora_export.bench.workloads import source_length, workload_inputs
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.seq2seq_session import open_export
from lora_export.verdict import Verdict


@pytest.fixture
def session(exports) -> partial[AdapterSession]:
    return partial(AdapterSession, exports["bert-dynamic"], "cpu", stop_spinning=True)


def test_the_threads_of_an_idle_session_rest(session):
    options = session().session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_every_round_opens_all_sessions_anew_in_another_order(session):
    opened: list[str] = []

    def opener(name: str) -> AdapterSession:
        opened.append(name)
        return session()

    openers = {name: partial(opener, name) for name in ("base", "export")}
    inputs = workload_inputs(session().manifest.graphs, 100, (2, 4, 0))
    timed = [Candidate("base", "", "base"), Candidate("export", "", "export")]
    comparisons = [Comparison("export", "base"), Comparison("base", "export", 1e9)]
    race = Race((2, 4, 0), dict.fromkeys(openers, inputs), timed, comparisons)
    (workload,) = measure(openers, [race], blocks=7)
    assert opened == ["base", "export", "export", "base"] * (ROUNDS // 2)
    assert [len(variant.samples_ms) for variant in workload.variants] == [14, 14]
    assert [(ratio.variant, ratio.against) for ratio in workload.ratios] == [("export", "base"), ("base", "export")]
    assert [ratio.verdict for ratio in workload.ratios] == [Verdict.NOT_GATED, Verdict.PASS]
    ratios, inverse = (ratio.block_ratios for ratio in workload.ratios)
    assert len(ratios) == 7 and ratios == pytest.approx([1 / ratio for ratio in inverse])
    for variant in workload.variants:
        assert len(variant.warm_ups) == ROUNDS and all(warm.n_runs >= 9 for warm in variant.warm_ups)


def test_one_adapter_is_nothing_to_change_between(exports):
    assert measure_swap(open_export(exports["gpt2-dynamic"], "cpu"), 1, Budget()) == ()


def test_mixed_rows_are_timed_where_there_are_rows_and_adapters_to_mix(session):
    manifest = session().manifest
    assert [c.name for c in candidates(manifest, 1)] == ["base", "merged", "dynamic, no adapter", "dynamic"]
    *_, mixed, changing = candidates(manifest, 4)
    assert mixed.name == "mixed rows" and len(mixed.adapters) == 4 and len(set(mixed.adapters)) > 1
    assert changing.name == "changing rows" and changing.adapters == mixed.adapters
    assert (mixed.is_changing, changing.is_changing) == (False, True)


def test_a_run_of_an_encoder_decoder_is_its_encoder_and_one_step(exports):
    manifest = read_manifest(exports["bart-dynamic"])
    assert source_length(manifest.graphs, 7) == 7
    inputs = workload_inputs(manifest.graphs, 100, (2, 7, 3))
    shapes = {graph: {name: array.shape for name, array in feeds.items()} for graph, feeds in inputs.items()}
    assert list(shapes) == ["encoder_model", "decoder_with_past_model"]
    assert shapes["encoder_model"] == {"input_ids": (2, 7), "attention_mask": (2, 7)}
    step = shapes["decoder_with_past_model"]
    assert (step["input_ids"], step["encoder_attention_mask"]) == ((2, 1), (2, 7))
    assert step["past_key_values.1.decoder.key"] == (2, 2, 3, 16)
    assert step["past_key_values.1.encoder.value"] == (2, 2, 7, 16)
    session = open_export(exports["bart-dynamic"], "cpu", stop_spinning=True)
    bound_runs(session, ["bart-all", None], inputs)()
    bound, loaded = measure_swap(session, 2, Budget(swap_us={"bound": 1e9, "loaded": 1e-9}))
    assert (bound.name, loaded.name, len(bound.samples_us), len(loaded.samples_us)) == ("bound", "loaded", 50, 10)
    assert 0 < bound.low_us <= bound.median_us <= bound.high_us < loaded.median_us
    assert bound.confidence >= 0.95 and loaded.confidence >= 0.95
    assert (bound.verdict, loaded.verdict) == (Verdict.PASS, Verdict.FAIL)
    assert (bound.allowance_us, loaded.allowance_us) == (1e9, 1e-9)


def test_a_speech_models_sources_have_its_own_length(exports):
    manifest = read_manifest(exports["whisper-merged"])
    assert source_length(manifest.graphs, 7) == 50
    inputs = workload_inputs(manifest.graphs, 100, (2, 50, 1))
    assert inputs["encoder_model"]["input_features"].shape == (2, 8, 100)
    assert inputs["decoder_with_past_model"]["past_key_values.0.encoder.key"].shape == (2, 2, 50, 16)
    bound_runs(open_export(exports["whisper-merged"], "cpu"), None, inputs)()


def test_of_a_sample_the_fastest_run_is_compared(monkeypatch):
    """Two graphs of equal cost, one of them disturbed in four runs of five: the ratio is 1, the mean is not."""
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    now, turns = [0.0], itertools.count()

    def run(disturbed: bool) -> None:
        now[0] += 0.001 * (5 if disturbed and next(turns) % 5 else 1)

    quiet, noisy = (latency._sample_ms(partial(run, disturbed), 20) for disturbed in (False, True))
    assert quiet == (pytest.approx(1), pytest.approx(1))
    assert noisy == (pytest.approx(4.2), pytest.approx(1))


def test_a_slow_run_is_a_sample_of_its_own():
    n_runs = []
    latency._sample_ms(lambda: n_runs.append(1), 1)
    assert len(n_runs) == 1


def test_changing_rows_run_another_mix_each_time(exports):
    session = open_export(exports["bert-dynamic"], "cpu")
    names = ["topic", "kind", None]
    inputs = workload_inputs(session.manifest.graphs, 250, (3, 5, 0))["model"]
    run = changing_run(session, names, inputs)
    for turn in (0, 1, 2, 0):
        run()
        expected = session.run(inputs, [*names[turn:], *names[:turn]])["logits"]
        found = run.binding.get_outputs()[0].numpy()
        for row, scores in enumerate(expected):  # `run` masks the classes that a row does not have
            real = scores > np.finfo(np.float32).min
            np.testing.assert_allclose(found[row][real], scores[real], atol=1e-5)
