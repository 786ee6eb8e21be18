"""A JSON file that holds a hash of itself: the sha256 of its bytes, with the hash's own 64 digits as zeros."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

KEY = "manifest_sha256"
_NONE = "0" * 64


def with_own_hash(fields: Mapping[str, object]) -> str:
    """`fields` as JSON, with keys in order."""
    text = json.dumps({**fields, KEY: _NONE}, indent=2, sort_keys=True) + "\n"
    return text.replace(_line(_NONE), _line(hashlib.sha256(text.encode()).hexdigest()), 1)


def own_hash_problem(content: bytes) -> str | None:
    """What is wrong with a file by its hash of itself; None if nothing, or if it holds none."""
    found = _LINE.search(content)
    if found is None:
        return "its hash of itself is damaged" if KEY.encode() in content else None
    expected = found[1].decode()
    actual = hashlib.sha256(content[: found.start(1)] + _NONE.encode() + content[found.end(1) :]).hexdigest()
    return None if actual == expected else f"expected sha256 {expected} of itself, found {actual}"


def _line(digest: str) -> str:
    return f'\n  "{KEY}": "{digest}"'


# A string of JSON holds no line break, so no other place looks like this one.
_LINE = re.compile(_line("([0-9a-f]{64})").encode())
