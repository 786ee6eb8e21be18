"""`TextTokenizer`: a decoder's texts to token ids and back, as Transformers' fast tokenizers do it.

Needs `tokenizers`, a package of its own, for an export with a `tokenizer.json`; Transformers for one without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_export.artifact import Manifest
from lora_export.errors import EnvironmentUnusable, InputRefused, UsageProblem, refused_if_it_fails
from lora_export.reading import read_json_if_there
from lora_export.runtime.chat_template import Messages, read_template, render

_TOKENIZER, _CONFIG, _SPECIALS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
_VOCABULARIES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
TOKENIZER_FILES = (
    _TOKENIZER, *_VOCABULARIES, _CONFIG, _SPECIALS, "added_tokens.json", "merges.txt", "source.spm", "target.spm",
    "chat_template.jinja",
)  # fmt: skip
_NEXT = "fetch the folder's tokenizer files again"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TextTokenizer:
    """The tokenizer in a folder of an export.

    Attributes:
        folder: Where it lies.
        special_tokens: By name, such as `eos_token`.
        eos_id: The id of `eos_token`; None without one.
        chat_template: Jinja; None where the export has none.
    """

    folder: Path
    special_tokens: Mapping[str, str]
    eos_id: int | None
    chat_template: str | None
    _encode: Callable[[str, bool], list[int]]
    _encode_pair: Callable[[str, str], tuple[list[int], list[int]]]
    _decode: Callable[[Sequence[int]], str]

    def encode(self, text: str) -> list[int]:
        """The prompt `text`, with the special tokens that begin every text, and without an end token."""
        ids = self._encode(text, True)
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.eos_id else ids

    def encode_source(self, text: str) -> list[int]:
        """`text` as an encoder takes it, with all special tokens that the tokenizer puts around it."""
        return self._encode(text, True)

    def encode_pair(self, text: str, other: str) -> tuple[list[int], list[int]]:
        """Two texts as an encoder takes them, and which of the two each token is of."""
        return self._encode_pair(text, other)

    def encode_chat(self, messages: Messages, options: Mapping[str, object] | None = None) -> list[int]:
        """`messages` as the prompt of the assistant's answer.

        Args:
            options: Further variables of the template, such as `tools`.

        Raises:
            UsageProblem: There is no chat template, or it refuses these messages.
            EnvironmentUnusable: jinja2 is not installed.
        """
        # The template has the special tokens.
        return self._encode(self.chat_text(messages, options), False)

    def chat_text(self, messages: Messages, options: Mapping[str, object] | None = None) -> str:
        """As `encode_chat`, the text of the prompt."""
        if self.chat_template is None:
            raise UsageProblem(
                "The export has no chat template",
                where=str(self.folder),
                expected="chat_template.jinja, or chat_template in tokenizer_config.json",
                next_step="give the prompt's text",
            )
        return render(self.chat_template, messages, self.special_tokens, where=str(self.folder), options=options or {})

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special tokens."""
        return self._decode(list(ids))


def preprocessing_of(manifest: Manifest, adapter: str | Mapping[str, float] | None) -> str:
    """Where the tokenizer or processor of an adapter lies in its export; of the base and of a blend, the export's."""
    names = [adapter] if isinstance(adapter, str) else list(adapter or ())
    found = [record.preprocessing for record in manifest.adapters if [record.name] == names]
    return next(filter(None, found), ".")


def tokenizer_folders(place: Path, export: Path) -> tuple[Path, ...]:
    """Where the files of the tokenizer in `place` lie, the first that has a file first; the last has the vocabulary.

    A place with a vocabulary stands alone, as parts of two tokenizers make none. A place without a vocabulary goes with
    the tokenizer of its export: an adapter may bring a chat template or generation settings only.
    """
    is_whole = any((place / name).is_file() for name in (_TOKENIZER, *_VOCABULARIES))
    return (place,) if is_whole or place == export else (place, export)


def has_fast_tokenizer(place: Path, export: Path) -> bool:
    """Whether the tokenizer in `place` has a `tokenizer.json`, which needs no Transformers."""
    return (tokenizer_folders(place, export)[-1] / _TOKENIZER).is_file()


