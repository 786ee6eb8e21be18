"""`/v1/completions` and `/v1/chat/completions` of a running server: each text is its own adapter's, token for token."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from live import running, wait_until
from tokenizers import Tokenizer

from lora_export import AdapterSession
from lora_export.runtime.generate import generate
from lora_export.runtime.sampling import Sampling
from lora_export.serve.schema import WritingBody
from lora_export.serve.writing_api import sampling_of

PROMPTS = ("Open a socket", "Größe", "x", "A longer prompt than the others are, to be read in pieces")
MODELS = {"llama": None, "chat": "chat", "code": "code", "chat:0.5+code:0.25": {"chat": 0.5, "code": 0.25}}
END = frozenset({2})
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"


@pytest.fixture(scope="module")
def export(exports, tmp_path_factory) -> Path:
    """With a chat template, and with another base's name."""
    folder = tmp_path_factory.mktemp("export") / "llama"
    shutil.copytree(exports["llama-dynamic"], folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def live(export):
    with running(export, model_name="llama", max_batch=3, max_queue=40) as found:
        yield found


@pytest.fixture(scope="module")
def alone(export):
    """The greedy tokens of a prompt by itself: `alone(adapter, prompt, most)`."""
    session, tokenizer = AdapterSession(export, "cpu", n_threads=1), Tokenizer.from_file(str(export / "tokenizer.json"))

    def write(adapter, prompt: str, most: int) -> tuple[str, list[int]]:
        (ids,) = generate(session, [tokenizer.encode(prompt).ids], adapter, max_new_tokens=most, eos_ids=END)
        return tokenizer.decode(ids), ids

    return write


def test_texts_of_clients_at_once_are_those_of_their_adapters_alone(live, alone):
    calls = [(model, prompt, 4 + 3 * index) for index, (model, prompt) in enumerate(itertools.product(MODELS, PROMPTS))]
    expected = [alone(MODELS[model], prompt, most)[0] for model, prompt, most in calls]
    by_prompt = {
        prompt: {text[:4] for text, call in zip(expected, calls, strict=True) if call[1] == prompt}
        for prompt in PROMPTS
    }
    assert all(len(texts) == len(MODELS) for texts in by_prompt.values())  # another adapter's would not pass

    def ask(call):
        model, prompt, most = call
        return live.openai().completions.create(model=model, prompt=prompt, max_tokens=most)

    with ThreadPoolExecutor(len(calls)) as pool:
        for found, text, call in zip(pool.map(ask, calls), expected, calls, strict=True):
            assert found.choices[0].text == text and found.model == call[0]
            n_prompt = len(call[1].encode())
            assert found.usage.prompt_tokens == n_prompt
            assert found.usage.total_tokens == n_prompt + found.usage.completion_tokens
    figures = live.metrics()
    assert figures["lora_export_batch_models_sum"] > figures["lora_export_batch_models_count"]
    assert figures['lora_export_first_token_seconds_count{model="code"}'] == len(PROMPTS)
    written = sum(figures[f'lora_export_tokens_total{{kind="completion",model="{name}"}}'] for name in ("chat", "code"))
    assert written > 100


def test_a_stream_gives_the_same_text_in_pieces(live, alone):
    text, ids = alone("code", PROMPTS[0], 20)
    given = {"model": "code", "prompt": PROMPTS[0], "max_tokens": 20, "stream": True}
    chunks = list(live.openai().completions.create(**given, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text
    assert (
        len(chunks) > 8 and chunks[-1].choices == [] and chunks[-1].usage.completion_tokens in (len(ids), len(ids) + 1)
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] in ("stop", "length")
    with live.http() as client, client.stream("POST", "/v1/completions", json=given) as found:
        lines = [line for line in found.iter_lines() if line]
    assert found.headers["content-type"].startswith("text/event-stream") and lines[-1] == "data: [DONE]"
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]) == text


def test_a_chat_is_the_template_s_prompt(live, alone):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    text, _ = alone("chat", "<system>Be brief.<user>Hi<answer>", 12)
    client = live.openai()
    found = client.chat.completions.create(model="chat", messages=messages, max_completion_tokens=12)
    assert found.choices[0].message.content == text and found.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(model="chat", messages=messages, max_tokens=12, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_several_prompts_and_token_ids(live, alone):
    found = live.openai().completions.create(model="chat", prompt=list(PROMPTS[:2]), max_tokens=6)
    assert [choice.text for choice in found.choices] == [alone("chat", prompt, 6)[0] for prompt in PROMPTS[:2]]
    ids = [*Tokenizer.from_file(str(live.service.models.folder / "tokenizer.json")).encode("x").ids]
    for prompt in (ids, [ids, ids]):
        found = live.openai().completions.create(model="chat", prompt=prompt, max_tokens=6)
        assert {choice.text for choice in found.choices} == {alone("chat", "x", 6)[0]}
    chunks = list(live.openai().completions.create(model="chat", prompt=list(PROMPTS[:2]), max_tokens=6, stream=True))
    texts = ["".join(c.choices[0].text for c in chunks if c.choices[0].index == index) for index in (0, 1)]
    assert texts == [alone("chat", prompt, 6)[0] for prompt in PROMPTS[:2]]


def test_a_text_ends_before_its_stop_string(live, alone):
    text, _ = alone("code", PROMPTS[0], 30)
    stop = text[9:11]
    expected = text[: text.index(stop)]
    for stream in (False, True):
        found = live.openai().completions.create(
            model="code", prompt=PROMPTS[0], max_tokens=30, stop=[stop, "never"], stream=stream
        )
        pieces = [choice for each in (found if stream else [found]) for choice in each.choices]
        assert "".join(piece.text for piece in pieces) == expected
        assert pieces[-1].finish_reason == "stop"
    wait_until(lambda: live.service.load().running == [])


def test_sampling_by_a_seed_is_the_same_again_and_others_differ(live, alone):
    def ask(**options):
        return live.openai().completions.create(model="chat", prompt="x", max_tokens=12, **options).choices[0].text

    one = ask(temperature=1.5, seed=3)
    assert ask(temperature=1.5, seed=3) == one
    assert ask(temperature=1.5, seed=4) != one
    assert ask(temperature=1.5, seed=3, extra_body={"top_k": 1}) == ask() == alone("chat", "x", 12)[0]
    assert ask(extra_body={"repetition_penalty": 50.0}) != ask()


@pytest.mark.parametrize(
    ("given", "defaults", "expected"),
    [
        ({}, {}, Sampling()),
        ({"temperature": 0}, {"do_sample": True}, Sampling(0, 50)),
        ({"temperature": 0.7}, {}, Sampling(0.7)),
        ({"top_p": 0.9}, {}, Sampling(1.0, 0, 0.9)),
        ({"seed": 5}, {}, Sampling(1.0, seed=5)),
        ({}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}, Sampling(0.6, 50, 0.9)),
        ({"top_k": 3}, {"do_sample": True, "temperature": 0.6}, Sampling(0.6, 3)),
        ({}, {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}, Sampling(repetition_penalty=1.1)),
    ],
)
def test_what_is_left_out_is_the_configuration_s(given, defaults, expected):
    assert sampling_of(WritingBody(model="x", **given), defaults) == expected


@pytest.mark.parametrize(
    ("body", "status", "param", "said"),
    [
        ({"model": "chatt"}, 404, "model", "did you mean 'chat'?"),
        ({"n": 2}, 400, "n", "1"),
        ({"logprobs": 3}, 400, "logprobs", "None"),
        ({"echo": True}, 400, "echo", "False"),
        ({"best_of": 2}, 400, "best_of", "1"),
        ({"suffix": "x"}, 400, "suffix", "None"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias", "None"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "less than or equal to 0"),
        ({"tools": []}, 400, "tools", "'tools' is not supported"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"temperature": 1e-310}, 400, "temperature", "it must be 0, or at least 1e-06"),
        ({"temperature": 101}, 400, "temperature", "less than or equal to 100"),
        ({"repetition_penalty": 1e-40}, 400, "repetition_penalty", "greater than or equal to 0.001"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 159}, 400, None, "2 tokens and 159 new ones; a text has at most 160"),
        ({"prompt": "x" * 160}, 400, None, "160 tokens; a text has at most 160"),
        ({"prompt": ""}, 400, "prompt", "empty"),
        ({"prompt": [300]}, 400, None, "ids from 0 to 259"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "go with stream: true"),
        ({"prompt": ["x"] * 50}, 400, "prompt", "has 50 texts; at most 40 are taken"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(live, body, status, param, said):
    found = live.post("/v1/completions", **({"model": "chat", "prompt": "ab"} | body))
    error = found.json()["error"]
    assert (found.status_code, (error["param"] or "").split(".")[0] or None) == (status, param)
    assert said in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
    ],
)
def test_of_a_chat_too(live, body, param):
    found = live.post(
        "/v1/chat/completions", **({"model": "chat", "messages": [{"role": "user", "content": "x"}]} | body)
    )
    assert found.status_code == 400 and found.json()["error"]["param"].split(".")[0] == param


def test_without_a_template_a_chat_is_refused(exports):
    with running(exports["llama-dynamic"], model_name="llama", max_batch=1) as live:
        found = live.post("/v1/chat/completions", model="chat", messages=[{"role": "user", "content": "x"}])
        assert found.status_code == 400 and "no chat template" in found.json()["error"]["message"]
        assert "/tmp" not in found.text


def test_a_client_that_leaves_ends_its_text_and_frees_its_row(export, alone):
    with running(export, model_name="llama", max_batch=2) as live:
        step = live.service.writer._scheduler.step
        live.service.writer._scheduler.step = lambda: (time.sleep(0.02), step())[1]
        given = {"model": "code", "prompt": "left", "max_tokens": 150, "extra_body": {"ignore_eos": True}}
        streams = [live.openai().completions.create(**given, stream=True) for _ in range(4)]
        assert len(live.service.load().running) == 2 and len(live.service.load().waiting) == 2
        next(iter(streams[0]))
        for stream in streams:
            stream.close()
        wait_until(lambda: live.service.load().running == [] and live.service.load().waiting == [], 2)
        assert sum(line.get("client_left", False) for line in live.lines) == 4
        found = live.post("/v1/completions", model="chat", prompt="x", max_tokens=6)
        assert found.json()["choices"][0]["text"] == alone("chat", "x", 6)[0]


def test_a_deadline_ends_a_stream_with_an_error_and_frees_its_row(export):
    with running(export, model_name="llama", max_batch=1, timeout_s=0.4) as live:
        step, go = live.service.writer._scheduler.step, threading.Event()
        live.service.writer._scheduler.step = lambda: (go.wait(0.15), step())[1]
        given = {"model": "code", "prompt": "x", "max_tokens": 100, "extra_body": {"ignore_eos": True}}
        with pytest.raises(openai.APIError, match="deadline passed"):
            list(live.openai().completions.create(**given, stream=True))
        with pytest.raises(openai.APIStatusError) as found:
            live.openai().completions.create(**given)
        assert found.value.status_code == 504
        go.set()
        wait_until(lambda: live.service.load().running == [])


def test_a_step_that_fails_fails_its_texts_and_no_later_one(export, alone):
    with running(export, model_name="llama", max_batch=2) as live:
        scheduler = live.service.writer._scheduler
        step, calls = scheduler.step, itertools.count()

        def failing():
            if next(calls) == 2:
                raise RuntimeError("broken")
            return step()

        scheduler.step = failing
        found = live.post("/v1/completions", model="chat", prompt="x", max_tokens=20)
        assert found.status_code == 500 and "broken" not in found.text
        found = live.post("/v1/completions", model="chat", prompt="x", max_tokens=6)
        assert found.json()["choices"][0]["text"] == alone("chat", "x", 6)[0]


def test_a_step_that_fails_behind_a_full_queue_leaves_room(export):
    with running(export, model_name="llama", max_batch=1, max_queue=2) as live:
        scheduler, go = live.service.writer._scheduler, threading.Event()
        step, calls = scheduler.step, itertools.count()

        def failing():
            if next(calls) == 1:
                go.wait(20)
                raise RuntimeError("broken")
            return step()

        scheduler.step = failing
        given = {"model": "chat", "prompt": "x", "max_tokens": 20, "ignore_eos": True}
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(live.post, "/v1/completions", **given)]
            wait_until(lambda: live.service.load().running)
            asked += [pool.submit(live.post, "/v1/completions", **given) for _ in range(2)]
            wait_until(lambda: scheduler.n_waiting == 2)
            assert live.post("/v1/completions", **given).status_code == 429 and not live.service.is_ready
            go.set()
            assert [each.result().status_code for each in asked] == [500] * 3
        assert live.service.is_ready
        assert live.post("/v1/completions", **given).status_code == 200


