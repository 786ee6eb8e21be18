"""Which tokenizer makes tokens of a text: the adapter's own, the export's, or seeded token ids where there is none."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from lora_export.artifact import Manifest
from lora_export.errors import InputRefused
from lora_export.reading import CONFIG, model_settings, tokens_in, vocabulary_size
from lora_export.runtime.positions import n_positions

_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "decoder_start_token_id")
# About as many letters as a token of English text has.
_LETTERS_A_TOKEN = 4
SEEDED = "seeded token ids in place of texts, as neither the export nor an adapter of it has a tokenizer"


@dataclass(frozen=True)
class SeededTokenizer:
    """Token ids that are the same for the same text, where there is no tokenizer: numbers show what words would.

    Attributes:
        vocabulary: The number of tokens of the model.
        specials: Tokens that mean something to the model's code (padding, ends); none of them is inside a text.
        end: The end token, if the model has one: encoders such as CLIP's read a text there.
    """

    vocabulary: int
    model_max_length: int
    pad_token_id: int
    specials: frozenset[int]
    end: int | None

    @classmethod
    def of(cls, folder: Path) -> SeededTokenizer:
        """For the export in `folder`, by its `config.json`."""
        config, where = model_settings(folder), folder / CONFIG
        found = {name: tokens_in(config, name, where) for name in _SPECIAL}
        end, pad = (next(iter(found[name]), None) for name in ("eos_token_id", "pad_token_id"))
        positions = n_positions(folder) or 2**20
        # RoBERTa's kin count positions from beyond the padding token's id.
        longest = max(1, positions - (pad or 0) - 1)
        return cls(vocabulary_size(folder), longest, pad or 0, frozenset(chain.from_iterable(found.values())), end)

    def __call__(
        self,
        texts: Sequence[str],
        others: Sequence[str] | None = None,
        *,
        padding_side: str = "right",
        max_length: int,
        **_: object,
    ) -> dict[str, np.ndarray]:
        """`input_ids`, `attention_mask` and `token_type_ids`, `[rows, longest]`, as a tokenizer gives them.

        Args:
            others: Texts that follow those of the same rows.
        """
        if others is not None:
            texts = [" ".join(pair) for pair in zip(texts, others, strict=True)]
        rows = [self._tokens(text, max_length) for text in texts]
        longest = max(map(len, rows))
        ids = np.full((len(rows), longest), self.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(rows):
            place = slice(longest - len(tokens), None) if padding_side == "left" else slice(len(tokens))
            ids[row, place], mask[row, place] = tokens, 1
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}

    def _tokens(self, text: str, most: int) -> list[int]:
        rng = np.random.default_rng(zlib.crc32(text.encode()))
        length = min(most, max(2, len(text) // _LETTERS_A_TOKEN))
        usual = np.setdiff1d(np.arange(self.vocabulary), sorted(self.specials))
        tokens = rng.choice(usual if len(usual) else np.arange(self.vocabulary), length).tolist()
        return tokens if self.end is None else [*tokens[:-1], self.end]


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds a tokenizer's vocabulary; without one, Transformers makes up one that knows no word."""
    return any((folder / name).is_file() for name in _FILES)


def load_tokenizer(folder: Path):
    """The tokenizer in an exported folder, or in an adapter's folder of one.

    Raises:
        InputRefused: There is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        if not has_tokenizer(folder):
            raise OSError("it holds none of " + ", ".join(_FILES))
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputRefused(
            "The exported folder has no usable tokenizer, so text cannot be turned into inputs",
            where=str(folder),
            found=" ".join(str(error).split())[:300],
            next_step="export from a base folder that holds its tokenizer files, or copy them into this one",
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def tokenizer_of(folder: Path, manifest: Manifest, adapter: str | None = None):
    """What makes tokens of a text for `adapter` of the export in `folder` (None: for all of it).

    1. The tokenizer that the adapter was trained with, if the export holds it beside the adapter.
    2. The export's own.
    3. Where it has none, another adapter's.
    4. Seeded token ids.

    Raises:
        InputRefused: The first that is there cannot be loaded.
    """
    place = next((place for place in _places(folder, manifest, adapter) if has_tokenizer(place)), None)
    return SeededTokenizer.of(folder) if place is None else load_tokenizer(place)


def _places(folder: Path, manifest: Manifest, adapter: str | None) -> Iterator[Path]:
    own = {record.name: folder / record.preprocessing for record in manifest.adapters if record.preprocessing}
    if adapter in own:
        yield own[adapter]
    yield folder
    yield from own.values()
