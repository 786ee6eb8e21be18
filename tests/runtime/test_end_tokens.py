"""A row ends at the end tokens of its own adapter's settings, in `generate`, `serve`, `run` and GenAI's file."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from live import running
from tokenizers import Tokenizer

from lora_export import AdapterSession, Seq2SeqSession
from lora_export.artifact import read_manifest
from lora_export.base.tasks import Task
from lora_export.contract import SINGLE
from lora_export.export.genai import write_settings
from lora_export.trial import run_trial

NEW = 24
PROMPT = "x"


def brought(folder: Path, adapter: str, place: str) -> Path:
    """The folder in which the manifest of the export `folder` now says that `adapter` has its settings."""
    manifest = folder / "lora_export.json"
    fields = json.loads(manifest.read_text())
    next(each for each in fields["adapters"] if each["name"] == adapter)["preprocessing"] = place
    manifest.write_text(json.dumps(fields))
    (folder / place).mkdir(exist_ok=True)
    return folder / place


def cut(ids: list[int], ends: set[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


@pytest.fixture
def export(exports, own) -> tuple[Path, int, dict[str | None, list[int]]]:
    """An export, a token that adapter "chat" and another row write before their end, and the rows' texts."""
    folder = own(exports["llama-dynamic"])
    rows = ("chat", "code", None)
    found = AdapterSession(folder, "cpu").generate([PROMPT] * 3, list(rows), max_new_tokens=NEW, eos_ids=())
    texts = {name: list(each.ids) for name, each in zip(rows, found, strict=True)}
    others = {token for name in ("code", None) for token in cut(texts[name], {2})}
    return folder, next(token for token in cut(texts["chat"], {2})[1:] if token in others), texts


@pytest.mark.parametrize("kind", ["tokenizer", "generation settings"])
def test_a_row_ends_by_its_own_adapter_s_settings(export, kind):
    folder, end, texts = export
    place = brought(folder, "chat", "adapters/chat")
    if kind == "tokenizer":
        word = Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(end)
        (place / "tokenizer_config.json").write_text(json.dumps({"eos_token": word}))
    else:
        (place / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 2]}))
    expected = {name: cut(ids, {2, end} if name == "chat" else {2}) for name, ids in texts.items()}
    assert len(expected["chat"]) < len(cut(texts["chat"], {2}))
    session = AdapterSession(folder, "cpu")
    found = session.generate([PROMPT] * 3, list(expected), max_new_tokens=NEW)
    assert [list(each.ids) for each in found] == list(expected.values())
    with running(folder, model_name="base") as live:
        for name, ids in expected.items():
            answer = live.post("/v1/completions", model=name or "base", prompt=PROMPT, max_tokens=NEW).json()
            assert answer["choices"][0]["text"] == session.tokenizer(name).decode(ids)
    for name, ids in expected.items():
        blend = {} if name is None else {name: 1.0}
        (tried,) = run_trial(folder, [PROMPT], blend, provider="cpu", max_new_tokens=NEW, is_raw=True)["results"]
        assert tried["tokens"] == ids


def test_settings_that_took_the_place_of_the_base_s_end_every_text(export):
    folder, end, texts = export
    config = json.loads((folder / "tokenizer_config.json").read_text())
    word = Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(end)
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": word}))
    (plain,) = AdapterSession(folder, "cpu").generate([PROMPT], "chat", max_new_tokens=NEW)
    assert list(plain.ids) == cut(texts["chat"], {2})  # the configuration alone, as in Transformers
    brought(folder, "chat", ".")
    (own,) = AdapterSession(folder, "cpu").generate([PROMPT], "chat", max_new_tokens=NEW)
    assert list(own.ids) == cut(texts["chat"], {2, end}) != list(plain.ids)


