"""Timing: sessions opened anew each round in another order, on one pool of threads, and every block complete."""

from __future__ import annotations

from functools import partial

import pytest

from lora_export.runtime.adapter_session import AdapterSession
from lora_export.verify.bench import candidates
from lora_export.verify.latency import ROUNDS, Candidate, Race, measure
from lora_export.verify.workloads import random_inputs


@pytest.fixture
def session(exports) -> partial[AdapterSession]:
    return partial(AdapterSession, exports["bert-dynamic"], "cpu", share_threads=True)


def test_timed_sessions_share_their_threads(session):
    assert not session().session.get_session_options().use_per_session_threads
    assert AdapterSession(session.args[0], "cpu").session.get_session_options().use_per_session_threads


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
