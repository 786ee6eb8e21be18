"""Targets that join and leave between steps are what PEFT's own `generate` writes for each source alone."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from references import unmerged
from tiny import VOCABULARY

from lora_export.errors import InputRefused, UsageProblem
from lora_export.runtime.sampling import Sampling
from lora_export.runtime.scheduler import Finish, Request
from lora_export.runtime.seq2seq_scheduler import Seq2SeqScheduler
from lora_export.runtime.seq2seq_session import Seq2SeqSession
from lora_export.runtime.targets import TargetRules, settings_not_done, speech_start

CLASSES = {"t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration"}
CLASSES["whisper"] = "WhisperForConditionalGeneration"
LENGTHS, NEW = [3, 11, 1, 7, 20, 2, 5, 9], [9, 5, 9, 1, 7, 8, 3, 6]


@pytest.fixture(scope="module")
def session(exports):
    opened = {}

    def get(base: str) -> Seq2SeqSession:
        if base not in opened:
            opened[base] = Seq2SeqSession(exports[f"{base}-dynamic"], "cpu", n_threads=1, stop_spinning=True)
        return opened[base]

    return get


@pytest.fixture(scope="module")
def peft(bases, adapters):
    models = {}

    def get(base: str, adapter: str | None):
        if (base, adapter) not in models:
            model = unmerged(bases[base], CLASSES[base], [adapters[adapter]] if adapter else [])
            # PEFT's wrapper of this task takes token ids only; its layers are in the model.
            models[base, adapter] = getattr(model, "get_base_model", lambda model=model: model)()
        return models[base, adapter]

    return get


def alone(model, ids: list[int], n_new: int, **options) -> list[int]:
    """The greedy target that PEFT's `generate` gives one source, without its start and end token."""
    given = torch.tensor([ids])
    with torch.no_grad():
        whole = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=n_new, do_sample=False, num_beams=1, use_cache=False,
            **options,
        )[0].tolist()  # fmt: skip
    return [token for token in whole[1:] if token != 2]


class Written:
    """What a scheduler has given, by request."""

    def __init__(self, scheduler: Seq2SeqScheduler) -> None:
        self.scheduler = scheduler
        self.ids: dict[Request, list[int]] = defaultdict(list)
        self.start: dict[Request, list[int]] = defaultdict(list)
        self.finish: dict[Request, Finish] = {}
        self.most_groups = 0

    def step(self, n: int = 1) -> None:
        for _ in range(n):
            for token in self.scheduler.step():
                assert token.request not in self.finish, "a text went on after its end"
                into = self.start if token.is_start else self.ids
                if token.token_id is not None and token.finish is not Finish.STOP:
                    into[token.request].append(token.token_id)
                if token.finish:
                    self.finish[token.request] = token.finish
            self.most_groups = max(self.most_groups, len(self.scheduler._groups))

    def all(self) -> None:
        while self.scheduler.n_active or self.scheduler.n_waiting:
            self.step()


def source(ids: list[int]) -> dict[str, np.ndarray]:
    return {"input_ids": np.array(ids, np.int64)}


@pytest.mark.parametrize("base", ["t5", "bart"])
def test_texts_that_join_between_steps_are_peft_s_of_each_alone(base, session, peft):
    found = session(base)
    names = (*found.adapters, None)
    scheduler, expected = Seq2SeqScheduler(found, max_rows=5, max_source_tokens=30), {}
    written, rng = Written(scheduler), np.random.default_rng(4)
    for index, (length, n_new) in enumerate(zip(LENGTHS, NEW, strict=True)):
        adapter, ids = names[index % 3], rng.integers(5, 250, length).tolist()
        request = scheduler.submit(source(ids), adapter, rules=found.rules(adapter), max_new_tokens=n_new)
        expected[request] = alone(peft(base, adapter), ids, n_new)
        written.step(index % 3)
    written.all()
    assert {request: written.ids[request] for request in expected} == expected
    assert len({tuple(ids) for ids in expected.values()}) > 5 and written.most_groups > 1
    for request, ids in expected.items():
        assert written.finish[request] is (Finish.LENGTH if len(ids) == request.max_new_tokens else Finish.STOP)


