"""When texts that wait are given free rows."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.admission import Admission
from lora_export.runtime.scheduler import Scheduler

SHORT, LONG = [1] * 8, [1] * 90


@pytest.mark.parametrize(
    ("provider", "n_free", "waiting"),
    [
        ("cuda", 3, [SHORT]),  # all that wait have room
        ("cuda", 3, [SHORT] * 3),
        ("cuda", 16, [SHORT] * 30),  # nothing else runs
        ("cuda", 2, [SHORT, LONG * 2, SHORT]),  # the next two do not fit one run
        ("cpu", 2, [SHORT, LONG, SHORT]),  # padding would cost more than a run
        ("cuda", 0, [SHORT] * 4),
    ],
)
def test_nobody_is_held_back_for_nothing(provider, n_free, waiting):
    admission = Admission(16, 256, provider)
    assert all(admission.is_due(n_free, waiting) for _ in range(20))


@pytest.mark.parametrize(("provider", "prompt"), [("cpu", SHORT), ("cpu", LONG), ("cuda", LONG)])
def test_rows_are_filled_together_after_half_a_step_of_all_rows(provider, prompt):
    """One row is free for eight steps, or a second one joins it after four: 4 + 2 · 2 rows."""
    admission, waiting = Admission(16, 256, provider), [prompt] * 9
    assert [admission.is_due(1, waiting) for _ in range(9)] == [False] * 7 + [True, False]
    admission = Admission(16, 256, provider)
    found = [admission.is_due(n_free, waiting) for n_free in (1, 1, 1, 1, 2, 2, 1)]
    assert found == [False] * 5 + [True, False]


def test_rows_that_stay_apart_are_filled_at_once():
    admission = Admission(16, 256, "cuda", has_gaps=True)
    assert all(admission.is_due(1, [SHORT] * 9) for _ in range(9))


def test_a_prompt_joins_others_where_padding_costs_less_than_a_run():
    cpu, cuda = Admission(16, 256, "cpu"), Admission(16, 256, "cuda")
    assert cpu.saved([40], 40) == cpu.saved([5, 5], 5) == 24, "a run"
    assert cpu.saved([40, 40], 20) == 4 and cpu.saved([20, 20], 40) == -16, "a run, but for the padding"
    assert cuda.saved([20, 20], 40) == 216
    assert cuda.saved([130], 120) < 0, "more than the chunk"


def test_a_full_scheduler_reads_prompts_together(exports, monkeypatch):
    """60 texts in 8 rows: the same tokens in fewer runs."""
    session, n_runs, found = AdapterSession(exports["llama-dynamic"], "cpu"), [], []
    for patience in (0, 0.5):
        monkeypatch.setattr("lora_export.runtime.admission._PATIENCE", patience)
        scheduler = Scheduler(session, max_rows=8, max_length=48)
        rng, run = np.random.default_rng(1), scheduler._rows.run
        n_runs.append(0)

        def counted(new, run=run):
            n_runs[-1] += 1
            return run(new)

        scheduler._rows.run = counted
        texts = [scheduler.submit(rng.integers(5, 90, 6).tolist(), "chat", max_new_tokens=int(n))
                 for n in rng.integers(3, 14, 60)]  # fmt: skip
        written = {text: [] for text in texts}
        while scheduler.n_active or scheduler.n_waiting:
            for token in scheduler.step():
                written[token.request].append(token.token_id)
        found.append([written[text] for text in texts])
    assert found[0] == found[1]
    assert n_runs[1] < 0.95 * n_runs[0]
