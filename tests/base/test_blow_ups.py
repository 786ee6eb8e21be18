"""Small files that claim to be large: terabytes, 200,000 tensors, a header without end. Each is told soon and cheaply."""

from __future__ import annotations

import json
import resource
import struct
import time
from pathlib import Path

import pytest

from lora_export.adapters.folder import open_adapter
from lora_export.base.checkpoint import Checkpoint, Located
from lora_export.base.stored import SafetensorsFiles
from lora_export.errors import InputRefused

TERABYTE = 1 << 40
N_MANY = 200_000


def safetensors_file(path: Path, fields: dict, n_bytes: int) -> Path:
    """A file with a header of `fields` and `n_bytes` of data, of which the disk holds nothing."""
    text = json.dumps(fields).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + n_bytes)
    return path


def tensor(shape: list[int], start: int = 0) -> dict:
    n_bytes = 4
    for dim in shape:
        n_bytes *= dim
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, start + n_bytes]}


@pytest.fixture(autouse=True)
def _soon_and_in_little_memory():
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - began < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


@pytest.mark.parametrize(
    ("shape", "n_bytes"), [([TERABYTE], 16), ([2**62, 2**62], 16), ([2**40, 0], 0), ([2**28], 2**30)]
)
def test_a_base_of_terabytes_is_refused_by_its_config_or_its_size(shape, n_bytes, bases, tmp_path):
    for file in bases["bert"].iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    safetensors_file(tmp_path / "model.safetensors", {"embeddings.word_embeddings.weight": tensor(shape)}, n_bytes)
    with pytest.raises(InputRefused) as refused:
        Checkpoint.open(Located(tmp_path, "b"))
    assert refused.value.what in (
        "The file is truncated or not safetensors",
        "The base's config does not fit its checkpoint",
    )


@pytest.mark.parametrize("length", [0, 1 << 62, 2**64 - 1, 100_000_001])
def test_a_header_without_end_is_refused(length, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(64))
    with pytest.raises(InputRefused, match="truncated or not safetensors"):
        SafetensorsFiles.open([path])


def test_many_tensors_are_read_soon(adapters, own):
    folder = own(adapters["chat"])
    names = (f"base_model.model.layers.{n}.lora_A.weight" for n in range(N_MANY))
    fields = {name: tensor([1, 1], 4 * n) for n, name in enumerate(names)}
    safetensors_file(folder / "adapter_model.safetensors", fields, 4 * N_MANY)
    assert len(open_adapter(folder, "a").shapes) == N_MANY
