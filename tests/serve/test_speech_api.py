"""`/v1/audio/transcriptions` of a running server: each text is what PEFT's Whisper writes for that sound alone."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import wave
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import torch
import transformers
from fastapi import Request
from live import running, wait_until
from references import unmerged

from lora_export.contract import ENCODER
from lora_export.serve.forms import Form, read_form
from lora_export.serve.problems import Problem
from lora_export.serve.room import Room

MODELS = {"whisper": None, "whisper-attention": "whisper-attention", "whisper-all": "whisper-all"}
LANGUAGES = {"<|de|>": 90, "<|en|>": 91, "<|fr|>": 92}
SPEECH = {"decoder_start_token_id": 1, "eos_token_id": 2, "lang_to_id": LANGUAGES, "is_multilingual": True,
          "task_to_id": {"transcribe": 93, "translate": 94}, "no_timestamps_token_id": 259,
          "suppress_tokens": [2, 70], "begin_suppress_tokens": [80]}  # fmt: skip
LONGEST = 12


def samples(n: int) -> np.ndarray:
    return (9000 * np.sin(np.arange(2000 + 900 * n) / (3 + n))).astype(np.int16)


def wav(values: np.ndarray, rate: int = 16000) -> bytes:
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.astype("<i2").tobytes())
    return made.getvalue()


@pytest.fixture(scope="module")
def export(exports, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "whisper"
    shutil.copytree(exports["whisper-dynamic"], folder)
    (folder / "generation_config.json").write_text(json.dumps(SPEECH))
    return folder


@pytest.fixture(scope="module")
def live(export):
    with running(export, model_name="whisper", max_batch=4, max_length=LONGEST) as found:
        yield found


@pytest.fixture(scope="module")
def alone(export, bases, adapters):
    """Text and language of a sound by itself, by whole passes of PEFT's model: `alone(adapter, samples)`."""
    models = {}
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(export)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)

    def write(adapter, values, language=None, task="transcribe"):
        if adapter not in models:
            folders = [adapters[adapter]] if adapter else []
            model = unmerged(bases["whisper"], "WhisperForConditionalGeneration", folders)
            # PEFT's wrapper of this task takes token ids only; its layers are in the model.
            models[adapter] = getattr(model, "get_base_model", lambda: model)()
        given = extractor(values / 32768, sampling_rate=16000, return_tensors="pt")["input_features"]

        def scores(tokens):
            with torch.no_grad():
                return models[adapter](input_features=given, decoder_input_ids=torch.tensor([tokens])).logits[0, -1]

        if language is None:
            found = scores([1])
            language = max(LANGUAGES.values(), key=lambda token: found[token])
        else:
            language = LANGUAGES[f"<|{language}|>"]
        tokens = [1, language, SPEECH["task_to_id"][task], 259]
        while len(tokens) < LONGEST:
            following = scores(tokens)
            following[[2, 70] + [80] * (len(tokens) == 4)] = -torch.inf
            tokens.append(int(following.argmax()))
        text = tokenizer.decode(tokens[4:], skip_special_tokens=True).strip()
        return text, next(name.strip("<|>") for name, token in LANGUAGES.items() if token == language)

    return write


def test_clients_at_once_with_different_adapters_get_their_own_texts(live, alone):
    calls = [(model, samples(n), (None, "en")[n % 2]) for n in range(3) for model in MODELS]
    expected = [alone(MODELS[model], values, language) for model, values, language in calls]
    assert len({text for text, _ in expected}) > 6

    def ask(call):
        model, values, language = call
        given = {} if language is None else {"language": language}
        client = live.openai()
        return client.audio.transcriptions.create(model=model, file=("a.wav", wav(values)), **given,
                                                  response_format="verbose_json")  # fmt: skip

    with ThreadPoolExecutor(len(calls)) as pool:
        for found, (text, language), call in zip(pool.map(ask, calls), expected, calls, strict=True):
            assert (found.text, found.language) == (text, language)
            assert found.duration == len(call[1]) / 16000 and found.segments is None
    figures = live.metrics()
    assert figures["lora_export_batch_rows_sum"] > figures["lora_export_batch_rows_count"]
    assert figures['lora_export_requests_total{model="whisper-all",path="/v1/audio/transcriptions",status="200"}'] >= 3


def test_the_forms_of_an_answer(live, alone):
    client, values = live.openai(), samples(1)
    text, _ = alone("whisper-all", values)
    file = ("a.wav", wav(values))
    found = client.audio.transcriptions.create(model="whisper-all", file=file)
    assert found.text == text and found.usage.type == "duration"
    assert client.audio.transcriptions.create(model="whisper-all", file=file, response_format="text").strip() == text
    events = list(client.audio.transcriptions.create(model="whisper-all", file=file, stream=True))
    assert [event.type for event in events[:-1]] == ["transcript.text.delta"] * (len(events) - 1)
    assert "".join(event.delta for event in events[:-1]).strip() == events[-1].text.strip() == text and len(events) > 2
    english, _ = alone("whisper-all", values, "de", "translate")
    translated = client.audio.translations.create(model="whisper-all", file=file, response_format="verbose_json")
    assert translated.task == "translate" and translated.text == alone("whisper-all", values, task="translate")[0]
    assert english != text


