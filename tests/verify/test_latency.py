"""Timing: sessions opened anew each round in another order, none taking the cores of another, no block left out."""

from __future__ import annotations

from functools import partial

import pytest

from lora_export.runtime.adapter_session import AdapterSession
from lora_export.verify.bench import candidates
from lora_export.verify.latency import ROUNDS, Candidate, Race, measure
from lora_export.verify.workloads import random_inputs


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
    inputs = random_inputs(session().manifest.contract, 100, 2, 4, 0)
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
