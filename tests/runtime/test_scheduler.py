"""Texts that join and leave a batch between steps are what PEFT's own `generate` writes for each alone."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from references import unmerged

from lora_export.errors import UsageProblem
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.sampling import Sampling
from lora_export.runtime.scheduler import Finish, Request, Scheduler

LLAMA = ("llama-dynamic", "llama", "LlamaForCausalLM", ("chat", "code"))
GPT2 = ("gpt2-dynamic", "gpt2", "GPT2LMHeadModel", ("poet",))
LENGTHS = [3, 11, 1, 7, 20, 2, 5, 9, 4, 13]
NEW = [12, 5, 9, 1, 7, 12, 3, 10, 6, 8]


class Written:
    """What a scheduler has given, by request."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.ids: dict[Request, list[int]] = defaultdict(list)
        self.finish: dict[Request, Finish] = {}

    def step(self, n: int = 1) -> None:
        for _ in range(n):
            for token in self.scheduler.step():
                assert token.request not in self.finish, "a text went on after its end"
                if token.token_id is not None:
                    self.ids[token.request].append(token.token_id)
                if token.finish:
                    self.finish[token.request] = token.finish

    def all(self) -> None:
        while self.scheduler.n_active or self.scheduler.n_waiting:
            self.step()


@pytest.fixture(scope="module")
def session(exports):
    opened = {}

    def get(export: str) -> AdapterSession:
        if export not in opened:
            opened[export] = AdapterSession(exports[export], "cpu", n_threads=1, stop_spinning=True)
        return opened[export]

    return get


@pytest.fixture(scope="module")
def alone(bases, adapters):
    """The greedy tokens of PEFT's `generate` for one prompt."""
    models = {}

    def get(base: str, model_class: str, adapter: str | None, prompt: list[int], n_new: int) -> list[int]:
        if (base, adapter) not in models:
            models[base, adapter] = unmerged(bases[base], model_class, [adapters[adapter]] if adapter else [])
        ids = torch.tensor([prompt])
        with torch.no_grad():
            whole = models[base, adapter].generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return whole[0, len(prompt) :].tolist()

    return get


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(5, 250, length).tolist() for length in LENGTHS]


@pytest.mark.parametrize("moves", [True, False], ids=["rows move", "rows stay"])
@pytest.mark.parametrize(("export", "base", "model_class", "names"), [LLAMA, GPT2], ids=["shared cache", "columns"])
def test_texts_that_join_between_steps_are_peft_s_of_each_alone(
    export, base, model_class, names, moves, session, alone
):
    """Ten texts of other lengths and adapters in three rows, prompts in chunks of six tokens."""
    scheduler = Scheduler(session(export), max_rows=3, max_length=40, prefill_chunk=6)
    scheduler._rows.can_move = moves
    written, expected = Written(scheduler), {}
    for index, (prompt, n_new) in enumerate(zip(prompts(), NEW, strict=True)):
        adapter = (*names, None)[index % (len(names) + 1)]
        request = scheduler.submit(prompt, adapter, max_new_tokens=n_new)
        expected[request] = alone(base, model_class, adapter, prompt, n_new)
        written.step(index % 3)
    written.all()
    assert {request: written.ids[request] for request in expected} == expected
    assert set(written.finish.values()) == {Finish.LENGTH}
    assert len({tuple(ids) for ids in expected.values()}) > 5


def test_short_prompts_are_read_together(session, monkeypatch):
    scheduler = Scheduler(session("llama-dynamic"), max_rows=4, max_length=20, prefill_chunk=12)
    runs, run = [], scheduler._rows.run
    monkeypatch.setattr(scheduler._rows, "run", lambda new: runs.append([len(each.ids) for each in new]) or run(new))
    for length in (4, 3, 4, 15):
        scheduler.submit([9] * length, "chat", max_new_tokens=2)
    Written(scheduler).all()
    assert runs[:3] == [[4, 3, 4], [12], [1, 1, 1]]
    assert runs[3:] == [[3], [1]]


def test_rows_that_finish_make_room(session):
    scheduler = Scheduler(session("llama-dynamic"), max_rows=2, max_length=20)
    requests = [scheduler.submit([5, 6], max_new_tokens=n) for n in (1, 4, 2)]
    assert (scheduler.n_active, scheduler.n_waiting) == (0, 3)
    written = Written(scheduler)
    written.step()
    assert (scheduler.n_active, scheduler.n_waiting) == (1, 1)
    written.step()
    assert (scheduler.n_active, scheduler.n_waiting) == (2, 0)
    written.all()
    assert [len(written.ids[request]) for request in requests] == [1, 4, 2]


