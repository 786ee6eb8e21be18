"""Greedy generation is judged token by token: a wrong token is caught, a tie is none, and neither spoils the rest."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export.base.tasks import Task
from lora_export.check.cases import decoding
from lora_export.check.cases.examination import Examination, Examined
from lora_export.check.context import CheckContext
from lora_export.check.inputs.batcher import Batcher
from lora_export.check.inputs.examples import built_in_examples
from lora_export.check.judge.tolerances import tolerances
from lora_export.check.locate.where import Where
from lora_export.check.reference.trained import TrainedAdapter
from lora_export.check.reference.unmerged import Reference
from lora_export.runtime.adapter_session import AdapterSession


def decoded(session: AdapterSession, reference: Reference, batcher: Batcher) -> Examination:
    """The decoding cases of `chat`; they use nothing of a check but its session and limits."""
    limits = tolerances("float32", "cpu")
    context = CheckContext(None, session, Task.TEXT_GENERATION, limits, with_precise=False, own={}, mixed=None)
    examination = Examination(context, Where(limits, session.folder))
    decoding.decoding_cases(examination, Examined("chat", "chat", reference), batcher, examples=built_in_examples())
    return examination


@pytest.fixture
def greedy(exports, bases, adapters, monkeypatch):
    """The greedy case of the llama with `chat`, with tokens changed by `change(continuations)` on the way."""
    session = AdapterSession(exports["llama-dynamic"], "cpu")
    reference = Reference(
        Task.TEXT_GENERATION, bases["llama"], [TrainedAdapter(adapters["chat"])], dtype="float32", n_labels=None
    )
    batcher = Batcher(exports["llama-dynamic"], Task.TEXT_GENERATION, session.manifest.contract)
    original, judge = decoding.generate, decoding.greedy_case

    def run(change=lambda continuations: None, noise: float | None = None):
        def generate(*args, **options):
            found = original(*args, **options)
            change(found)
            return found

        monkeypatch.setattr(decoding, "generate", generate)
        if noise is not None:
            monkeypatch.setattr(
                decoding, "greedy_case", lambda label, behind, _, limits: judge(label, behind, noise, limits=limits)
            )
        return decoded(session, reference, batcher).cases[-1]

    return run


def test_the_built_in_examples_pad_a_decoder_on_the_left(exports, bases, adapters, monkeypatch):
    """Without padding in it, a graph that reads padding would pass."""
    seen = []
    session = AdapterSession(exports["llama-dynamic"], "cpu")
    original = session.run
    monkeypatch.setattr(
        session, "run", lambda inputs, *rest, **cache: seen.append(inputs) or original(inputs, *rest, **cache)
    )
    reference = Reference(
        Task.TEXT_GENERATION, bases["llama"], [TrainedAdapter(adapters["chat"])], dtype="float32", n_labels=None
    )
    batcher = Batcher(exports["llama-dynamic"], Task.TEXT_GENERATION, session.manifest.contract)
    cases = decoded(session, reference, batcher).cases
    assert all(case.passed for case in cases)
    whole, prompts = seen[0]["attention_mask"], seen[-32]["attention_mask"]
    for mask in (whole, prompts):
        assert len(set(mask.sum(axis=1).tolist())) == 4, "rows of four lengths"
        assert (np.diff(mask, axis=1) >= 0).all(), "padded on the left"


def change_the_last_token(continuations: list[list[int]]) -> None:
    """Nothing follows it."""
    continuations[0][-1] = (continuations[0][-1] + 1) % 260


def test_a_sound_graph_agrees_in_every_token(greedy):
    case = greedy()
    assert case.passed and case.value("top1") == 1 and case.largest_error is None


def test_one_wrong_token_is_caught(greedy):
    case = greedy(change_the_last_token)
    assert case.value("top1") == pytest.approx(1 - 1 / 128)
    assert not case.passed and "greedy tokens agree" in case.failures[0]


def test_continuations_of_other_rows_are_caught(greedy):
    case = greedy(lambda continuations: continuations.reverse())
    assert not case.passed and case.value("top1") < 0.9


def test_a_token_within_the_noise_of_the_best_is_a_tie(greedy):
    assert greedy(change_the_last_token, noise=1e6).passed


def test_the_distance_to_the_best_token_is_measured_after_those_before_it():
    logits = np.array([[[9.0, 1, 2], [0, 5, 4], [7, 7, 0], [1, 1, 1]]], np.float32)

    class Fixed:
        def run(self, inputs, *, n_generated):
            assert inputs["input_ids"].tolist() == [[2, 0, 1, 2]] and n_generated == 2
            return {"logits": logits}

    assert decoding._behind(Fixed(), [2, 0], [1, 2]).tolist() == [0, 7]
