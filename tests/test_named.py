"""What a user names: a mistyped path is no hub id, and another model of one owner is."""

from __future__ import annotations

import pytest

from lora_export.errors import InputRefused
from lora_export.named import refuse_missing


@pytest.mark.parametrize("given", ["adapters/topcs", "adapters/topisc", "adapters/topics1"])
def test_a_letter_or_two_from_what_is_there_is_mistyped(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters/topics").mkdir(parents=True)
    if given[-1].isdigit():
        refuse_missing(given, kind="adapter")  # another number is another adapter
        return
    with pytest.raises(InputRefused, match="The adapter is not a folder") as refused:
        refuse_missing(given, kind="adapter")
    assert "topics" in refused.value.next_step


@pytest.mark.parametrize(
    "given", ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen3-8B", "Qwen/Qwen2.5-1.5B@main"]
)
def test_a_hub_id_of_an_owner_whose_other_model_is_here_is_one(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen/Qwen2.5-1.5B").mkdir(parents=True)
    refuse_missing(given, kind="base")
