"""Adapters loaded and unloaded while the server runs: what is taken, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from live import running, wait_until, write_adapter

from lora_export import AdapterSession
from lora_export.artifact import MANIFEST
from lora_export.serve.models import Models
from lora_export.serve.options import ServeOptions
from lora_export.serve.runtime_adapters import RuntimeAdapters
from lora_export.serve.texts import Texts

FILE = "adapters/features.onnx_adapter"


def embedding(live, model: str) -> np.ndarray:
    found = live.post("/v1/embeddings", model=model, input="Open a socket.")
    assert found.status_code == 200, found.text
    return np.array(found.json()["data"][0]["embedding"])


def record(export: Path, file: str, content: bytes | None = None, **changes: object) -> None:
    """Put a file under an adapter's name into the manifest of `export`, as `add` does."""
    if content is not None:
        (export / file).write_bytes(content)
    path = export / MANIFEST
    fields = json.loads(path.read_text(encoding="utf-8"))
    known = fields["adapters"][0]
    name = Path(file).name.removesuffix(".onnx_adapter")
    fields["adapters"].append({**known, "name": name, "file": file, **changes})
    fields["files"][file] = hashlib.sha256((export / file).read_bytes()).hexdigest()
    path.write_text(json.dumps(fields), encoding="utf-8")


