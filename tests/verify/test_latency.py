"""Timing: sessions opened anew each round in another order, none taking the cores of another, no block left out."""

from __future__ import annotations

from functools import partial

import pytest

from lora_export.artifact import read_manifest
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.seq2seq_session import open_export
from lora_export.verify.bench import candidates
from lora_export.verify.latency import ROUNDS, Candidate, Race, bound_runs, measure, measure_swap
from lora_export.verify.workloads import source_length, workload_inputs


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
    inputs = workload_inputs(session().manifest.graphs, 100, 2, 4, 0)
    race = Race((2, 4, 0), inputs, [Candidate("base", "", "base"), Candidate("export", "", "export")])
    (workload,) = measure(openers, [race], blocks=7, max_ratio=None)
    assert opened == ["base", "export", "export", "base"] * (ROUNDS // 2)
    assert [len(variant.samples_ms) for variant in workload.variants] == [14, 14]
    assert [len(ratio.block_ratios) for ratio in workload.ratios] == [7]


def test_mixed_rows_are_timed_where_there_are_rows_and_adapters_to_mix(session):
    manifest = session().manifest
    assert [c.name for c in candidates(manifest, 1)] == ["base", "merged", "dynamic, no adapter", "dynamic"]
    *_, last = candidates(manifest, 4)
    assert last.name == "mixed rows" and len(last.adapters) == 4 and len(set(last.adapters)) > 1


def test_a_run_of_an_encoder_decoder_is_its_encoder_and_one_step(exports):
    manifest = read_manifest(exports["bart-dynamic"])
    assert source_length(manifest.graphs, 7) == 7
    inputs = workload_inputs(manifest.graphs, 100, 2, 7, 3)
    shapes = {graph: {name: array.shape for name, array in feeds.items()} for graph, feeds in inputs.items()}
    assert list(shapes) == ["encoder_model", "decoder_with_past_model"]
    assert shapes["encoder_model"] == {"input_ids": (2, 7), "attention_mask": (2, 7)}
    step = shapes["decoder_with_past_model"]
    assert (step["input_ids"], step["encoder_attention_mask"]) == ((2, 1), (2, 7))
    assert step["past_key_values.1.decoder.key"] == (2, 2, 3, 16)
    assert step["past_key_values.1.encoder.value"] == (2, 2, 7, 16)
    session = open_export(exports["bart-dynamic"], "cpu", stop_spinning=True)
    bound_runs(session, ["bart-all", None], inputs)()
    swap = measure_swap(session, 2, n=10)
    assert swap.bound_us > 0 and swap.loaded_us > swap.bound_us


def test_a_speech_models_sources_have_its_own_length(exports):
    manifest = read_manifest(exports["whisper-merged"])
    assert source_length(manifest.graphs, 7) == 50
    inputs = workload_inputs(manifest.graphs, 100, 2, 50, 1)
    assert inputs["encoder_model"]["input_features"].shape == (2, 8, 100)
    assert inputs["decoder_with_past_model"]["past_key_values.0.encoder.key"].shape == (2, 2, 50, 16)
    bound_runs(open_export(exports["whisper-merged"], "cpu"), None, inputs)()
