"""Adapters whose files are mapped are those that are read, in pages that are the file's."""

from __future__ import annotations

import mmap
import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from live import write_adapter
from references import inputs_for

from lora_export import AdapterSession, InputRefused, Seq2SeqSession, UsageProblem
from lora_export.runtime.adapter_file import map_adapter, read_adapter
from lora_export.serve.models import Models
from lora_export.serve.options import ServeOptions


def owner(array: np.ndarray) -> object:
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


def test_tensors_are_the_file_s_own_pages(exports):
    for name in ("llama-kinds", "llama-f16"):
        for file in (exports[name] / "adapters").glob("*.onnx_adapter"):
            read, mapped = read_adapter(file), map_adapter(file)
            assert list(read) == list(mapped)
            for key, array in read.items():
                np.testing.assert_array_equal(mapped[key], array)
                assert mapped[key].dtype == array.dtype and mapped[key].shape == array.shape
            kinds = [type(owner(array)) for array in mapped.values()]
            # ONNX Runtime's format keeps no 8 bytes' boundary for whole numbers.
            assert kinds.count(mmap.mmap) >= len(kinds) - sum(array.dtype == np.int64 for array in read.values())


@pytest.mark.parametrize("rows", ["kind", ["topic", None, "kind", {"topic": 0.5}, "topic"]], ids=["one", "rows"])
def test_runs_are_the_same_bit_for_bit(exports, rows):
    inputs = inputs_for("bert")
    read, mapped = (AdapterSession(exports["bert-dynamic"], "cpu", map_adapters=each) for each in (False, True))
    np.testing.assert_array_equal(mapped.run(inputs, rows)["logits"], read.run(inputs, rows)["logits"])
    given = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)}
    texts = [Seq2SeqSession(exports["bart-dynamic"], "cpu", map_adapters=each).generate(given, "bart-all", max_new_tokens=5)
             for each in (False, True)]  # fmt: skip
    assert texts[0] == texts[1]


def test_a_server_maps_them_if_it_is_asked_to(exports):
    options = ServeOptions(provider="cpu", map_adapters=True)
    for name, adapter in (("classifier-dynamic", "plain"), ("t5-dynamic", "t5-all")):
        banks = Models(exports[name], options).session.banks
        arrays = [array for bank in banks.values() for array in bank.adapters[adapter].tensors.values()]
        assert arrays and all(type(owner(array)) is mmap.mmap for array in arrays)


def test_a_file_that_takes_the_place_of_another_changes_nothing(exports, own):
    folder, inputs = own(exports["bert-dynamic"]), inputs_for("bert")
    session = AdapterSession(folder, "cpu", map_adapters=True)
    expected = session.run(inputs, "topic")["logits"]
    other = folder / "other"
    shutil.copyfile(folder / "adapters" / "kind.onnx_adapter", other)
    other.replace(folder / "adapters" / "topic.onnx_adapter")
    np.testing.assert_array_equal(session.run(inputs, ["topic"] * 5)["logits"], expected)


def test_what_lies_elsewhere_than_in_the_file_is_copied(tmp_path, monkeypatch):
    """Zeros are in many places, and another runtime may lay its copy out in another way."""
    zeros, other = np.zeros((1, 4, 2), np.float32), np.arange(8, dtype=np.float32).reshape(1, 2, 4)
    write_adapter(tmp_path / "zeros.onnx_adapter", {"a": zeros})
    write_adapter(tmp_path / "both.onnx_adapter", {"a": zeros, "b": other, "c": np.zeros((1, 0, 4), np.float32)})
    assert type(owner(map_adapter(tmp_path / "zeros.onnx_adapter")["a"])) is not mmap.mmap
    found = map_adapter(tmp_path / "both.onnx_adapter")
    assert all(type(owner(found[name])) is mmap.mmap for name in "ab") and found["c"].shape == (1, 0, 4)
    np.testing.assert_array_equal(found["b"], other)
    moved = {name: ort.OrtValue.ortvalue_from_numpy(array.copy()) for name, array in found.items()}
    monkeypatch.setattr(
        ort.AdapterFormat, "read_adapter", lambda path: type("Read", (), {"get_parameters": lambda s: moved})()
    )
    copied = map_adapter(tmp_path / "both.onnx_adapter")
    np.testing.assert_array_equal(copied["b"], other)
    assert not any(type(owner(array)) is mmap.mmap for array in copied.values())


def test_what_is_no_adapter_is_refused(tmp_path):
    for content in (b"", b"other"):
        Path(tmp_path / "a.onnx_adapter").write_bytes(content)
        with pytest.raises(InputRefused, match="no ONNX Runtime adapter"):
            map_adapter(tmp_path / "a.onnx_adapter")
    with pytest.raises(InputRefused, match="There is no such adapter file"):
        map_adapter(tmp_path / "absent.onnx_adapter")


def test_a_bound_of_what_takes_no_memory_is_refused(exports):
    for session in (AdapterSession, Seq2SeqSession):
        name = "bert-dynamic" if session is AdapterSession else "bart-dynamic"
        with pytest.raises(UsageProblem, match="take no memory to be bounded"):
            session(exports[name], "cpu", max_bytes=10**9, map_adapters=True)
