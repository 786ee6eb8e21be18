"""`CtcWords`: a text of the tokens of a sound's frames, as Transformers' `Wav2Vec2CTCTokenizer` makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_export.answers import ctc_tokens
from lora_export.errors import InputRefused
from lora_export.reading import read_json, read_json_if_there
from lora_export.runtime.tokenizer import special_tokens_in

_VOCABULARY, _CONFIG = "vocab.json", "tokenizer_config.json"


@dataclass(frozen=True)
class CtcWords:
    """Of one vocabulary.

    Attributes:
        tokens: By id.
        blank: The token of a frame that says nothing.
        delimiter: The token between words, which becomes `space`.
    """

    tokens: Mapping[int, str]
    blank: int
    delimiter: str
    space: str
    is_lower: bool

    @classmethod
    def of(cls, place: Path, export: Path) -> CtcWords:
        """By the files in `place`, a folder of `export`, or else in the export's own.

        Raises:
            InputRefused: There is no vocabulary, it is one of several languages, or it has no padding token.
        """
        folder = place if (place / _VOCABULARY).is_file() else export
        vocabulary, where = read_json(folder / _VOCABULARY), folder / _VOCABULARY
        config = read_json_if_there(folder / _CONFIG)
        special = special_tokens_in(folder, folder)
        delimiter, space = config.get("word_delimiter_token", "|"), config.get("replace_word_delimiter_char", " ")
        blank = vocabulary.get(special.get("pad_token", "<pad>"))
        is_known = all(type(token) is int for token in vocabulary.values())
        if not is_known or blank is None or not isinstance(delimiter, str) or not isinstance(space, str):
            raise InputRefused(
                "The vocabulary of a sound's frames is not one that is known here",
                where=str(where),
                expected="ids by token, the padding token among them, as of Wav2Vec2CTCTokenizer",
                next_step="run it from Python, with Transformers' own tokenizer",
            )
        tokens = {token: word for word, token in vocabulary.items()}
        return cls(tokens, blank, delimiter, space, bool(config.get("do_lower_case")))

    def text(self, scores: np.ndarray) -> str:
        """What `scores` `[frames, vocabulary]` say: the likeliest token of each frame, repeats as one."""
        words = [self.tokens.get(token, "") for token in ctc_tokens(scores, self.blank)]
        text = "".join(self.space if word == self.delimiter else word for word in words).strip()
        return text.lower() if self.is_lower else text
