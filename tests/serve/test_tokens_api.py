"""`/v1/classify` of taggers and image classifiers: each answer is its own adapter's."""

from __future__ import annotations

import base64
import gc
import io
import json
import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import httpx2
import numpy as np
import pytest
import torch
import transformers
from live import running, wait_until
from PIL import Image
from references import unmerged
from transformers import AutoTokenizer

from lora_export import InputRefused
from lora_export.runtime import images
from lora_export.serve import api
from lora_export.serve.data_urls import signals_of
from lora_export.serve.logs import NAME, JsonLines
from lora_export.serve.models import Models
from lora_export.serve.options import ServeOptions
from lora_export.serve.problems import Problem
from lora_export.serve.room import Room

TEXTS = ("Open a socket.", "Größe, and a longer text than the others are: it decides the padding.", "x")
TAGGERS, SIGHTS = {"tagger": None, "tags": "tags"}, {"vit": None, "sights": "sights"}
SIZES = {"tagger": 4, "tags": 6, "vit": 3, "sights": 5}


def shares(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def tagger(exports):
    with running(exports["tagger-dynamic"], model_name="tagger") as live:
        yield live


@pytest.fixture(scope="module")
def vit(exports):
    with running(exports["vit-dynamic"], model_name="vit", max_batch=4) as live:
        yield live


def test_every_token_has_the_label_of_its_own_adapter(tagger, bases, adapters):
    tokenizer = AutoTokenizer.from_pretrained(bases["tagger"])
    calls = [(model, text) for model in TAGGERS for text in TEXTS]

    def ask(call):
        return tagger.post("/v1/classify", model=call[0], input=call[1]).json()

    with ThreadPoolExecutor(len(calls)) as pool:
        answers = list(pool.map(ask, calls))
    for (model, text), whole in zip(calls, answers, strict=True):
        folders = [adapters[TAGGERS[model]]] if TAGGERS[model] else []
        reference = unmerged(bases["tagger"], "BertForTokenClassification", folders, SIZES[model] if folders else None)
        given = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
        offsets = given.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            expected = shares(reference(**given).logits[0].numpy())
        (found,) = whole["data"]
        assert found["num_classes"] == SIZES[model] and len(found["labels"]) == SIZES[model]
        assert whole["usage"]["prompt_tokens"] == len(offsets)
        assert len(found["tokens"]) == len(offsets) - 2  # [CLS] and [SEP] are left out
        for token, row, (start, end) in zip(found["tokens"], expected[1:-1], offsets[1:-1], strict=True):
            assert token["label"] == found["labels"][int(row.argmax())]
            np.testing.assert_allclose(token["score"], row.max(), atol=1e-5)
            assert (token["start"], token["end"], token["text"]) == (start, end, text[start:end])
    assert {token["label"] for token in answers[1]["data"][0]["tokens"]} <= {f"LABEL_{n}" for n in range(4)}


def test_tokens_given_by_their_ids_have_no_place(tagger):
    ids = [1, 40, 41, 2]
    by_id = tagger.post("/v1/classify", model="tags", input=ids).json()["data"][0]["tokens"]
    assert len(by_id) == 4 and set(by_id[0]) == {"label", "score"}
    found = tagger.post("/v1/classify", model="tags", input=["ab", ""])
    assert found.status_code == 400 and "An input is empty" in found.json()["error"]["message"]
    assert tagger.post("/v1/embeddings", model="tags", input="x").status_code == 400


def picture(n: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(n).integers(0, 256, (20 + n, 30, 3), np.uint8))


def url(image: Image.Image) -> str:
    made = io.BytesIO()
    image.save(made, "PNG")
    return "data:image/png;base64," + base64.b64encode(made.getvalue()).decode()


def test_images_are_classified_by_their_own_adapters(vit, bases, adapters):
    processor = transformers.AutoImageProcessor.from_pretrained(bases["vit"])
    calls = [(model, n) for n in range(3) for model in SIGHTS]
    with ThreadPoolExecutor(len(calls)) as pool:
        answers = list(
            pool.map(lambda call: vit.post("/v1/classify", model=call[0], input=url(picture(call[1]))).json(), calls)
        )
    references = {
        "vit": unmerged(bases["vit"], "ViTForImageClassification"),
        "sights": unmerged(bases["vit"], "ViTForImageClassification", [adapters["sights"]], 5),
    }
    for (model, n), whole in zip(calls, answers, strict=True):
        with torch.no_grad():
            logits = references[model](**processor(picture(n), return_tensors="pt")).logits[0].numpy()
        (found,) = whole["data"]
        np.testing.assert_allclose(found["probs"], shares(logits), atol=1e-5)
        assert found["num_classes"] == SIZES[model]
    both = vit.post("/v1/classify", model="sights", input=[url(picture(0)), url(picture(1))]).json()["data"]
    assert [each["index"] for each in both] == [0, 1]
    np.testing.assert_allclose(both[1]["probs"], answers[3]["data"][0]["probs"], atol=1e-5)
    assert vit.metrics()["lora_export_batch_rows_sum"] >= 8
    with vit.http() as client:
        assert {each["max_model_len"] for each in client.get("/v1/models").json()["data"]} == {None}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("https://example.org/a.png", "no address is fetched"),
        ("data:text/plain;base64,aaaa", "no address is fetched"),
        ("data:image/png;base64,!!", "base64 is damaged"),
        ("data:image/png;base64,aGVsbG8=", "no image that Pillow reads"),
        ([5, 6], "no address is fetched"),
        (["data:image/png;base64,aGVsbG8="] * 5, "has 5 inputs; at most 4 are taken"),
        ("", "An input is empty"),
    ],
)
def test_what_is_no_image_is_refused(vit, given, said):
    found = vit.post("/v1/classify", model="sights", input=given)
    assert found.status_code == 400 and said in found.json()["error"]["message"]