def test_a_sound_is_held_until_its_text_is_written(live, monkeypatch):
    monkeypatch.setattr(live.service, "room", room := Room(10**9))
    returned = {}

    def give_back(held, n_bytes):
        returned[n_bytes] = live.service.writer.models()
        Room._give_back(room, held, n_bytes)

    monkeypatch.setattr(room, "_give_back", give_back)
    client, sound = live.openai(), wav(samples(1))
    assert list(client.audio.transcriptions.create(model="whisper-all", file=("a.wav", sound), stream=True))
    wait_until(lambda: room.n_taken == 0)
    spec = live.service.models.manifest.graphs[ENCODER].inputs[0]
    n_features = 4 * spec.dims[1] * spec.dims[2]
    (body,) = set(returned) - {n_features}
    assert len(returned) == 2 and body > len(sound) and returned[body] == ([], []), "the text was written"
    room._most = len(sound) // 2
    with pytest.raises(openai.APIStatusError, match="take more than") as refused:
        client.audio.transcriptions.create(model="whisper-all", file=("a.wav", sound))
    assert refused.value.status_code == 413


@pytest.mark.parametrize(
    ("fields", "file", "status", "said"),
    [
        ({"model": "whisper-al"}, wav(samples(0)), 404, "did you mean 'whisper-all'?"),
        ({"language": "xx"}, wav(samples(0)), 400, "does not know this language"),
        ({"response_format": "srt"}, wav(samples(0)), 400, "response_format"),
        ({"prompt": "before"}, wav(samples(0)), 400, "prompt"),
        ({"timestamp_granularities[]": "word"}, wav(samples(0)), 400, "'timestamp_granularities[]' is not supported"),
        ({"temperature": "2"}, wav(samples(0)), 400, "temperature"),
        ({}, b"no sound", 400, "The input is no WAV file"),
        ({}, wav(samples(0), 8000), 400, "16 bits at 16000 Hz"),
        ({}, wav(np.zeros(16001)), 400, "longer than the model takes"),
        ({}, wav(np.zeros(0)), 400, "cut off, or there is none"),
        ({}, None, 400, "The form has no file 'file'"),
        ({}, bytes(1_000_001), 413, "larger than"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(live, fields, file, status, said):
    given = {"model": "whisper-all"} | fields
    parts = {name: (None, value) for name, value in given.items()} | ({} if file is None else {"file": ("a.wav", file)})
    with live.http() as client:
        found = client.post("/v1/audio/transcriptions", files=parts)
    assert found.status_code == status and said in found.json()["error"]["message"]


def test_other_pages_and_other_forms_are_refused(live):
    with live.http() as client:
        given = {"data": {"model": "whisper"}, "files": {"file": ("a.wav", wav(samples(0)))}}
        for origin, status in (("https://example.org", 403), ("null", 403), ("http://localhost:3000", 200)):
            found = client.post("/v1/audio/transcriptions", **given, headers={"origin": origin})
            assert found.status_code == status
        assert client.post("/v1/audio/transcriptions", json={"model": "whisper"}).status_code == 415
    with pytest.raises(openai.BadRequestError, match="The export is for automatic-speech-recognition"):
        live.openai().completions.create(model="whisper", prompt="x")


def form(*parts: bytes) -> tuple[bytes, str]:
    return b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + b"--b--\r\n", "multipart/form-data; boundary=b"


def read(body: bytes, kind: str) -> Form:
    """A request with `body`, which comes in two pieces."""
    pieces = [{"type": "http.request", "body": body[:9], "more_body": True}, {"type": "http.request", "body": body[9:]}]

    async def receive() -> dict:
        return pieces.pop(0)

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", kind.encode())]}
    return asyncio.run(read_form(Request(scope, receive)))


def test_a_form_is_taken_apart_by_its_boundary():
    content = b"\r\n--c\r\n\x00\xff\r\r\n\n--b" + bytes(2_000_000)
    found = read(
        *form(
            b'Content-Disposition: form-data; name="a"\r\n\r\nGr\xc3\xb6\xc3\x9fe',
            b'content-type: audio/wav\r\ncontent-disposition: form-data; name=f; filename="x;y.wav"\r\n\r\n' + content,
        )
    )
    assert found.fields == {"a": "Größe"} and found.files == {"f": content}


@pytest.mark.parametrize(
    ("body", "kind", "status", "said"),
    [
        (form()[0], "text/plain; boundary=b", 415, "no multipart/form-data"),
        (b"", "multipart/form-data", 400, "boundary"),
        (*form(b"x"), 400, "cannot be read"),
        (*form(b"Content-Disposition: form-data\r\n\r\nx"), 400, "name"),
        (*form(*[b"Content-Disposition: form-data; name=a\r\n\r\nx"] * 2), 400, "'a' twice"),
        *(
            (
                form(b"Content-Disposition: form-data; name=x\r\n\r\nx")[0],
                f"multipart/form-data; boundary=b; charset={name}",
                400,
                "cannot be read: .",
            )
            for name in ("undefined", "punycode", "a\0b")
        ),
        (*form(*[b"Content-Disposition: form-data; name=%d\r\n\r\nx" % n for n in range(40)]), 400, "Too many fields"),
    ],
)
def test_a_form_that_is_none_is_refused(body, kind, status, said):
    with pytest.raises(Problem, match=said) as refused:
        read(body, kind)
    assert refused.value.status == status


def test_a_file_that_is_cut_off_is_no_file():
    body, kind = form(
        b"Content-Disposition: form-data; name=a\r\n\r\nx",
        b"Content-Disposition: form-data; name=f; filename=y\r\n\r\nzz",
    )
    assert read(body[:-8], kind) == Form({"a": "x"}, {})