@pytest.mark.parametrize(("most", "sizes"), [(99, [1, 1, 1]), (100, [2, 1]), (149, [2, 1]), (150, [3]), (None, [3])])
def test_sounds_begin_together_as_far_as_their_frames_are_bounded(session, most, sizes):
    """A sound of 100 frames counts as 50 tokens."""
    found, features = session("whisper"), np.zeros((8, 100), np.float32)
    scheduler = Seq2SeqScheduler(found, max_rows=5, max_source_tokens=most)
    for _ in range(3):
        scheduler.submit({"input_features": features}, rules=found.rules(), start=[1], max_new_tokens=9, eos_ids=())
    began, before = [], 0
    while scheduler.n_waiting:
        scheduler.step()
        began.append(scheduler.n_active - before)
        before = scheduler.n_active
    assert began == sizes


def test_blends_and_sampled_texts_do_not_depend_on_their_neighbours(session):
    found = session("bart")
    blend, sampling = {"bart-attention": 0.5, "bart-all": 0.5}, Sampling(temperature=1.5, seed=5)
    how = {"max_new_tokens": 6, "eos_ids": ()}
    rows = [([9, 8, 7], blend, None), ([30] * 12, "bart-all", sampling), ([40, 41], None, sampling)]
    by_itself = []
    for ids, adapter, chosen in rows:
        scheduler = Seq2SeqScheduler(found, max_rows=1)
        request = scheduler.submit(source(ids), adapter, rules=found.rules(), sampling=chosen, **how)
        (written := Written(scheduler)).all()
        by_itself.append(written.ids[request])
    written = Written(scheduler := Seq2SeqScheduler(found, max_rows=3))
    requests = [
        scheduler.submit(source(ids), adapter, rules=found.rules(), sampling=chosen, **how)
        for ids, adapter, chosen in rows
    ]
    written.all()
    assert [written.ids[request] for request in requests] == by_itself
    (greedy,) = found.generate({"input_ids": np.array([[30] * 12]), "attention_mask": np.ones((1, 12), np.int64)},
                               "bart-all", max_new_tokens=6, eos_ids=())  # fmt: skip
    assert greedy != by_itself[1]


def test_suppressed_tokens_are_as_in_transformers(exports, own, peft):
    folder = own(exports["bart-dynamic"])
    ids = [20, 30, 40, 50, 60]
    free = alone(peft("bart", "bart-all"), ids, 8)
    never, first = sorted(set(free[:3])), [int(token) for token in range(100, 180)]
    fields = {"decoder_start_token_id": 2, "eos_token_id": 2, "suppress_tokens": never[:1], "begin_suppress_tokens": first,
              "bad_words_ids": [[token] for token in never[1:]] + [[2], [5, 6]]}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(fields))
    session = Seq2SeqSession(folder, "cpu", n_threads=1)
    how = {"suppress_tokens": never[:1], "begin_suppress_tokens": first, "bad_words_ids": [[t] for t in never[1:]]}
    expected = alone(peft("bart", "bart-all"), ids, 8, **how)
    given = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, 5), np.int64)}
    assert session.generate(given, "bart-all", max_new_tokens=8) == [expected]
    assert session.generate(given, "bart-all", max_new_tokens=8, suppress=False) == [free]
    assert expected != free and not set(expected) & set(never)
    assert session.rules().eos_ids == {2} and 2 not in session.rules().suppressed


LANGUAGES = {"<|de|>": 10, "<|en|>": 11, "<|fr|>": 12}
SPEECH = {"decoder_start_token_id": 1, "eos_token_id": 2, "lang_to_id": LANGUAGES, "is_multilingual": True,
          "task_to_id": {"transcribe": 20, "translate": 21}, "no_timestamps_token_id": 30}  # fmt: skip


