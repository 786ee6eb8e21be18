"""What an export's configuration says of generating. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def generation_defaults(*folders: Path) -> dict:
    """The fields of `generation_config.json`, and of `config.json` where it has none; an earlier folder goes first."""
    found: dict = {}
    for name in ("config.json", "generation_config.json"):
        for folder in reversed(folders):
            path = folder / name
            if path.is_file():
                fields = json.loads(path.read_text(encoding="utf-8"))
                found |= {key: value for key, value in fields.items() if value is not None}
    return found


def eos_ids_of(defaults: Mapping) -> frozenset[int]:
    """The tokens that end a text."""
    found = defaults.get("eos_token_id")
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])