@pytest.mark.parametrize("is_served_with_it", [False, True])
def test_an_adapter_loaded_at_run_time_ends_by_the_settings_of_its_own_export(export, tmp_path, is_served_with_it):
    """The server's export says of none of its adapters that it brought settings; that of the adapter does."""
    folder, end, texts = export
    store = tmp_path / "store"
    shutil.copytree(folder, store / "one")
    word = Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(end)
    name = "tokenizer_config.json"
    for each in [store / "one"] + [folder] * is_served_with_it:
        (each / name).write_text(json.dumps(json.loads((each / name).read_text()) | {"eos_token": word}))
        fields = json.loads((each / "lora_export.json").read_text())
        fields["files"][name] = hashlib.sha256((each / name).read_bytes()).hexdigest()
        (each / "lora_export.json").write_text(json.dumps(fields))
    brought(store / "one", "chat", ".")
    (file,) = next(each for each in read_manifest(folder).adapters if each.name == "chat").files.values()
    decode = AdapterSession(folder, "cpu").tokenizer("chat").decode
    with running(folder, model_name="base", runtime_adapters=store) as live:
        assert live.post("/v1/load_lora_adapter", lora_name="new", lora_path=f"one/{file}").status_code == 200
        for model, ends in (("chat", {2}), ("new", {2, end})):
            answer = live.post("/v1/completions", model=model, prompt=PROMPT, max_tokens=NEW).json()
            assert answer["choices"][0]["text"] == decode(cut(texts["chat"], ends))


def test_an_adapter_s_own_place_without_a_tokenizer_goes_by_the_export_s(export):
    folder, end, texts = export
    place, word = brought(folder, "chat", "adapters/chat"), Tokenizer.from_file(str(folder / "tokenizer.json"))
    (place / "chat_template.jinja").write_text("{{ messages }}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": word.id_to_token(end)}))
    (found,) = AdapterSession(folder, "cpu").generate([PROMPT], "chat", max_new_tokens=NEW)
    assert list(found.ids) == cut(texts["chat"], {end})


def test_targets_start_and_end_by_their_own_adapter_s_settings(exports, own):
    folder = own(exports["bart-dynamic"])
    place = brought(folder, "bart-all", "adapters/bart-all")
    given = {"input_ids": np.array([[20, 30, 40]]), "attention_mask": np.ones((1, 3), np.int64)}
    plain = Seq2SeqSession(folder, "cpu")
    free = plain.generate(given, "bart-all", max_new_tokens=9, start_ids=[2, 50], eos_ids=())[0]
    fields = {"forced_bos_token_id": 50, "eos_token_id": free[4]}
    (place / "generation_config.json").write_text(json.dumps(fields))
    session = Seq2SeqSession(folder, "cpu")
    both = {name: np.concatenate([array, array]) for name, array in given.items()}
    found = session.generate(both, ["bart-all", None], max_new_tokens=9)
    assert found == [cut(free, {free[4]}), plain.generate(given, None, max_new_tokens=9)[0]]
    assert (session.rules("bart-all").start, session.rules().start) == ((2, 50), (2,))


@pytest.mark.parametrize(
    ("generation", "tokenizer_end", "places", "expected"),
    [
        ({"eos_token_id": 2}, None, {}, 2),
        ({"eos_token_id": [7, 2]}, None, {}, [2, 7]),
        ({"eos_token_id": 2}, "[SEP]", {"chat": "."}, 2),
        ({"eos_token_id": 2}, "[CLS]", {"chat": "."}, [1, 2]),
        ({"eos_token_id": 2}, "[CLS]", {"chat": "adapters/chat"}, 2),
        ({}, "[CLS]", {}, 2),  # the configuration's
    ],
)
def test_genai_ends_as_the_export_does(exports, own, generation, tokenizer_end, places, expected):
    folder = own(exports["llama-dynamic"])
    (folder / "genai_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(generation))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": tokenizer_end}))
    import transformers

    plan = SimpleNamespace(
        task=Task.TEXT_GENERATION, given_graph=None, carried=SimpleNamespace(places=places),
        config=transformers.AutoConfig.from_pretrained(folder),
    )  # fmt: skip
    write_settings(plan, folder, {SINGLE: read_manifest(folder).contract}, required=False)
    assert json.loads((folder / "genai_config.json").read_text())["model"]["eos_token_id"] == expected