def test_an_end_token_is_the_last(session):
    scheduler = Scheduler(session("llama-dynamic"), max_rows=1, max_length=40)
    written = Written(scheduler)
    whole = scheduler.submit([20, 30, 40], "chat", max_new_tokens=12)
    written.all()
    end = written.ids[whole][4]
    cut = scheduler.submit([20, 30, 40], "chat", max_new_tokens=12, eos_ids={end})
    written.all()
    assert written.ids[cut] == written.ids[whole][: written.ids[whole].index(end) + 1]
    assert written.finish == {whole: Finish.LENGTH, cut: Finish.STOP}


def test_a_text_ends_where_its_row_is_full(session):
    scheduler = Scheduler(session("llama-dynamic"), max_rows=1, max_length=6)
    written = Written(scheduler)
    request = scheduler.submit([20, 30, 40], max_new_tokens=12)
    written.all()
    assert len(written.ids[request]) == 3 and written.finish[request] is Finish.LENGTH


def test_a_request_is_cancelled_wherever_it_is(session):
    scheduler = Scheduler(session("llama-dynamic"), max_rows=1, max_length=20)
    written = Written(scheduler)
    active, waiting, kept = (scheduler.submit([5, 6, 7], max_new_tokens=3) for _ in range(3))
    written.step()
    for request in (active, waiting):
        scheduler.cancel(request)
    written.all()
    assert written.finish == {active: Finish.CANCELLED, waiting: Finish.CANCELLED, kept: Finish.LENGTH}
    assert [len(written.ids[request]) for request in (active, waiting, kept)] == [1, 0, 3]
    scheduler.cancel(kept)
    assert scheduler.step() == []


@pytest.mark.parametrize("change", ["load", "unload"])
def test_a_text_keeps_the_adapter_that_it_was_begun_with(change, exports, alone):
    """And one that is submitted after the change sees it, in the same batch."""
    session = AdapterSession(exports["llama-dynamic"], "cpu", n_threads=1, stop_spinning=True)
    scheduler = Scheduler(session, max_rows=2, max_length=30)
    written, prompt = Written(scheduler), [20, 30, 40, 50]
    old = scheduler.submit(prompt, "chat", max_new_tokens=8)
    written.step(3)
    if change == "load":
        before = session.bank
        session.load(Path(session.folder) / "adapters" / "code.onnx_adapter", "chat")
        of_before = scheduler.submit(prompt, "chat", max_new_tokens=8, bank=before)
        new = scheduler.submit(prompt, "chat", max_new_tokens=8)
    else:
        session.unload("chat")
        with pytest.raises(UsageProblem, match="No adapter 'chat' is loaded"):
            scheduler.submit(prompt, "chat", max_new_tokens=8)
    written.all()
    assert written.ids[old] == alone("llama", "LlamaForCausalLM", "chat", prompt, 8)
    if change == "load":
        assert written.ids[new] == alone("llama", "LlamaForCausalLM", "code", prompt, 8)
        assert written.ids[new] != written.ids[old] == written.ids[of_before]


def test_a_seed_draws_the_same_whoever_else_is_in_the_batch(session):
    warm = Sampling(temperature=1.5, top_k=40, seed=7)

    def texts(n_others: int) -> list[int]:
        scheduler = Scheduler(session("llama-dynamic"), max_rows=4, max_length=30)
        written = Written(scheduler)
        for other in range(n_others):
            scheduler.submit([9 + other] * 5, "code", sampling=Sampling(temperature=1.0), max_new_tokens=9)
        request = scheduler.submit([20, 30, 40], "chat", sampling=warm, max_new_tokens=10)
        written.all()
        return written.ids[request]

    assert texts(0) == texts(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"prompt_ids": []}, "The prompt is empty"),
     ({"prompt_ids": [5] * 20}, "The prompt leaves no room"),
     ({"prompt_ids": [5, 260]}, "a token that the model does not know"),
     ({"prompt_ids": [-1]}, "a token that the model does not know"),
     ({"max_new_tokens": 0}, "Nothing is to be written"),
     ({"adapter": "legal"}, "No adapter 'legal' is loaded")],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_at_once(change, message, session):
    scheduler = Scheduler(session("llama-dynamic"), max_rows=1, max_length=20)
    with pytest.raises(UsageProblem, match=message):
        scheduler.submit(**({"prompt_ids": [5, 6], "max_new_tokens": 3} | change))
    assert scheduler.n_waiting == 0


