"""Which of a source's recorded files are its Transformer's, and which say how its folder embeds."""

from __future__ import annotations

import pytest

from lora_export.artifact import SourceRecord, sha256_of
from lora_export.base.sentence_folder import says_embedding
from lora_export.errors import InputRefused
from lora_export.integrity.sources import locate_source
from lora_export.sentence import transformer_files

PLAIN = {"config.json": "c", "model.safetensors": "w"}
SETTINGS = {"modules.json": "m", "sentence_bert_config.json": "s", "config_sentence_transformers.json": "p"}
HEAD = {"1_Pooling/config.json": "1", "2_Dense/config.json": "2", "2_Dense/model.safetensors": "3"}


@pytest.mark.parametrize(
    "files",
    [
        PLAIN,
        PLAIN | SETTINGS | HEAD,
        {f"0_Transformer/{name}": found for name, found in PLAIN.items()} | SETTINGS | HEAD,
        {"0_Transformer/config.json": "c", "0_Transformer/model.safetensors": "w", "modules.json": "m"},
        {f"0_Transformer/{name}": found for name, found in PLAIN.items()}
        | {"0_Transformer/sentence_bert_config.json": "s", "modules.json": "m"},
    ],
)
def test_the_transformers_own_files_are_the_same_whatever_else_was_read(files):
    assert transformer_files(files) == PLAIN


def test_the_config_beside_an_adapter_says_no_embedding():
    adapter = {"adapter_config.json": "a", "adapter_model.safetensors": "w", "config.json": "c"}
    below = {f"0_Transformer/{name}": found for name, found in adapter.items()}
    assert not says_embedding(adapter) and not says_embedding(below | {"modules.json": "m"})
    assert says_embedding(below | SETTINGS | HEAD) and says_embedding(adapter | SETTINGS | HEAD)


@pytest.mark.parametrize("copy", ["moved", "0_Transformer"])
def test_the_transformers_folder_alone_is_the_source_where_nothing_else_was_read(copy, tmp_path):
    folder = tmp_path / "elsewhere" / copy
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text(name)
    hashes = {name: sha256_of(folder / name) for name in ("adapter_config.json", "adapter_model.safetensors")}
    files = {f"0_Transformer/{name}": found for name, found in hashes.items()} | {"modules.json": "m"}
    record = SourceRecord(str(tmp_path / "gone"), None, files)
    assert locate_source(record, str(folder), "adapter", hint="--adapter") == folder
    (folder / "adapter_config.json").write_text("other")
    with pytest.raises(InputRefused, match="not the one that was exported"):
        locate_source(record, str(folder), "adapter", hint="--adapter")
