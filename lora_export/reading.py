"""Files that others made, as far as Python's own library reads them: JSON objects, and the numbers that settings hold.

Whatever is wrong with one is a refusal that names the file: bytes that are no UTF-8, nesting or numbers without end, a
value of another type than its field has.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from lora_export.errors import InputRefused

CONFIG = "config.json"
# What a name that somebody else made up may end in: nothing there, longer than a name can be, a link to itself.
_NO_FILE = (errno.ENOENT, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)


def json_of(text: str | bytes) -> object:
    """The value of a JSON text.

    Raises:
        ValueError: It is none, or one that Python does not read: numbers of thousands of digits, endless nesting,
            half of a surrogate pair.
    """
    try:
        value = json.loads(text)
        if (b"\\u" if isinstance(text, bytes) else "\\u") in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:  # no name of a file, and nothing that a tokenizer takes
        raise ValueError("it has half of a surrogate pair, which is no text") from None
    return value


def read_json(path: Path) -> dict:
    """The JSON object in `path`.

    Raises:
        InputRefused: The file is missing, is not JSON, or holds no object.
    """
    try:
        value = json_of(path.read_text(encoding="utf-8"))
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise InputRefused(f"{path.name} is missing", where=str(path.parent)) from error
    except ValueError as error:
        raise InputRefused(
            f"{path.name} is not valid JSON",
            where=str(path),
            found=str(error),
            next_step="fetch or save the file again",
        ) from error
    if not isinstance(value, dict):
        raise InputRefused(f"{path.name} holds no JSON object", where=str(path), found=type(value).__name__)
    return value


def read_json_if_there(path: Path) -> dict:
    """The same, and an empty object where there is no such file."""
    return read_json(path) if path.is_file() else {}


def first_settings(name: str, *places: Path) -> tuple[dict, Path]:
    """What the file `name` says in the first of `places` that has it, and where; an empty object if none has."""
    where = next((place / name for place in places if (place / name).is_file()), places[-1] / name)
    return read_json_if_there(where), where


def model_settings(folder: Path) -> dict:
    """The fields of a model's `config.json`, those of its text's part over the others; none where there is no file."""
    whole = read_json_if_there(folder / CONFIG)
    return whole | (whole["text_config"] if isinstance(whole.get("text_config"), dict) else {})


def vocabulary_size(folder: Path) -> int:
    """How many tokens the model of `folder` knows.

    Raises:
        InputRefused: Its configuration does not say.
    """
    settings, where = model_settings(folder), folder / CONFIG
    found = size_in(settings, "vocab_size", where=where)
    if found is None:
        raise _wrong("vocab_size", settings.get("vocab_size"), expected="the number of tokens", where=where)
    return found


def size_in(settings: Mapping, *names: str, where: object) -> int | None:
    """The first of the fields `names` that is set; None where none is.

    Args:
        where: The file or folder of `settings`, for a message.

    Raises:
        InputRefused: It is no whole number above zero.
    """
    name = next((name for name in names if settings.get(name)), None)
    if name is None:
        return None
    if type(settings[name]) is not int or settings[name] < 0:
        raise _wrong(name, settings[name], expected="a whole number above zero", where=where)
    return settings[name]


def tokens_in(settings: Mapping, name: str, where: object) -> tuple[int, ...]:
    """The tokens of a field that holds one, a list of them, or null.

    Raises:
        InputRefused: It holds something else.
    """
    value = settings.get(name)
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in found):
        raise _wrong(name, value, expected="a token id, a list of them, or null", where=where)
    return tuple(found)


def is_file(path: Path) -> bool:
    """Whether `path`, a part of which somebody else made up, is a file; what is too long for a name is none."""
    return _asked(path.is_file)


def is_folder(path: Path) -> bool:
    """Likewise, whether it is a folder."""
    return _asked(path.is_dir)


def is_there(path: Path) -> bool:
    """Likewise, whether there is anything at `path`."""
    return _asked(path.exists)


def _asked(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        return False


def _wrong(name: str, value: object, *, expected: str, where: object) -> InputRefused:
    return InputRefused(
        "A setting of the model is not what it should be",
        where=f"{where}: {name}",
        expected=expected,
        found=repr(value)[:80],
        next_step="fetch or save the file again",
    )