def test_a_graph_that_writes_no_text_is_refused(exports):
    with pytest.raises(UsageProblem, match="does not write texts from tokens alone") as refused:
        Scheduler(AdapterSession(exports["bert-dynamic"], "cpu"), max_rows=1, max_length=8)
    assert refused.value.found == "a graph without a cache"


def test_more_tokens_than_positions_are_refused(session):
    with pytest.raises(UsageProblem, match="longer than the model's positions") as refused:
        Scheduler(session("gpt2-dynamic"), max_rows=1, max_length=10**6)
    assert refused.value.found == "1000000"


def test_scores_that_are_not_finite_end_their_text_only(session, monkeypatch):
    scheduler = Scheduler(session("llama-dynamic"), max_rows=2, max_length=20)
    run = scheduler._rows.run

    def poisoned(new):
        scores = run(new)
        scores[0] = np.nan
        return scores

    first, second = (scheduler.submit([5, 6, 7], max_new_tokens=3) for _ in range(2))
    written = Written(scheduler)
    written.step()
    monkeypatch.setattr(scheduler._rows, "run", poisoned)
    written.step()
    monkeypatch.setattr(scheduler._rows, "run", run)
    written.all()
    assert written.finish == {first: Finish.FAILED, second: Finish.LENGTH}


def test_a_text_that_cannot_choose_ends_alone(session, monkeypatch):
    scheduler = Scheduler(session("llama-dynamic"), max_rows=2, max_length=20)
    first, second = (scheduler.submit([5, 6, 7], max_new_tokens=3) for _ in range(2))
    written = Written(scheduler)
    written.step()
    error = ValueError("probabilities contain NaN")
    monkeypatch.setattr(scheduler._texts[0].sampler, "choose", lambda scores: (_ for _ in ()).throw(error))
    tokens = {token.request: token for token in scheduler.step()}
    assert (tokens[first].finish, tokens[first].error) == (Finish.FAILED, error)
    written.all()
    assert written.finish == {second: Finish.LENGTH}


@pytest.mark.parametrize("when", ["prompt", "writing"])
def test_an_adapter_that_cannot_be_read_again_ends_its_texts_only(when, exports, alone, tmp_path):
    """Memory has room for one adapter, and the file of another is replaced on disk."""
    folder = tmp_path / "export"
    shutil.copytree(exports["llama-dynamic"], folder)
    sizes = {held.name: held.n_bytes for held in AdapterSession(folder, "cpu").bank.adapters.values()}
    session = AdapterSession(folder, "cpu", n_threads=1, stop_spinning=True, max_bytes=max(sizes.values()))
    scheduler, prompt = Scheduler(session, max_rows=3, max_length=20), [20, 30, 40]
    written = Written(scheduler)
    kept = scheduler.submit(prompt, "code", max_new_tokens=6)
    if when == "writing":
        written.step()
    session.bank.adapters["chat"].drop()
    (folder / "adapters" / "chat.onnx_adapter").write_bytes(b"other")
    lost, base = scheduler.submit(prompt, "chat", max_new_tokens=6), scheduler.submit(prompt, max_new_tokens=6)
    written.all()
    assert written.finish == {kept: Finish.LENGTH, lost: Finish.FAILED, base: Finish.LENGTH}
    assert written.ids[kept] == alone("llama", "LlamaForCausalLM", "code", prompt, 6)
    assert written.ids[base] == alone("llama", "LlamaForCausalLM", None, prompt, 6)


def test_a_row_that_is_free_keeps_no_adapter(session):
    scheduler = Scheduler(session("llama-dynamic"), max_rows=2, max_length=20)
    for name in ("chat", "code"):
        scheduler.submit([5, 6], name, max_new_tokens=2)
    Written(scheduler).all()
    assert scheduler._rows._adapters == [(), ()]


def test_after_a_clear_nothing_waits_or_is_written(session):
    scheduler = Scheduler(session("llama-dynamic"), max_rows=1, max_length=20)
    first, _ = (scheduler.submit([5, 6], max_new_tokens=4) for _ in range(2))
    scheduler.step()
    scheduler.cancel(first)
    scheduler.clear()
    assert (scheduler.n_active, scheduler.n_waiting, scheduler.step()) == (0, 0, [])
