"""Seeded damage to what the tool reads: fields of JSON given another type or value, bytes of a safetensors file."""

from __future__ import annotations

import copy
import json
import random
import struct

VALUES = (
    None, True, False, 0, 1, -1, 3, 7, 2**31, 2**63, 10**30, -(2**63), 0.5, 1e308, float("nan"), float("inf"), "", "x", "float32", "../x",
    "(", "*", "\x00", [], [1], [None], ["x"], [[]], [2**63], {}, {"x": 1}, {"": None}, {"0": {}}, {"x": "("},
)  # fmt: skip


def _places(value: object) -> list[tuple[object, object]]:
    """Every (container, key) in a JSON value."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


def damaged_json(fields: dict, rng: random.Random, extra: tuple[str, ...] = ()) -> dict:
    """A copy of `fields` with one or two of them, at any depth, changed, removed, or set although they were not there.

    Args:
        extra: Fields that may be set.
    """
    found = copy.deepcopy(fields)
    for _ in range(rng.choice((1, 1, 2))):
        if extra and rng.random() < 0.25:
            found[rng.choice(extra)] = copy.deepcopy(rng.choice(VALUES))
            continue
        container, key = rng.choice(_places(found))
        if isinstance(container, dict) and rng.random() < 0.1:
            del container[key]
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return found


def damaged_safetensors(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with its length, its header's JSON or its bytes changed, or cut short."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = rng.randrange(5)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        return (
            struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, 2**32, 2**63, rng.randrange(2**64))))
            + content[8:]
        )
    if kind == 2:
        position = rng.randrange(length)
        header = header[:position] + bytes([rng.randrange(256)]) + header[position + 1 :]
        return content[:8] + header + data
    fields = json.loads(header)
    if kind == 3 and len(fields) > 1:  # a tensor under another name, or missing
        name = rng.choice([key for key in fields if key != "__metadata__"])
        entry = fields.pop(name)
        fields[rng.choice((name[:-1], f"{name}.x", "", name.upper(), f"model.{name}"))] = entry
    else:
        fields = damaged_json(fields, rng, ("__metadata__",))
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + data
