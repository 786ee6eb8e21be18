"""Which files of a base are read: those that `from_pretrained` reads, over every combination of what may lie there."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from lora_export.base.stored import SafetensorsFiles, weight_files
from lora_export.errors import InputRefused

CONFIG = transformers.BertConfig(
    vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4,
    max_position_embeddings=4, type_vocab_size=1,
)  # fmt: skip
INDEX = "model.safetensors.index.json"
WATCHED = "embeddings.word_embeddings.weight"
# Where the index says that the second half of the tensors lies, and whether it does.
SHARDS = {
    "beside": ("b.safetensors", True),
    "in a folder": ("more/b.safetensors", True),
    "absent": ("c.safetensors", False),
}


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return transformers.BertModel(CONFIG).state_dict()


def save(tensors: dict[str, torch.Tensor], path: Path, mark: float) -> None:
    """All of `tensors`; the watched one says by its numbers which file it came from."""
    path.parent.mkdir(exist_ok=True, parents=True)
    marked = {name: torch.full_like(t, mark) if name == WATCHED else t.clone() for name, t in tensors.items()}
    safetensors.torch.save_file(marked, path, metadata={"format": "pt"})


def base(folder: Path, tensors: dict, *, single: bool, index: bool, shard: str, variant: bool, stray: bool) -> Path:
    CONFIG.save_pretrained(folder)
    first = dict(itertools.islice(tensors.items(), len(tensors) // 2))
    second = {name: tensor for name, tensor in tensors.items() if name not in first}
    name, is_there = SHARDS[shard]
    save(first, folder / "a.safetensors", 1)
    if is_there:
        save(second, folder / name, 1)
    if single:
        save(tensors, folder / "model.safetensors", 2)
    if variant:
        save(tensors, folder / "model.fp16.safetensors", 3)
    if stray:
        save(tensors, folder / "model-00001-of-00009.safetensors", 4)
    if index:
        places = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, name)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("single", [True, False])
def test_they_are_those_that_transformers_reads(single, index, shard, tensors, tmp_path):
    for variant, stray in itertools.product((True, False), repeat=2):
        what = {"single": single, "index": index, "shard": shard, "variant": variant, "stray": stray}
        folder = base(tmp_path / f"{variant}-{stray}", tensors, **what)
        try:
            expected = transformers.BertModel.from_pretrained(folder, use_safetensors=True).state_dict()
        except (OSError, safetensors.SafetensorError):
            with pytest.raises(InputRefused, match=r"has no weights|names files that are not there"):
                weight_files(folder)
            continue
        files = SafetensorsFiles.open(weight_files(folder))
        assert files.tensors.keys() == expected.keys(), what
        assert files.read(WATCHED).equal(expected[WATCHED]), what
        assert all(files.read(name).equal(tensor) for name, tensor in expected.items()), what


@pytest.mark.parametrize(
    "name", ["../b.safetensors", "/b.safetensors", "more/../../b.safetensors", "..\\b.safetensors"]
)
def test_an_index_does_not_lead_out_of_the_folder(name, tensors, tmp_path):
    folder = base(tmp_path / "base", tensors, single=False, index=True, shard="beside", variant=False, stray=False)
    save(tensors, tmp_path / "b.safetensors", 5)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}))
    with pytest.raises(InputRefused, match="names files that are not there"):
        weight_files(folder)
