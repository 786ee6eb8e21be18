"""`/v1/embeddings` and `/v1/classify` of a running server: each answer is its own adapter's."""

from __future__ import annotations

import base64
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from live import running, wait_until
from transformers import AutoTokenizer

from lora_export import AdapterSession
from lora_export.serve import api
from lora_export.serve.encoders import own_classes

TEXTS = ("Open a socket.", "Größe, and a longer text than the others are: it decides the padding.", "x", "listen")


@pytest.fixture(scope="module")
def classifier(exports):
    with running(exports["classifier-dynamic"], model_name="colours") as live:
        yield live


@pytest.fixture(scope="module")
def features(exports):
    with running(exports["features-dynamic"], model_name="words", max_body_bytes=20_000) as live:
        yield live


@pytest.fixture(scope="module")
def alone(exports):
    """What a session gives a text by itself, with Transformers' tokenizer: `alone(export, adapter, text)`."""
    opened = {}

    def run(name, adapter, text):
        if name not in opened:
            folder = exports[name]
            opened[name] = AdapterSession(folder, "cpu", n_threads=1), AutoTokenizer.from_pretrained(folder)
        session, tokenizer = opened[name]
        return session.run(dict(tokenizer(text, return_tensors="np")), adapter)

    return run


def probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


MODELS = {
    "colours": None,
    "plain": "plain",
    "shades": "shades",
    "plain:0.25": {"plain": 0.25},
}


def test_classes_are_the_adapter_s_own(classifier, alone):
    for model, adapter in MODELS.items():
        for text in TEXTS:
            (found,) = classifier.post("/v1/classify", model=model, input=text).json()["data"]
            expected = probabilities(alone("classifier-dynamic", adapter, text)["logits"][0])
            np.testing.assert_allclose(found["probs"], expected, atol=1e-5)
            assert found["num_classes"] == len(expected) == (4 if "shades" in model else 3)
            assert found["label"] == found["labels"][int(expected.argmax())]
    (found,) = classifier.post("/v1/classify", model="colours", input="x").json()["data"]
    assert found["labels"] == ["red", "green", "blue"]


def test_clients_at_once_with_different_adapters_share_runs_and_get_their_own_answers(classifier, alone):
    expected = {
        (model, text): probabilities(alone("classifier-dynamic", adapter, text)["logits"][0])
        for model, adapter in MODELS.items()
        for text in TEXTS
    }
    nearest = min(
        np.abs(expected[one, text] - expected[two, text]).max()
        for text in TEXTS
        for one in MODELS
        for two in MODELS
        if one < two and len(expected[one, text]) == len(expected[two, text])
    )
    assert nearest > 100 * 1e-5  # another adapter's answer would not pass
    calls = list(expected) * 4

    def ask(call):
        with classifier.http() as client:
            return client.post("/v1/classify", json={"model": call[0], "input": call[1]}).json()["data"][0]["probs"]

    with ThreadPoolExecutor(12) as pool:
        for call, found in zip(calls, pool.map(ask, calls), strict=True):
            np.testing.assert_allclose(found, expected[call], atol=1e-5)
    figures = classifier.metrics()
    assert figures["lora_export_batch_rows_sum"] > figures["lora_export_batch_rows_count"]
    assert figures["lora_export_batch_models_sum"] > figures["lora_export_batch_models_count"]
    assert figures['lora_export_requests_total{model="shades",path="/v1/classify",status="200"}'] >= 16
    assert figures['lora_export_tokens_total{kind="prompt",model="shades"}'] > 16
    assert figures['lora_export_requests_total{model="blend",path="/v1/classify",status="200"}'] >= 16
    assert not any("plain:" in name for name in figures)


def test_openai_s_client_gets_embeddings_and_models(features, alone):
    client = features.openai()
    for model, adapter in (("words", None), ("features", "features"), ("features:0.5", {"features": 0.5})):
        for form in (openai.NOT_GIVEN, "float"):  # by itself the client asks for base64
            found = client.embeddings.create(model=model, input=list(TEXTS), encoding_format=form)
            assert [each.index for each in found.data] == [0, 1, 2, 3] and found.model == model
            for each, text in zip(found.data, TEXTS, strict=True):
                mean = alone("features-dynamic", adapter, text)["last_hidden_state"][0].mean(axis=0)
                np.testing.assert_allclose(each.embedding, mean / np.linalg.norm(mean), atol=1e-5)
            assert found.usage.prompt_tokens == found.usage.total_tokens == sum(len(t.encode()) + 2 for t in TEXTS)
    found = {model.id: model.parent for model in client.models.list()}
    assert found == {"words": None, "features": "words"}
    assert client.models.retrieve("features").root == "adapters/features.onnx_adapter"
    with pytest.raises(openai.NotFoundError, match="'feature' is not served"):
        client.models.retrieve("feature")