def test_the_language_of_speech_is_found_as_transformers_finds_it(session, peft, exports, own):
    found, features = session("whisper"), np.random.default_rng(3).standard_normal((3, 8, 100)).astype(np.float32)
    adapters = ["whisper-all", None, "whisper-attention"]
    scheduler = Seq2SeqScheduler(found, max_rows=3)
    start, written = speech_start(SPEECH), Written(scheduler)
    requests = [
        scheduler.submit(
            {"input_features": each}, adapter, rules=TargetRules.of(SPEECH), start=start, max_new_tokens=5, eos_ids=()
        )
        for each, adapter in zip(features, adapters, strict=True)
    ]
    written.all()
    folder = own(exports["whisper-dynamic"])
    (folder / "generation_config.json").write_text(json.dumps(SPEECH))
    by_default = Seq2SeqSession(folder, "cpu")
    assert by_default.start_ids == (1,)
    whole = by_default.generate({"input_features": features}, adapters, max_new_tokens=5, eos_ids=())
    assert whole == [written.ids[request] for request in requests]
    for each, adapter, request in zip(features, adapters, requests, strict=True):
        model, given = peft("whisper", adapter), torch.from_numpy(each[None])
        with torch.no_grad():
            scores = model(input_features=given, decoder_input_ids=torch.tensor([[1]])).logits[0, -1]
            language = max(LANGUAGES.values(), key=lambda token: scores[token])
            tokens = [1, language, 20, 30]
            for _ in range(5):
                outputs = model(input_features=given, decoder_input_ids=torch.tensor([tokens]))
                tokens.append(int(outputs.logits[0, -1].argmax()))
        assert written.start[request] == tokens[1:4] and written.ids[request] == tokens[4:]


@pytest.mark.parametrize(
    ("changes", "asked", "expected"),
    [
        ({}, {}, (1, frozenset({10, 11, 12}), 20, 30)),
        ({}, {"language": "fr", "task": "translate"}, (1, 12, 21, 30)),
        ({"is_multilingual": False}, {"language": "en"}, (1, 30)),
        ({"lang_to_id": None, "no_timestamps_token_id": None}, {}, (1,)),
        ({"task_to_id": None}, {"language": "de"}, (1, 10, 30)),
    ],
)
def test_how_speech_starts(changes, asked, expected):
    assert speech_start(SPEECH | changes, **asked) == expected


@pytest.mark.parametrize(
    ("changes", "asked", "said"),
    [
        ({}, {"language": "xx"}, "does not know this language"),
        ({"is_multilingual": False}, {"language": "de"}, "knows one language"),
        ({"is_multilingual": False}, {"task": "translate"}, "knows one language"),
        ({"task_to_id": {"transcribe": 20}}, {"task": "translate"}, "no token for the task 'translate'"),
    ],
)
def test_speech_that_a_model_does_not_know_is_refused(changes, asked, said):
    with pytest.raises(UsageProblem, match=said):
        speech_start(SPEECH | changes, **asked)


def test_cancelled_texts_end_and_others_go_on(session):
    found = session("bart")
    how = {"rules": found.rules(), "max_new_tokens": 6, "eos_ids": ()}
    scheduler = Seq2SeqScheduler(found, max_rows=2)
    written = Written(scheduler)
    one, two, waits, last = (scheduler.submit(source([each, 6]), "bart-all", **how) for each in (5, 7, 9, 11))
    written.step()
    assert (scheduler.n_active, scheduler.n_waiting) == (2, 2)
    scheduler.cancel(one)
    scheduler.cancel(waits)
    written.all()
    assert [written.finish[each] for each in (one, two, waits, last)] == [
        Finish.CANCELLED, Finish.LENGTH, Finish.CANCELLED, Finish.LENGTH
    ]  # fmt: skip
    expected = found.generate(
        {"input_ids": np.array([[7, 6], [11, 6]]), "attention_mask": np.ones((2, 2), np.int64)}, "bart-all",
        max_new_tokens=6, eos_ids=(),
    )  # fmt: skip
    assert [written.ids[two], written.ids[last]] == expected
    scheduler.cancel(last)  # it is over
    assert scheduler.step() == []
    scheduler.submit(source([5]), **how)
    scheduler.clear()
    assert (scheduler.n_active, scheduler.n_waiting, scheduler.step()) == (0, 0, [])


