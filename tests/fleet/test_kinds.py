"""PEFT's layers that stay for the next adapter of a kind read it as layers of its own do."""

from __future__ import annotations

import shutil

import pytest
import safetensors.torch
import torch

from lora_export.adapters.folder import open_adapter
from lora_export.adapters.peft_reader import read_trained_adapter
from lora_export.base.checkpoint import Checkpoint, locate
from lora_export.base.tasks import Task
from lora_export.base.weightless import build_weightless
from lora_export.errors import InputRefused
from lora_export.fleet import kinds
from lora_export.fleet.kinds import ReaderOfKinds


@pytest.fixture(scope="module")
def base(bases) -> torch.nn.Module:
    checkpoint = Checkpoint.open(locate(str(bases["llama"]), kind="base"))
    return build_weightless(Task.TEXT_GENERATION, checkpoint.load_config(), "float32")


def scaled(adapter, folder, by: float):
    """The same with other numbers."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor * by for name, tensor in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return open_adapter(folder, str(folder), folder.name)


def same(one, other) -> bool:
    return one.lora.keys() == other.lora.keys() and all(
        torch.equal(one.lora[path].a, pair.a)
        and torch.equal(one.lora[path].b, pair.b)
        and one.lora[path].a.dtype == pair.a.dtype
        and (one.lora[path].scale, one.lora[path].rank) == (pair.scale, pair.rank)
        for path, pair in other.lora.items()
    )


@pytest.mark.parametrize("name", ["chat", "code", "speak"])
def test_the_next_of_a_kind_is_read_as_alone_and_the_one_before_stays_what_it_was(
    name, base, adapters, tmp_path, monkeypatch
):
    reader, loaded = ReaderOfKinds(), []
    real = kinds.load_with_peft
    monkeypatch.setattr(kinds, "load_with_peft", lambda *given: loaded.append(given) or real(*given))
    folders = [scaled(adapters[name], tmp_path / str(n), by) for n, by in enumerate((1.0, 0.5, 3.0))]
    found = [reader(folder, base) for folder in folders]
    assert len(loaded) == 1
    for folder, adapter in zip(folders, found, strict=True):
        assert same(adapter, read_trained_adapter(folder, base)) and adapter.name == folder.name
    assert not same(found[0], found[1])


def test_another_kind_and_what_changes_more_than_pairs_are_read_anew(base, adapters, tmp_path, monkeypatch):
    reader, loaded = ReaderOfKinds(), []
    real = kinds.load_with_peft
    monkeypatch.setattr(kinds, "load_with_peft", lambda *given: loaded.append(given[0].name) or real(*given))
    for name in ("chat", "code", "voice", "gains"):
        for n in range(2):
            folder = scaled(adapters[name], tmp_path / f"{name}{n}", 1.0 + n)
            adapter, alone = reader(folder, base), read_trained_adapter(folder, base)
            assert same(adapter, alone) and adapter.replaced.keys() == alone.replaced.keys()
            assert all(torch.equal(adapter.replaced[path], tensor) for path, tensor in alone.replaced.items())
    assert loaded == ["chat0", "code0", "voice0", "voice1", "gains0", "gains1"]


def test_what_is_refused_leaves_nothing_for_the_next(base, adapters, tmp_path):
    reader = ReaderOfKinds()
    reader(scaled(adapters["chat"], tmp_path / "good", 1.0), base)
    with pytest.raises(InputRefused, match="not finite"):
        reader(scaled(adapters["chat"], tmp_path / "bad", float("nan")), base)
    assert reader._model is None
    last = scaled(adapters["chat"], tmp_path / "last", 2.0)
    assert same(reader(last, base), read_trained_adapter(last, base))


def test_tensors_that_find_no_place_are_read_anew(base, adapters, tmp_path, monkeypatch):
    reader = ReaderOfKinds()
    reader(scaled(adapters["chat"], tmp_path / "one", 1.0), base)
    monkeypatch.setattr(kinds, "load_again", lambda folder, model: False)
    two = scaled(adapters["chat"], tmp_path / "two", 2.0)
    assert same(reader(two, base), read_trained_adapter(two, base))
