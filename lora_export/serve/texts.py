"""Texts to tokens and back with the tokenizer of an export, by the package `tokenizers` alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lora_export.errors import InputRefused

_FILE = "tokenizer.json"
# What configurations write for "no limit".
_NO_LIMIT = 10**9


class Texts:
    """The tokenizer in one folder of an export.

    Attributes:
        folder: Its place.
        longest: The most tokens of a row that it was made for; None where it does not say.

    Raises:
        InputRefused: There is no `tokenizer.json`, or it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.folder = folder
        path = folder / _FILE
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises no class of its own
            raise InputRefused(
                "The exported folder has no tokenizer that the server reads",
                where=str(path),
                expected=f"{_FILE}, as `save_pretrained` of a fast tokenizer writes it",
                found=" ".join(str(error).split())[:200] if path.is_file() else "no such file",
                next_step="AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), then export again",
            ) from error
        # What the last call before the save left behind: it would cut texts in silence.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.config = _json(folder / "tokenizer_config.json")
        longest = self.config.get("model_max_length")
        self.longest = int(longest) if isinstance(longest, int | float) and 0 < longest < _NO_LIMIT else None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a text.

        Args:
            special: With the tokens that the tokenizer puts around a text.
        """
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`, of several texts."""
        return [each.ids for each in self.tokenizer.encode_batch(list(texts))]

    def id_of(self, token: object) -> int | None:
        """The id of a token as a configuration names it: a text, or a dict with its `content`."""
        text = token.get("content") if isinstance(token, dict) else token
        return self.tokenizer.token_to_id(text) if isinstance(text, str) else None


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
