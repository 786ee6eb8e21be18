"""What an export's configuration says of generating. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_export.reading import read_json_if_there, tokens_in


def generation_defaults(*folders: Path) -> dict:
    """The fields of `generation_config.json`, and of `config.json` where it has none; an earlier folder goes first."""
    found: dict = {}
    for name in ("config.json", "generation_config.json"):
        for folder in reversed(folders):
            fields = read_json_if_there(folder / name)
            found |= {key: value for key, value in fields.items() if value is not None}
    return found


def eos_ids_of(defaults: Mapping) -> frozenset[int]:
    """The tokens that end a text."""
    return frozenset(tokens_in(defaults, "eos_token_id", "generation_config.json or config.json"))