def test_tokens_are_taken_as_they_are(features):
    text = features.post("/v1/embeddings", model="features", input="ab").json()["data"][0]["embedding"]
    ids = [1, *(4 + index for index in (0, 1)), 2]
    one = features.post("/v1/embeddings", model="features", input=ids).json()["data"][0]["embedding"]
    two = features.post("/v1/embeddings", model="features", input=[ids, ids[:3]]).json()["data"]
    assert len(two) == 2 and one != text
    np.testing.assert_allclose(two[0]["embedding"], one, atol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "normalize", "expected"),
    [
        ("first", False, lambda out: out["last_hidden_state"][0, 0]),
        ("last", False, lambda out: out["last_hidden_state"][0, -1]),
        ("pooler", False, lambda out: out["pooler_output"][0]),
        ("mean", False, lambda out: out["last_hidden_state"][0].mean(axis=0)),
    ],
)
def test_pooling(exports, alone, pooling, normalize, expected):
    from lora_export.serve.batching import Row, Ticket
    from lora_export.serve.encoders import Encoder
    from lora_export.serve.models import Models
    from lora_export.serve.options import Pooling, ServeOptions

    models = Models(exports["features-dynamic"], ServeOptions(provider="cpu", n_threads=1))
    texts = models.settings.texts
    rows = [Row("features", ids, Ticket(0)) for ids in texts.encode(TEXTS)]
    for found, text in zip(Encoder(models, Pooling(pooling), normalize=normalize).run(rows), TEXTS, strict=True):
        np.testing.assert_allclose(found.values, expected(alone("features-dynamic", "features", text)), atol=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "param", "said"),
    [
        ({"model": "feature", "input": "x"}, 404, "model", "did you mean 'features'?"),
        ({"model": "features:x", "input": "x"}, 400, "model", "is no weight"),
        ({"input": "x"}, 400, "model", "Field required"),
        ({"model": "features"}, 400, "input", "Field required"),
        ({"model": "features", "input": ""}, 400, "input", "empty"),
        ({"model": "features", "input": []}, 400, "input", "empty"),
        ({"model": "features", "input": ["x", ""]}, 400, "input", "empty"),
        ({"model": "features", "input": [3, 260]}, 400, "input", "260 is no token"),
        ({"model": "features", "input": [3, -1]}, 400, "input", "-1 is no token"),
        ({"model": "features", "input": "x" * 159}, 400, "input", "An input has 161 tokens; the model takes 160"),
        ({"model": "features", "input": "x", "dimensions": 8}, 400, "dimensions", "'dimensions' is not supported"),
        ({"model": "features", "input": "x", "encoding_format": "hex"}, 400, "encoding_format", "'float' or 'base64'"),
        ({"model": "features", "input": ["x"] * 1025}, 400, "input", "at most 1024 are taken"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(features, body, status, param, said):
    found = features.post("/v1/embeddings", **body)
    error = found.json()["error"]
    assert (found.status_code, error["type"]) == (status, {404: "not_found_error"}.get(status, "invalid_request_error"))
    assert (error["param"] or "").split(".")[0] == param and said in error["message"]


def test_a_blend_of_heads_of_different_sizes_is_refused_and_its_neighbours_are_not(classifier):
    with ThreadPoolExecutor(3) as pool:
        calls = [("shades:0.5+plain", 400), ("plain", 200), ("shades", 200)] * 3
        found = list(pool.map(lambda call: classifier.post("/v1/classify", model=call[0], input="x"), calls))
    assert [each.status_code for each in found] == [status for _, status in calls]
    assert "heads of different sizes" in found[0].json()["error"]["message"]


def test_adapters_that_do_not_fit_in_memory_are_read_again(exports, alone):
    # Room for the larger of two.
    room = max(path.stat().st_size for path in (exports["classifier-dynamic"] / "adapters").iterdir())
    with running(exports["classifier-dynamic"], model_name="colours", max_resident_bytes=room) as live:
        for model in ("plain", "shades") * 2:
            (found,) = live.post("/v1/classify", model=model, input="x").json()["data"]
            expected = probabilities(alone("classifier-dynamic", model, "x")["logits"][0])
            np.testing.assert_allclose(found["probs"], expected, atol=1e-5)
            assert live.service.models.session.residency.n_bytes <= room


def test_a_defect_is_logged_and_tells_the_client_nothing(exports):
    with running(exports["features-dynamic"], model_name="words") as live:
        live.service.batcher._run = lambda rows: 1 / 0
        found = live.post("/v1/embeddings", model="features", input="x")
        assert found.status_code == 500 and "ZeroDivision" not in found.text
        assert found.json()["error"]["message"] == "The server failed to answer; its log says why"
        wait_until(lambda: any(line["event"] == "error" for line in live.lines))


def test_the_other_task_s_path_says_which_answers(features):
    found = features.post("/v1/classify", model="features", input="x")
    assert found.status_code == 400 and "/v1/embeddings answers" in found.json()["error"]["message"]


def test_other_errors_have_the_same_form(features):
    with features.http() as client:
        deep = client.post("/v1/embeddings", content="[" * 9000, headers={"content-type": "application/json"})
        plain = client.post("/v1/embeddings", content='{"model": "features", "input": "x"}')
        broken = client.post("/v1/embeddings", content="{", headers={"content-type": "application/json"})
        large = client.post("/v1/embeddings", json={"model": "features", "input": "x" * 20_000})
        chunks = client.post("/v1/embeddings", content=iter([b"x" * 15_000] * 2))
        half = client.post(
            "/v1/embeddings",
            content=b'{"model": "features", "input": "\\ud800"}',
            headers={"content-type": "application/json"},
        )
        name = client.post("/v1/embeddings", content=b'{"\\ud800": "x"}', headers={"content-type": "application/json"})
        nowhere, method = client.get("/v2"), client.get("/v1/embeddings")
    statuses = [each.status_code for each in (deep, plain, broken, large, chunks, half, name, nowhere, method)]
    assert statuses == [400, 400, 400, 413, 413, 400, 400, 404, 405]
    for each in (deep, plain, broken, large, chunks, half, name, nowhere, method):
        assert set(each.json()["error"]) == {"message", "type", "param", "code"}


def test_a_client_that_leaves_takes_its_rows_out_of_the_queue(exports):
    with running(exports["features-dynamic"], model_name="words") as live:
        go, run = threading.Event(), live.service.batcher._run
        live.service.batcher._run = lambda rows: go.wait(20) and run(rows)
        answers = []

        def ask():
            answers.append(live.post("/v1/embeddings", model="features", input="kept").status_code)

        keeps = threading.Thread(target=ask)
        keeps.start()
        wait_until(lambda: live.service.load().running == ["features"])
        with pytest.raises(openai.APITimeoutError):
            live.openai().with_options(timeout=0.2).embeddings.create(model="words", input=["left", "left"])
        wait_until(lambda: not live.service.load().waiting)
        info = next(name for name in live.metrics() if name.startswith("vllm:lora_requests_info"))
        assert 'max_lora="32"' in info and 'running_lora_adapters="features"' in info
        go.set()
        keeps.join(20)
        assert answers == [200]
        wait_until(lambda: any(line.get("status") == 499 for line in live.lines))


def test_deadlines_and_a_full_queue(exports):
    with running(exports["features-dynamic"], model_name="words", timeout_s=2, max_queue=1) as live:
        go, run = threading.Event(), live.service.batcher._run
        live.service.batcher._run = lambda rows: go.wait(20) and run(rows)
        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(live.post, "/v1/embeddings", model="features", input="x")]
            wait_until(lambda: live.service.load().running)
            calls.append(pool.submit(live.post, "/v1/embeddings", model="features", input="x"))
            wait_until(lambda: live.service.load().waiting)
            full = live.post("/v1/embeddings", model="features", input="x")
            with live.http() as client:
                assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
            late = [call.result() for call in calls]
        go.set()
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        assert [each.status_code for each in late] == [504, 504]
        assert "no answer within 2 s" in late[0].json()["error"]["message"]
        assert live.post("/v1/embeddings", model="features", input="x").status_code == 200


def test_the_log_has_no_texts_unless_asked_for(exports, features):
    features.post("/v1/embeddings", model="features", input="a secret")
    features.post("/v1/embeddings", model="another secret", input="x")
    wait_until(lambda: "'model': 'features', 'rows': 1, 'prompt_tokens': 10" in str(features.lines))
    wait_until(lambda: features.lines[-1].get("status") == 404)
    assert "secret" not in str(features.lines)
    with running(exports["features-dynamic"], model_name="words", log_prompts=True) as live:
        live.post("/v1/embeddings", model="features", input="a text")
        wait_until(lambda: "a text" in str(live.lines))


def test_base64_is_little_endian_float32(features):
    given = {"model": "features", "input": "x"}
    plain = features.post("/v1/embeddings", **given).json()["data"][0]["embedding"]
    packed = features.post("/v1/embeddings", **given, encoding_format="base64").json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed), "<f4"), plain, atol=1e-6)


def test_an_answer_to_many_rows_is_written_off_the_event_loop(features, monkeypatch):
    threads, encoded = [], api._encoded

    def noted(*given):
        threads.append(threading.current_thread().name)
        return encoded(*given)

    monkeypatch.setattr(api, "_encoded", noted)
    one = features.post("/v1/embeddings", model="features", input="x").json()["data"]
    many = features.post("/v1/embeddings", model="features", input=["x"] * 20).json()["data"]
    assert [row["index"] for row in many] == list(range(20))
    for row in many:
        np.testing.assert_allclose(row["embedding"], one[0]["embedding"], atol=1e-6)
    assert len(threads) == 21 and threads[0] not in threads[1:]


def test_scores_that_are_not_finite_shift_no_label():
    low = np.finfo(np.float32).min
    row = np.array([np.nan, 1.0, -np.inf, low, 2.0, low, low], np.float32)
    np.testing.assert_array_equal(row[own_classes(row)], row[:5])
    assert len(row[5:][own_classes(row[5:])]) == 0