def open_tokenizer(place: Path, export: Path | None = None) -> TextTokenizer:
    """The tokenizer in `place`, a folder of `export`; see `tokenizer_folders` for what is not there.

    Raises:
        InputRefused: There is none, or it cannot be read.
        EnvironmentUnusable: The package that reads it is not installed.
    """
    folders = tokenizer_folders(place, export or place)
    folder, configs = folders[-1], [read_json_if_there(each / _CONFIG) for each in folders]
    specials = special_tokens_in(place, export or place)
    opened = _fast if (folder / _TOKENIZER).is_file() else _of_transformers
    encode, encode_pair, decode, id_of = opened(folder)
    eos = specials.get("eos_token")
    templates = map(read_template, folders, configs)
    template = next((each for each in templates if each is not None), None)
    return TextTokenizer(place, specials, None if eos is None else id_of(eos), template, encode, encode_pair, decode)


def special_tokens_in(place: Path, export: Path) -> dict[str, str]:
    """The special tokens of the tokenizer in `place`, a folder of `export`, by name, such as `mask_token`.

    Raises:
        InputRefused: One of them is no text.
    """
    folders = tokenizer_folders(place, export)
    config, special_map = (
        next((found for each in folders if (found := read_json_if_there(each / name))), {})
        for name in (_CONFIG, _SPECIALS)
    )
    return _special_tokens(special_map | config, place)


def _fast(folder: Path) -> tuple[Callable, Callable, Callable, Callable]:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise EnvironmentUnusable(
            "Texts need the package `tokenizers`",
            next_step="pip install tokenizers, or give token ids",
        ) from error
    where = str(folder / _TOKENIZER)
    try:
        tokenizer = Tokenizer.from_file(where)
    except Exception as error:  # the package raises no other
        raise InputRefused("The tokenizer cannot be read", where=where, found=str(error)) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def encode(text: str, is_whole: bool) -> list[int]:
        # tokenizer.json has what begins and ends a text; `add_bos_token` beside it does nothing, as in Transformers 5.
        with refused_if_it_fails("The tokenizer makes no tokens of the text", where=where, next_step=_NEXT):
            return tokenizer.encode(text, add_special_tokens=is_whole).ids

    def encode_pair(text: str, other: str) -> tuple[list[int], list[int]]:
        with refused_if_it_fails("The tokenizer makes no tokens of the texts", where=where, next_step=_NEXT):
            found = tokenizer.encode(text, other)
        return found.ids, found.type_ids

    def decode(ids: Sequence[int]) -> str:
        with refused_if_it_fails("The tokenizer makes no text of the tokens", where=where, next_step=_NEXT):
            return tokenizer.decode(ids)

    return encode, encode_pair, decode, tokenizer.token_to_id


def _of_transformers(folder: Path) -> tuple[Callable, Callable, Callable, Callable]:
    """Vocabularies that Transformers makes a tokenizer of."""
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise InputRefused(
            "The export has no tokenizer, so texts cannot be turned into tokens",
            where=str(folder),
            expected=_TOKENIZER,
            next_step="give token ids, or export from a base folder that holds its tokenizer files",
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise EnvironmentUnusable(
            "This tokenizer has no tokenizer.json, so it needs Transformers",
            where=str(folder),
            next_step="pip install transformers, or save it with a fast tokenizer's save_pretrained",
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        found = " ".join(str(error).split())[:300]
        raise InputRefused("The tokenizer cannot be read", where=str(folder), found=found) from error

    def encode(text: str, is_whole: bool) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=is_whole)

    def encode_pair(text: str, other: str) -> tuple[list[int], list[int]]:
        found = tokenizer(text, other, return_token_type_ids=True)
        return found["input_ids"], found["token_type_ids"]

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    return encode, encode_pair, decode, tokenizer.convert_tokens_to_ids


def _special_tokens(fields: Mapping[str, object], where: Path) -> dict[str, str]:
    found = {name: fields[name] for name in _NAMES if fields.get(name) is not None}
    found = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    if (wrong := next((name for name, token in found.items() if not isinstance(token, str)), None)) is not None:
        raise _no_token(where, wrong, fields[wrong])
    return found


def _no_token(where: Path, name: str, found: object) -> InputRefused:
    return InputRefused(
        "The tokenizer cannot be read",
        where=f"{where}: {name}",
        expected="a text, or an object with its content",
        found=repr(found)[:80],
    )
