"""`/v1/completions` of an encoder-decoder: each answer is what PEFT's `generate` makes of its prompt alone."""

from __future__ import annotations

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from live import running, wait_until
from references import unmerged
from transformers import AutoTokenizer

PROMPTS = ("Open a socket", "Größe", "x", "A longer prompt than the others are: the batch is padded to it")
MODELS = {"bart": None, "bart-attention": "bart-attention", "bart-all": "bart-all"}


@pytest.fixture(scope="module")
def live(exports):
    with running(exports["bart-dynamic"], model_name="bart", max_batch=4, max_queue=40) as found:
        yield found


@pytest.fixture(scope="module")
def alone(bases, adapters):
    """The greedy target of a prompt by itself: `alone(adapter, prompt, most)`."""
    tokenizer, models = AutoTokenizer.from_pretrained(bases["bart"]), {}

    def write(adapter: str | None, prompt: str, most: int) -> str:
        if adapter not in models:
            folders = [adapters[adapter]] if adapter else []
            models[adapter] = unmerged(bases["bart"], "BartForConditionalGeneration", folders)
        given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            whole = models[adapter].generate(
                **given, max_new_tokens=most, do_sample=False, num_beams=1, use_cache=False
            )
        return tokenizer.decode(whole[0], skip_special_tokens=True)

    return write


def test_clients_at_once_with_different_adapters_get_their_own_texts(live, alone):
    calls = [(model, prompt, 4 + 2 * index) for index, (model, prompt) in enumerate(itertools.product(MODELS, PROMPTS))]
    expected = [alone(MODELS[model], prompt, most) for model, prompt, most in calls]
    assert len(set(expected)) == len(calls)  # another adapter's would not pass

    def ask(call):
        model, prompt, most = call
        return live.openai().completions.create(model=model, prompt=prompt, max_tokens=most)

    with ThreadPoolExecutor(len(calls)) as pool:
        for found, text, call in zip(pool.map(ask, calls), expected, calls, strict=True):
            assert found.choices[0].text == text and found.model == call[0]
            assert found.usage.prompt_tokens == len(call[1].encode()) + 2  # [CLS] and [SEP] are the encoder's
            assert 0 < found.usage.completion_tokens <= call[2]
    figures = live.metrics()
    assert figures["lora_export_batch_models_sum"] > figures["lora_export_batch_models_count"]
    assert figures['lora_export_first_token_seconds_count{model="bart-all"}'] == len(PROMPTS)


def test_a_stream_gives_the_same_text_in_pieces(live, alone):
    texts = {(model, prompt): alone(MODELS[model], prompt, 20) for model in MODELS for prompt in PROMPTS}
    # The text with the most letters: half of one is no piece yet.
    model, prompt = max(texts, key=lambda call: sum(letter.isascii() for letter in texts[call]))
    how = {"model": model, "prompt": prompt, "max_tokens": 20, "stream": True}
    chunks = list(live.openai().completions.create(**how, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == texts[model, prompt] and len(chunks) > 3
    assert chunks[-1].usage.prompt_tokens == len(prompt.encode()) + 2


def test_several_prompts_token_ids_stop_strings_and_blends(live, alone):
    client = live.openai()
    found = client.completions.create(model="bart-all", prompt=list(PROMPTS), max_tokens=9)
    expected = [alone("bart-all", prompt, 9) for prompt in PROMPTS]
    assert [choice.text for choice in found.choices] == expected
    ids = live.service.models.settings.voice.tokenizer.encode_source(PROMPTS[1])
    assert client.completions.create(model="bart-all", prompt=ids, max_tokens=9).choices[0].text == expected[1]
    stop = expected[0][3:5]
    cut = client.completions.create(model="bart-all", prompt=PROMPTS[0], max_tokens=9, stop=stop).choices[0]
    assert (cut.text, cut.finish_reason) == (expected[0][: expected[0].index(stop)], "stop")
    one = client.completions.create(model="bart-all:1", prompt=PROMPTS[0], max_tokens=9).choices[0].text
    half = client.completions.create(model="bart-all:0.5+bart-attention:0.5", prompt=PROMPTS[0], max_tokens=9)
    assert one == expected[0] != half.choices[0].text
    drawn = [client.completions.create(model="bart-all", prompt="x", max_tokens=9, temperature=1.5, seed=n).choices[0].text
             for n in (1, 1, 2)]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("completions", {"model": "bart-al"}, 404, "did you mean 'bart-all'?"),
        ("completions", {"prompt": ""}, 400, "A prompt is empty"),
        ("completions", {"prompt": [300]}, 400, "300 is no token of this model"),
        ("completions", {"prompt": [2**70]}, 400, "is no token of this model"),
        ("completions", {"max_tokens": 10**9}, 400, "there is room for"),
        ("completions", {"prompt": ["x"] * 50}, 400, "at most 40 are taken"),
        ("chat/completions", {"prompt": None}, 400, "The export is for text2text-generation: /v1/completions answers"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(live, path, body, status, said):
    given = {"model": "bart-all", "prompt": "ab"} | body
    if path.startswith("chat"):
        given = {"model": "bart-all", "messages": [{"role": "user", "content": "x"}]}
    found = live.post(f"/v1/{path}", **given)
    assert found.status_code == status and said in found.json()["error"]["message"]


def test_a_client_that_leaves_and_a_deadline_end_their_texts(exports):
    with running(exports["t5-dynamic"], model_name="t5", max_batch=2, timeout_s=0.5) as live:
        scheduler = live.service.writer._scheduler
        how = {"model": "t5", "prompt": "x", "max_tokens": 100_000, "ignore_eos": True}
        assert live.post("/v1/completions", **how).status_code == 504
        wait_until(lambda: scheduler.n_active == 0)
        with live.http() as client, client.stream("POST", "/v1/completions", json=how | {"stream": True}) as found:
            assert found.status_code == 200  # and leaves
        wait_until(lambda: scheduler.n_active == 0 and scheduler.n_waiting == 0)


def test_adapters_are_loaded_and_unloaded(exports, tmp_path, alone):
    shutil.copytree(exports["bart-dynamic"], tmp_path / "other")
    with running(exports["bart-dynamic"], model_name="bart", runtime_adapters=tmp_path) as live:
        file = "other/adapters/bart-all.decoder_model.onnx_adapter"
        found = live.post("/v1/load_lora_adapter", lora_name="new", lora_path=file)
        assert found.status_code == 200, found.text
        answer = live.openai().completions.create(model="new", prompt=PROMPTS[0], max_tokens=9)
        assert answer.choices[0].text == alone("bart-all", PROMPTS[0], 9)
        assert live.post("/v1/unload_lora_adapter", lora_name="new").status_code == 200
        with pytest.raises(openai.NotFoundError):
            live.openai().completions.create(model="new", prompt="x")
        changed = tmp_path / "other" / "adapters" / "bart-all.encoder_model.onnx_adapter"
        changed.write_bytes(changed.read_bytes()[:-1] + b"\x00\x01")
        refused = live.post("/v1/load_lora_adapter", lora_name="new", lora_path=file)
        assert (
            refused.status_code == 400 and "bart-all.encoder_model.onnx_adapter" in refused.json()["error"]["message"]
        )
        assert "new" not in live.service.models.view.adapters