def test_the_images_of_a_request_are_bounded_together(vit, monkeypatch):
    monkeypatch.setattr(images, "MOST_PIXELS", 2000)
    assert vit.post("/v1/classify", model="vit", input=url(picture(0))).status_code == 200
    found = vit.post("/v1/classify", model="vit", input=[url(picture(0))] * 4)
    assert (
        found.status_code == 400 and "at most 2,000 pixels of all images together" in found.json()["error"]["message"]
    )


def test_images_are_prepared_for_two_at_a_time_and_while_somebody_waits(vit, monkeypatch):
    begun, ended, at_once = [], [], []

    def slow(urls, steps, held):
        begun.append(urls)
        at_once.append(len(begun) - len(ended))
        wait_until(lambda: held.is_over)
        ended.append(urls)
        return signals_of(urls, steps, held)

    def leave(_):
        with vit.http() as client, pytest.raises(httpx2.TimeoutException):
            client.post("/v1/classify", json={"model": "vit", "input": url(picture(0))}, timeout=0.3)

    with monkeypatch.context() as patch:
        patch.setattr(api, "signals_of", slow)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(leave, range(3)))
        wait_until(lambda: len(ended) == len(begun))
    assert max(at_once) == 2
    with pytest.raises(Problem, match="Nobody waits"):
        (gone := Room(1).held()).give_back()
        signals_of(begun[0], None, gone)
    assert vit.post("/v1/classify", model="vit", input=url(picture(0))).status_code == 200


def test_images_that_wait_are_bounded_together(vit, monkeypatch):
    """By their bodies and what is made of them; others find no room until those before them are gone."""
    given = {"model": "vit", "input": [url(picture(0))] * 2}
    made, taken = [], []

    def watched(urls, steps, held):
        made.append(held.n_bytes)
        found = signals_of(urls, steps, held)
        taken.append((held.n_bytes - made[-1], sum(each.nbytes for each in found)))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(api, "signals_of", watched)
        assert vit.post("/v1/classify", **given).status_code == 200
    assert made == [len(json.dumps(given, separators=(",", ":")))] and taken[0][0] == taken[0][1] > 0
    wait_until(lambda: vit.service.room.n_taken == 0)
    monkeypatch.setattr(vit.service, "room", room := Room(made[0] + taken[0][0]))
    assert vit.post("/v1/classify", **given).status_code == 200
    wait_until(lambda: room.n_taken == 0)
    (other := room.held()).take(1)
    full = vit.post("/v1/classify", **given)
    assert full.status_code == 429 and int(full.headers["retry-after"]) > 0, full.text
    assert f"take {made[0] + taken[0][0] // 2 + 1:,} bytes of" in full.json()["error"]["message"], "one was made"
    wait_until(lambda: room.n_taken == 1)
    other.give_back()
    assert vit.post("/v1/classify", **given).status_code == 200
    too_large = vit.post("/v1/classify", **given | {"input": [url(picture(0))] * 3})
    assert too_large.status_code == 413 and "of the request take more than" in too_large.json()["error"]["message"]