@pytest.fixture(scope="module")
def store(exports, tmp_path_factory) -> Path:
    """A folder with a copy of the export, to which adapters were added: doubled, poisoned, of another graph."""
    folder = tmp_path_factory.mktemp("store")
    export = folder / "served"
    shutil.copytree(exports["features-dynamic"], export)
    session = AdapterSession(export, "cpu", n_threads=1)
    tensors = session.read(export / FILE)
    doubled = {name: array * (2 if "lora_B" in name else 1) for name, array in tensors.items()}
    poisoned = {name: np.where(np.arange(array.size).reshape(array.shape) == 3, np.nan, array).astype(array.dtype)
                for name, array in tensors.items()}  # fmt: skip
    for name, given in (("doubled", doubled), ("poisoned", poisoned), ("other", {"x": np.zeros(1, np.float32)})):
        write_adapter(export / f"adapters/{name}.onnx_adapter", given)
        record(export, f"adapters/{name}.onnx_adapter")
    write_adapter(export / "adapters/changed.onnx_adapter", doubled)
    record(export, "adapters/changed.onnx_adapter")
    write_adapter(export / "adapters/changed.onnx_adapter", tensors)
    record(export, "adapters/torn.onnx_adapter", (export / FILE).read_bytes()[:300])
    write_adapter(export / "adapters/unlisted.onnx_adapter", tensors)
    shutil.copy(export / FILE, folder / "loose.onnx_adapter")
    (folder / "peft").mkdir()
    (folder.parent / "outside.onnx_adapter").write_bytes((export / FILE).read_bytes())
    (folder / "link.onnx_adapter").symlink_to(folder.parent / "outside.onnx_adapter")
    os.mkfifo(export / "adapters/pipe.onnx_adapter")
    foreign = folder / "foreign"
    (foreign / "adapters").mkdir(parents=True)
    shutil.copy(export / FILE, foreign / FILE)
    fields = json.loads((export / MANIFEST).read_text(encoding="utf-8"))
    fields["base"]["files"] = dict.fromkeys(fields["base"]["files"], "0" * 64)
    (foreign / MANIFEST).write_text(json.dumps(fields), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def live(exports, store):
    with running(exports["features-dynamic"], model_name="words", runtime_adapters=store) as found:
        yield found


def load(live, path: str, name: str = "new", **options: object):
    return live.post("/v1/load_lora_adapter", lora_name=name, lora_path=path, **options)


def test_an_adapter_is_loaded_used_replaced_and_unloaded(live, store):
    before = embedding(live, "features")
    found = load(live, f"served/{FILE}")
    assert (found.status_code, found.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    np.testing.assert_array_equal(embedding(live, "new"), before)
    assert load(live, "served/adapters/doubled.onnx_adapter").json()["error"]["code"] == "already_loaded"
    found = load(live, str(store / "served/adapters/doubled.onnx_adapter"), load_inplace=True)
    assert found.status_code == 200
    doubled = embedding(live, "new")
    assert np.abs(doubled - before).max() > 1e-3
    np.testing.assert_allclose(doubled, embedding(live, "features:2"), atol=1e-5)
    names = {model.id: model.root for model in live.openai().models.list()}
    assert names["new"] == "served/adapters/doubled.onnx_adapter"
    found = live.post("/v1/unload_lora_adapter", lora_name="new")
    assert (found.status_code, found.text) == (200, "Success: LoRA adapter 'new' removed successfully.")
    assert live.post("/v1/embeddings", model="new", input="x").status_code == 404
    assert live.post("/v1/unload_lora_adapter", lora_name="new").status_code == 404
    assert not any('model="new"' in name for name in live.metrics())
    np.testing.assert_array_equal(embedding(live, "features"), before)
    wait_until(lambda: [line for line in live.lines if line["event"] == "adapter unloaded"])
    loaded = [line for line in live.lines if line["event"] == "adapter loaded"]
    assert loaded[0]["sha256"] == hashlib.sha256((store / "served" / FILE).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("path", "status", "code", "said"),
    [
        ("served/adapters/poisoned.onnx_adapter", 400, "contract", "numbers that are not finite"),
        ("served/adapters/other.onnx_adapter", 400, "contract", "made for another graph; where: x [1] float32"),
        ("served/adapters/torn.onnx_adapter", 400, "contract", "no ONNX Runtime adapter, or is truncated"),
        ("served/adapters/changed.onnx_adapter", 400, "hash", "is not the one that was exported: its sha256 is"),
        ("served/adapters/unlisted.onnx_adapter", 400, "hash", "has no adapter file"),
        ("loose.onnx_adapter", 400, "hash", "lies in no export"),
        (f"foreign/{FILE}", 400, "base", "exported for another base"),
        ("peft", 400, "path", "`lora-export add`"),
        ("served/adapters/pipe.onnx_adapter", 400, "path", "is no file"),
        ("../outside.onnx_adapter", 403, "outside", "There is no file"),
        ("/etc/passwd", 403, "outside", "There is no file"),
        ("link.onnx_adapter", 403, "outside", "There is no file"),
        ("nothing.onnx_adapter", 403, "outside", "There is no file"),
        ("a\0b", 403, "outside", "There is no file"),
        ("served/model.onnx", 400, "hash", "has no adapter file 'model.onnx'"),
    ],
)
def test_what_is_refused_leaves_everything_as_it_was(live, store, path, status, code, said):
    before = embedding(live, "features")
    found = load(live, path, "bad")
    error = found.json()["error"]
    assert (found.status_code, error["code"], error["param"]) == (status, code, "lora_path")
    assert said in error["message"] and str(store) not in error["message"] and "/tmp" not in error["message"]
    assert live.post("/v1/embeddings", model="bad", input="x").status_code == 404
    np.testing.assert_array_equal(embedding(live, "features"), before)


def test_names_that_a_request_could_not_say_are_refused(live):
    for name in ("words", "a+b", "a:1", "../x", ""):
        found = load(live, f"served/{FILE}", name)
        assert (found.status_code, found.json()["error"]["param"]) == (400, "lora_name")


def test_a_large_file_is_refused_before_it_is_read(exports, store):
    with running(
        exports["features-dynamic"], model_name="words", runtime_adapters=store, max_adapter_bytes=300
    ) as small:
        found = load(small, f"served/{FILE}")
        assert found.json()["error"]["code"] == "size"


def test_without_the_option_nothing_is_loaded_or_unloaded(exports):
    with running(exports["features-dynamic"], model_name="words") as live:
        found = load(live, FILE)
        assert (found.status_code, found.json()["error"]["code"]) == (403, "runtime_adapters_off")
        assert live.post("/v1/unload_lora_adapter", lora_name="features").status_code == 403
        assert embedding(live, "features").shape == (32,)


def test_a_row_that_waits_for_an_adapter_that_is_unloaded_is_refused_and_no_other(exports, store):
    """It never gets the base's answer, nor an older one."""
    with running(exports["features-dynamic"], model_name="words", runtime_adapters=store) as live:
        expected = embedding(live, "features")
        load(live, f"served/{FILE}", "short")
        go, run = threading.Event(), live.service.batcher._run
        live.service.batcher._run = lambda rows: go.wait(20) and run(rows)
        with ThreadPoolExecutor(3) as pool:
            calls = [pool.submit(live.post, "/v1/embeddings", model="words", input="x")]
            wait_until(lambda: live.service.load().running)
            calls += [pool.submit(live.post, "/v1/embeddings", model=model, input="Open a socket.")
                      for model in ("short", "features")]  # fmt: skip
            wait_until(lambda: len(live.service.load().waiting) == 2)
            assert live.post("/v1/unload_lora_adapter", lora_name="short").status_code == 200
            go.set()
            first, short, kept = [call.result() for call in calls]
        assert (first.status_code, short.status_code, kept.status_code) == (200, 404, 200)
        np.testing.assert_allclose(kept.json()["data"][0]["embedding"], expected, atol=1e-5)


def test_a_row_that_waits_for_an_adapter_that_is_replaced_is_refused_and_no_other(exports, store):
    """Its tokens were made for the old one."""
    with running(exports["features-dynamic"], model_name="words", runtime_adapters=store) as live:
        load(live, f"served/{FILE}", "short")
        go, run = threading.Event(), live.service.batcher._run
        live.service.batcher._run = lambda rows: go.wait(20) and run(rows)
        with ThreadPoolExecutor(3) as pool:
            calls = [pool.submit(live.post, "/v1/embeddings", model="words", input="x")]
            wait_until(lambda: live.service.load().running)
            calls += [
                pool.submit(live.post, "/v1/embeddings", model=model, input="x") for model in ("short", "features")
            ]
            wait_until(lambda: len(live.service.load().waiting) == 2)
            assert load(live, f"served/{FILE}", "short", load_inplace=True).status_code == 200
            go.set()
            first, short, kept = [call.result() for call in calls]
        assert (first.status_code, short.status_code, kept.status_code) == (200, 409, 200)
        assert short.json()["error"]["code"] == "replaced"
        assert embedding(live, "short").shape == (32,)


def exported_with(exports, folder: Path, files: dict[str, str], **fields: object) -> None:
    """A copy of the export with further files in its folder, and other fields in its manifest."""
    shutil.copytree(exports["features-dynamic"], folder)
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8")) | fields
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        manifest["files"][name] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(manifest), encoding="utf-8")


def test_an_adapter_is_asked_with_the_settings_of_its_own_export(live, store, exports):
    for name, files in (
        ("same", {}),
        ("settings", {"generation_config.json": "{}"}),
        ("chat", {"chat_template.jinja": "x"}),
    ):
        exported_with(exports, store / name, files)
        assert load(live, f"{name}/{FILE}", name).status_code == 200
        place = live.service.models.view.adapters[name].place
        assert place == (store / name if files else live.service.models.folder)
        live.post("/v1/unload_lora_adapter", lora_name=name)


def test_an_adapter_of_another_quantization_or_padding_is_refused(live, store, exports):
    exported_with(exports, store / "padded", {}, pad_token_id=77)
    error = load(live, f"padded/{FILE}", "padded").json()["error"]
    assert error["code"] == "base" and "another pad_token_id: 77, where this export has" in error["message"]
    served = live.service.models.manifest
    live.service.models.manifest = replace(served, quantization="other")
    try:
        error = load(live, f"served/{FILE}", "floats").json()["error"]
    finally:
        live.service.models.manifest = served
    assert error["code"] == "base" and "another quantization: None" in error["message"]


def test_a_place_without_a_vocabulary_has_the_export_s_tokenizer(exports, tmp_path):
    export = exports["features-dynamic"]
    assert Texts(tmp_path, export).folder == export
    shutil.copy(export / "tokenizer.json", tmp_path)
    own = Texts(tmp_path, export)
    assert own.folder == tmp_path and own.longest is None


def test_what_an_adapter_said_is_read_with_the_settings_that_it_was_asked_with(exports, tmp_path):
    """Its run is under way when it is replaced by an adapter of another kind of classification."""
    export, file = tmp_path / "one", "adapters/plain.onnx_adapter"
    shutil.copytree(exports["classifier-dynamic"], export)
    manifest = json.loads((export / MANIFEST).read_text(encoding="utf-8"))
    next(each for each in manifest["adapters"] if each["name"] == "plain")["preprocessing"] = "adapters/plain"
    (export / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    (export / "adapters/plain").mkdir()
    with running(exports["classifier-dynamic"], model_name="colours", runtime_adapters=tmp_path) as live:

        def answer() -> list[float]:
            found = live.post("/v1/classify", model="new", input="x")
            assert found.status_code == 200, found.text
            return found.json()["data"][0]["probs"]

        assert load(live, f"one/{file}").status_code == 200
        before, go, run = answer(), threading.Event(), live.service.batcher._run
        went = threading.Event()

        def held(rows):
            found = run(rows)
            went.set()
            assert go.wait(20)
            return found

        live.service.batcher._run = held
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(answer)
            assert went.wait(20)
            config = {"problem_type": "multi_label_classification"}
            (export / "adapters/plain/config.json").write_text(json.dumps(config), encoding="utf-8")
            assert load(live, f"one/{file}", load_inplace=True).status_code == 200
            go.set()
            np.testing.assert_array_equal(call.result(), before)
        scores = np.log(before)  # the softmax's, but for a number that is added to all of them
        after = np.array(answer())
        np.testing.assert_allclose(np.diff(np.log(after / (1 - after))), np.diff(scores), atol=1e-4)
        assert abs(sum(after) - 1) > 1e-3


def test_the_settings_of_a_request_are_those_of_its_moment(exports, tmp_path):
    shutil.copytree(exports["features-dynamic"], tmp_path / "one")
    (tmp_path / "one/chat_template.jinja").write_text("x", encoding="utf-8")
    path = tmp_path / "one" / MANIFEST
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["files"]["chat_template.jinja"] = hashlib.sha256(b"x").hexdigest()
    path.write_text(json.dumps(fields), encoding="utf-8")
    models = Models(exports["features-dynamic"], ServeOptions(provider="cpu", n_threads=1))
    adapters = RuntimeAdapters(models, tmp_path, 10**9)
    adapters.load("new", f"one/{FILE}", in_place=False)
    asked = models.view.target("new")
    vocabulary = asked.settings.texts.tokenizer.get_vocab_size()
    tokenizer = tmp_path / "one/tokenizer.json"
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    content["added_tokens"].append({"id": vocabulary, "content": "<new>", "single_word": False, "lstrip": False,
                                    "rstrip": False, "normalized": False, "special": True})  # fmt: skip
    tokenizer.write_text(json.dumps(content), encoding="utf-8")
    adapters.load("new", f"one/{FILE}", in_place=True)
    assert asked.settings.texts.tokenizer.get_vocab_size() == vocabulary
    assert models.view.target("new").settings.texts.tokenizer.get_vocab_size() == vocabulary + 1
    assert models.view.target(models.base).settings is models.settings
    models.remove("new")
    assert set(models.view.settings) == {models.folder} and asked.settings.texts.encode(["x"])