def test_a_text_goes_on_with_the_adapter_that_it_was_begun_with(export, alone, tmp_path):
    with running(export, model_name="llama", runtime_adapters=export) as live:
        load = {"lora_name": "new", "lora_path": "adapters/code.onnx_adapter"}
        assert live.post("/v1/load_lora_adapter", **load).status_code == 200
        step, go = live.service.writer._scheduler.step, threading.Event()
        live.service.writer._scheduler.step = lambda: go.wait(20) and step()
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(live.post, "/v1/completions", model="new", prompt="x", max_tokens=8)
            wait_until(lambda: live.service.load().waiting or live.service.load().running)
            assert live.post("/v1/unload_lora_adapter", lora_name="new").status_code == 200
            go.set()
            assert call.result().json()["choices"][0]["text"] == alone("code", "x", 8)[0]
        assert not any('model="new"' in name for name in live.metrics())  # nor is its end a new series
        assert live.post("/v1/completions", model="new", prompt="x").status_code == 404
        other = {"lora_name": "new", "lora_path": "adapters/chat.onnx_adapter"}
        assert live.post("/v1/load_lora_adapter", **other).status_code == 200
        found = live.post("/v1/completions", model="new", prompt="x", max_tokens=8)
        assert found.json()["choices"][0]["text"] == alone("chat", "x", 8)[0]


def test_texts_are_no_longer_than_the_cache_has_room_for(export):
    with running(export, model_name="llama", max_batch=2, max_cache_bytes=2 * 50 * 2 * 2 * 2 * 16 * 4) as live:
        # 50 tokens for each of 2 rows: 2 layers of keys and values, 2 heads of 16 numbers of 4 bytes.
        assert live.openai().models.retrieve("chat").max_model_len == 50
        found = live.post("/v1/completions", model="chat", prompt="x", max_tokens=50)
        assert "a text has at most 50" in found.json()["error"]["message"]
        found = live.post("/v1/completions", model="chat", prompt="x", max_tokens=49, ignore_eos=True)
        assert found.json()["usage"]["total_tokens"] == 50