def test_a_request_that_is_over_takes_no_more_and_gives_back_once():
    room = Room(8)
    held = room.held()
    held.take(5)
    held.give_back()
    held.give_back()
    with pytest.raises(Problem, match="Nobody waits"):
        held.take(1)
    assert room.n_taken == 0


def test_what_is_still_in_memory_is_still_counted():
    """A job that runs on after its request, one that never starts, and an array that somebody has."""
    room, array, running, waiting = Room(100), np.zeros(10, np.uint8), Future(), Future()
    held = room.held()
    held.take(30)
    held.take_array(array)
    running.set_running_or_notify_cancel()
    for job in (running, waiting):
        held.used_by(job)
    waiting.cancel()
    held.give_back()
    assert room.n_taken == 40 and held.n_bytes == 40
    running.set_result(None)
    assert room.n_taken == 10
    del array
    assert room.n_taken == 0 and held.n_bytes == 0


def test_a_request_that_left_the_queue_of_images_is_let_go(vit, monkeypatch):
    """Others run; the executor keeps what was cancelled until its turn, but not its body."""
    monkeypatch.setattr(vit.service, "room", room := Room(10**9))
    begun, go_on = threading.Semaphore(0), threading.Event()

    def slow(urls, steps, held):
        begun.release()
        assert go_on.wait(60)
        return signals_of(urls, steps, held)

    monkeypatch.setattr(api, "signals_of", slow)
    given = {"model": "vit", "input": url(picture(0))}
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(vit.post, "/v1/classify", **given) for _ in range(2)]
        for _ in running:
            assert begun.acquire(timeout=60)
        of_two = room.n_taken
        with vit.http() as client, pytest.raises(httpx2.TimeoutException):
            client.post("/v1/classify", json=given, timeout=0.3)
        wait_until(lambda: room.n_taken == of_two)
        go_on.set()
        assert [each.result().status_code for each in running] == [200, 200]
    wait_until(lambda: room.n_taken == 0)


def test_a_run_that_fails_keeps_no_image(vit, monkeypatch):
    """Its exception would, by the frames that it came through; no collection of cycles is waited for."""
    monkeypatch.setattr(vit.service, "room", room := Room(10**9))
    given = {"model": "vit", "input": [url(picture(0))] * 2}
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(JsonLines().format(record))
    logging.getLogger(NAME).addHandler(handler)
    gc.collect()
    gc.disable()
    try:
        monkeypatch.setattr(vit.service.batcher, "_run", lambda rows: 1 / 0)
        assert vit.post("/v1/classify", **given).status_code == 500
        wait_until(lambda: room.n_taken == 0)
    finally:
        gc.enable()
        logging.getLogger(NAME).removeHandler(handler)
    (line,) = [line for line in said if "ZeroDivisionError" in line]
    assert "in _results" in line, "where it failed is told all the same"


def test_an_export_that_cannot_be_served_says_why(exports, own):
    with pytest.raises(InputRefused, match="does not serve this task") as refused:
        Models(exports["clip-dynamic"], ServeOptions(provider="cpu"))
    assert refused.value.found == "zero-shot-image-classification: its rows are images beside texts"
    folder = own(exports["vit-dynamic"])
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputRefused, match="does not say how images become"):
        Models(folder, ServeOptions(provider="cpu"))
