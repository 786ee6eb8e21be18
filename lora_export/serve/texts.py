"""The tokenizers of an export: an encoder's, by the package `tokenizers` alone, and a decoder's with its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_export.errors import InputRefused, refused_if_it_fails
from lora_export.reading import read_json_if_there
from lora_export.runtime.generation_config import eos_ids_of, generation_defaults
from lora_export.runtime.tokenizer import TextTokenizer, open_tokenizer, tokenizer_folders

_FILE = "tokenizer.json"
# What configurations write for "no limit".
_NO_LIMIT = 10**9


class Texts:
    """The tokenizer in one folder of an export, or the export's own where that folder has no vocabulary.

    Attributes:
        folder: Its place.
        longest: The most tokens of a row that it was made for; None where it does not say.

    Raises:
        InputRefused: There is no `tokenizer.json`, or it cannot be read.
    """

    def __init__(self, place: Path, export: Path) -> None:
        from tokenizers import Tokenizer

        self.folder = folder = tokenizer_folders(place, export)[-1]
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
        configs = [read_json_if_there(each / "tokenizer_config.json") for each in tokenizer_folders(place, export)]
        longest = next((config for config in configs if config), {}).get("model_max_length")
        self.longest = int(longest) if isinstance(longest, int | float) and 0 < longest < _NO_LIMIT else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, with those that the tokenizer puts around it."""
        what, where = "The tokenizer makes no tokens of the text", str(self.folder / _FILE)
        with refused_if_it_fails(what, where=where, next_step="fetch the export's tokenizer files again"):
            return [each.ids for each in self.tokenizer.encode_batch(list(texts))]

    def encode_pairs(self, text: str, others: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """The tokens of `text` with each of `others` behind it, and which of the two each token is of."""
        return [(each.ids, each.type_ids) for each in self.tokenizer.encode_batch([(text, other) for other in others])]


@dataclass(frozen=True)
class Voice:
    """What a decoder's texts are made with.

    Attributes:
        defaults: What the configuration says of generating.
        eos_ids: The tokens that end a text.
    """

    tokenizer: TextTokenizer
    defaults: Mapping[str, object]
    eos_ids: frozenset[int]


def open_voice(place: Path, folder: Path) -> Voice:
    """What is in `place`, and what is not there in the export's `folder`."""
    tokenizer, defaults = open_tokenizer(place, folder), generation_defaults(*dict.fromkeys([place, folder]))
    of_tokenizer = frozenset() if tokenizer.eos_id is None else frozenset({tokenizer.eos_id})
    return Voice(tokenizer, defaults, eos_ids_of(defaults) or of_tokenizer)