def test_a_text_goes_on_with_the_adapter_that_it_was_begun_with(exports):
    found = Seq2SeqSession(exports["bart-dynamic"], "cpu", n_threads=1)
    given = {"input_ids": np.array([[20, 30, 40]]), "attention_mask": np.ones((1, 3), np.int64)}
    how = {"max_new_tokens": 6, "eos_ids": ()}
    old, new = (found.generate(given, name, **how)[0] for name in ("bart-all", "bart-attention"))
    scheduler = Seq2SeqScheduler(found, max_rows=4)
    written = Written(scheduler)
    one = scheduler.submit(source([20, 30, 40]), "bart-all", rules=found.rules(), **how)
    written.step(2)
    found.load(exports["bart-dynamic"] / "adapters" / "bart-attention", "bart-all")  # another of that name
    two = scheduler.submit(source([20, 30, 40]), "bart-all", rules=found.rules(), **how)
    written.all()
    assert (written.ids[one], written.ids[two]) == (old, new) and old != new


def test_an_adapter_that_cannot_be_read_again_fails_alone(exports, own):
    folder = own(exports["bart-dynamic"])
    largest = max(
        sum(f.stat().st_size for f in (folder / "adapters").glob(f"{n}.*")) for n in ("bart-all", "bart-attention")
    )
    found = Seq2SeqSession(folder, "cpu", n_threads=1, max_bytes=largest)
    how = {"rules": found.rules(), "max_new_tokens": 4, "eos_ids": ()}
    found.generate({"input_ids": np.array([[5]])}, "bart-attention", max_new_tokens=1)  # the other is dropped
    for file in (folder / "adapters").glob("bart-all.*"):
        file.write_bytes(b"other")
    scheduler = Seq2SeqScheduler(found, max_rows=3)
    written = Written(scheduler)
    broken, whole = scheduler.submit(source([5]), "bart-all", **how), scheduler.submit(source([5]), None, **how)
    written.all()
    assert (written.finish[broken], written.finish[whole]) == (Finish.FAILED, Finish.LENGTH)
    assert [written.ids[whole]] == found.generate({"input_ids": np.array([[5]])}, max_new_tokens=4, eos_ids=())
    with pytest.raises(InputRefused, match="changed after it was loaded"):
        found.generate({"input_ids": np.array([[5]])}, "bart-all", max_new_tokens=4)


@pytest.mark.parametrize(
    ("ids", "given", "said"),
    [
        ([], {}, "The source is empty"),
        ([VOCABULARY], {}, "has a token that the model does not know"),
        ([5] * 161, {}, "longer than the model's positions"),
        ([5], {"max_new_tokens": 0}, "no room for a token"),
        ([5], {"start": (2,) * 160}, "no room for a token"),
        ([5], {"start": ()}, "Nothing says how a target starts"),
        ([5], {"adapter": "absent"}, "No adapter 'absent' is loaded"),
    ],
)
def test_what_cannot_be_written_is_refused(session, ids, given, said):
    found = session("bart")
    scheduler = Seq2SeqScheduler(found, max_rows=1)
    with pytest.raises(UsageProblem, match=said):
        scheduler.submit(source(ids), **{"rules": found.rules(), "max_new_tokens": 4} | given)
    with pytest.raises(UsageProblem, match="A limit of the scheduler"):
        Seq2SeqScheduler(found, max_rows=0)
    assert scheduler.n_waiting == 0


def test_a_target_ends_at_the_model_s_last_position(session):
    found = session("bart")
    scheduler = Seq2SeqScheduler(found, max_rows=1, max_length=7)
    written = Written(scheduler)
    request = scheduler.submit(source([5]), rules=found.rules(), max_new_tokens=50, eos_ids=())
    written.all()
    assert len(written.ids[request]) == 6 and written.finish[request] is Finish.LENGTH
    assert Seq2SeqScheduler(found, max_rows=1).longest == 160


def test_settings_that_have_no_effect_are_named():
    fields = {"num_beams": 4, "no_repeat_ngram_size": 3, "min_length": 0, "do_sample": True, "min_new_tokens": None}
    assert settings_not_done(fields) == {"num_beams": 4, "no_repeat_ngram_size": 3}
