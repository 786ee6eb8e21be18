"""Seeded damage to an input: values of its JSON exchanged, its bytes changed, its lengths made to lie."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Sequence
from enum import StrEnum

VALUES = (
    None, True, False, 0, 1, -1, 3, 7, 2**31, 2**63, 10**30, -(2**63), 0.5, 1e308, float("nan"), float("inf"), "", "x",
    "float32", "../x", "(", "*", "\x00", "\ud800", "/etc/passwd", "a" * 300, [], [1], [None], ["x"], [[]], [2**63], {},
    {"x": 1}, {"": None}, {"0": {}}, {"x": "("}, [0] * 300,
)  # fmt: skip
# JSON that Python's reader gives up on, or reads as something that is seldom expected.
_HARD = (
    b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"-", b"NaN", b"1e999", b"\xef\xbb\xbf{}", b'"\\ud800"', b"[[]]",
    b"\xff\xfe{\x00}\x00", b"null", b'{"a": 1, "a": 2}',
)  # fmt: skip
_NUMBERS = (0, 1, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_LENGTH_BYTES = 8
_OPTIONS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights", "text.r")


class Form(StrEnum):
    """What an input is made of."""

    BYTES = "bytes"
    JSON = "json"
    LINES = "lines of json"
    SAFETENSORS = "safetensors"
    REQUEST = "request"  # method and path on the first line, then the body
    TEXT = "text"


def mutated(content: bytes, form: Form, words: Sequence[object], rng: random.Random) -> bytes:
    """`content` with one or a few damages of its form.

    Args:
        words: What the format has: names of fields that may be set, or pieces of text.
    """
    if rng.random() < 0.02:
        return rng.choice(_HARD)
    if rng.random() < 0.2:
        return _bytes(content, rng)
    match form:
        case Form.JSON:
            return _json(content, words, rng)
        case Form.LINES:
            lines = content.split(b"\n")
            place = rng.randrange(len(lines))
            lines[place] = _json(lines[place], words, rng)
            return b"\n".join(lines)
        case Form.SAFETENSORS:
            return damaged_safetensors(content, rng)
        case Form.REQUEST:
            first, _, body = content.partition(b"\n")
            if rng.random() < 0.1:
                return _bytes(first, rng) + b"\n" + body
            return first + b"\n" + _json(body, words, rng)
        case Form.TEXT:
            place = rng.randrange(len(content) + 1)
            return content[:place] + str(rng.choice(words)).encode() + content[place + rng.choice((0, 0, 1, 9)) :]
        case Form.BYTES:
            return _bytes(content, rng)


def damaged_json(fields: dict, rng: random.Random, extra: Sequence[object] = ()) -> dict:
    """A copy of `fields` with one or two of them, at any depth, changed, removed, or set although they were not there.

    Args:
        extra: Fields that may be set.
    """
    found = copy.deepcopy(fields)
    for _ in range(rng.choice((1, 1, 2))):
        if extra and isinstance(found, dict) and rng.random() < 0.25:
            found[str(rng.choice(extra))] = copy.deepcopy(rng.choice(VALUES))
            continue
        places = _places(found)
        if not places:
            return copy.deepcopy(rng.choice(VALUES))
        container, key = rng.choice(places)
        if isinstance(container, dict) and rng.random() < 0.1:
            del container[key]
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return found


def damaged_safetensors(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with its length, its header's JSON or its bytes changed, or cut short."""
    if len(content) < _LENGTH_BYTES + 2:
        return _bytes(content, rng)
    (length,) = struct.unpack("<Q", content[:_LENGTH_BYTES])
    start, end = _LENGTH_BYTES, _LENGTH_BYTES + length
    kind = rng.randrange(5)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1 or end > len(content) or not length:
        wrong = rng.choice((0, 1, max(0, length - 1), (length + 1) % 2**64, 2**32, 2**63, rng.randrange(2**64)))
        return struct.pack("<Q", wrong) + content[start:]
    header, data = content[start:end], content[end:]
    if kind == 2:
        place = rng.randrange(length)
        return content[:start] + header[:place] + bytes([rng.randrange(256)]) + header[place + 1 :] + data
    try:
        fields = json.loads(header)
    except (ValueError, RecursionError):
        return _bytes(content, rng)
    names = [key for key in fields if key != "__metadata__"] if isinstance(fields, dict) else []
    if kind == 3 and len(names) > 1:  # a tensor under another name, or missing
        name = rng.choice(names)
        entry = fields.pop(name)
        fields[rng.choice((name[:-1], f"{name}.x", "", name.upper(), f"model.{name}"))] = entry
    elif (held := _held_json(fields)) and rng.random() < 0.5:  # options in the header's free text
        key = rng.choice(held)
        options = damaged_json(json.loads(fields["__metadata__"][key]), rng, _OPTIONS)
        fields["__metadata__"][key] = json.dumps(options)
    else:
        fields = damaged_json(fields, rng, ("__metadata__",))
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + data


def _held_json(fields: object) -> list[str]:
    """The keys of a header's free text that hold a JSON object."""
    metadata = fields.get("__metadata__") if isinstance(fields, dict) else None
    texts = metadata.items() if isinstance(metadata, dict) else ()
    return [key for key, text in texts if isinstance(text, str) and text[:1] == "{"]


def _json(content: bytes, words: Sequence[object], rng: random.Random) -> bytes:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return _bytes(content, rng)
    return json.dumps(damaged_json(fields, rng, words)).encode()


def _places(value: object, depth: int = 0) -> list[tuple[object, object]]:
    """Every (container, key) in a JSON value."""
    if not isinstance(value, dict | list) or depth > 50:
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [place for key in keys for place in ((value, key), *_places(value[key], depth + 1))]


def _bytes(content: bytes, rng: random.Random) -> bytes:
    """One to four changes of bytes anywhere."""
    found = bytearray(content or b"\x00")
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, kind = rng.randrange(len(found) + 1), rng.randrange(6)
        if kind == 0 and place < len(found):
            found[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[place:place] = rng.randbytes(rng.choice((1, 2, 8)))
        elif kind == 2:
            del found[place : place + rng.choice((1, 2, 8, 64))]
        elif kind == 3:
            n_bytes = rng.choice((1, 2, 4, 8))
            number = rng.choice(_NUMBERS) % 256**n_bytes
            found[place : place + n_bytes] = number.to_bytes(n_bytes, rng.choice(("little", "big")))
        elif kind == 4:
            part = found[place : place + rng.choice((4, 32, 256))]
            found[place:place] = part * rng.choice((1, 1, 20))
        else:
            del found[place:]
        found = found or bytearray(b"\x00")
    return bytes(found)
