"""An export's tokenizers: an encoder's, by the package `tokenizers` alone; a writing model's, with its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.artifact import Manifest
from lora_export.errors import InputRefused, refused_if_it_fails
from lora_export.reading import read_json_if_there
from lora_export.runtime.end_tokens import end_tokens_in, has_brought_settings
from lora_export.runtime.generation_config import generation_defaults
from lora_export.runtime.sound import LogMel, open_log_mel
from lora_export.runtime.targets import TargetRules
from lora_export.runtime.tokenizer import TextTokenizer, open_tokenizer, special_tokens_in, tokenizer_folders
from lora_export.serve.tasks import SPEECH

if TYPE_CHECKING:
    from tokenizers import Encoding

_FILE = "tokenizer.json"
# What configurations write for "no limit".
_NO_LIMIT = 10**9


class Texts:
    """The tokenizer in one folder of an export, or the export's own where that folder has no vocabulary.

    Attributes:
        folder: Its place.
        longest: The most tokens of a row that it was made for; None where it does not say.
        mask: The token that stands for a gap, and its id; None where there is none.

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

        word = special_tokens_in(place, export).get("mask_token")
        token = None if word is None else self.tokenizer.token_to_id(word)
        self.mask = None if token is None else (word, token)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, with those that the tokenizer puts around it."""
        return [each.ids for each in self.encodings(texts)]

    def encodings(self, texts: Sequence[str | tuple[str, str]]) -> list[Encoding]:
        """The tokens of each text or pair of texts, with the characters that each of them is of."""
        what, where = "The tokenizer makes no tokens of the text", str(self.folder / _FILE)
        with refused_if_it_fails(what, where=where, next_step="fetch the export's tokenizer files again"):
            return self.tokenizer.encode_batch(list(texts))


@dataclass(frozen=True)
class Voice:
    """What a model that writes texts is asked with.

    Attributes:
        defaults: What the configuration says of generating.
        eos_ids: The tokens that end a text.
        rules: What an encoder-decoder's configuration says of its targets.
        ears: What makes a speech model's inputs of sounds; None for others.
    """

    tokenizer: TextTokenizer
    defaults: Mapping[str, object]
    eos_ids: frozenset[int]
    rules: TargetRules
    ears: LogMel | None = None


def open_voice(place: Path, folder: Path, manifest: Manifest, *, task: str) -> Voice:
    """What is in `place`, and what is not there in `folder`: the export that `place` lies in, and `manifest` is of."""
    tokenizer, defaults = open_tokenizer(place, folder), generation_defaults(*dict.fromkeys([place, folder]))
    is_brought = has_brought_settings(place, folder, manifest)
    ends = end_tokens_in(place, folder, is_brought=is_brought, tokenizer=lambda: tokenizer)
    if not ends and tokenizer.eos_id is not None:  # of one without a tokenizer.json
        ends = frozenset({tokenizer.eos_id})
    ears = None
    if task == SPEECH:
        ears, tokenizer = open_log_mel(place, folder), _without_times(tokenizer, defaults)
    return Voice(tokenizer, defaults, ends, replace(TargetRules.of(defaults), eos_ids=ends), ears)


def _without_times(tokenizer: TextTokenizer, defaults: Mapping[str, object]) -> TextTokenizer:
    """`tokenizer`, whose texts leave out Whisper's tokens of times, which follow the one that forbids them."""
    last = defaults.get("no_timestamps_token_id")
    if type(last) is not int:
        return tokenizer
    return replace(tokenizer, _decode=lambda ids: tokenizer.decode(token for token in ids if token <= last))
