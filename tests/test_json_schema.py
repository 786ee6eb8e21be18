"""The reader of our schemas agrees with a full implementation."""

from __future__ import annotations

import json
import random
from pathlib import Path

from fuzzing.mutations import damaged_json
from jsonschema import Draft202012Validator

from lora_export.json_schema import violations

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / "tests/goldens/manifest-1-first.json").read_text(encoding="utf-8"))
SCHEMA = json.loads((ROOT / "lora_export/schema/manifest-1.schema.json").read_text(encoding="utf-8"))


def test_it_agrees_with_a_full_implementation():
    assert not list(violations(GOLDEN, SCHEMA, SCHEMA))
    validator = Draft202012Validator(SCHEMA)
    for attempt in range(150):
        wrong = damaged_json(GOLDEN, random.Random(attempt))
        assert bool(list(violations(wrong, SCHEMA, SCHEMA))) != validator.is_valid(wrong), wrong


def test_a_violation_says_where_and_what():
    wrong = GOLDEN | {"dtype": "int8"}
    assert list(violations(wrong, SCHEMA, SCHEMA)) == ["dtype is 'int8', not one of 'float32', 'float16', 'bfloat16'"]
    wrong = GOLDEN | {"adapters": [3]}
    assert next(violations(wrong, SCHEMA, SCHEMA)) == "adapters[0] is 3, not of type object"
    assert next(violations({}, SCHEMA, SCHEMA)) == "the whole has no 'adapters'"


def test_a_list_of_too_few_items_is_one():
    schema = {"type": "array", "minItems": 2, "items": {"type": "integer"}}
    assert list(violations([1], schema, schema)) == ["the whole is [1], of fewer than 2 items"]
    assert not list(violations([1, 2], schema, schema))


def test_it_knows_every_word_of_the_schema():
    """A word that it does not know would let through what the published schema refuses."""
    text = (ROOT / "lora_export/json_schema.py").read_text(encoding="utf-8")
    words = {name for name in _words(SCHEMA) if not name.startswith("$") and name not in ("title", "description")}
    assert words <= {name for name in words if f"`{name}`" in text}


def _words(schema: object) -> set[str]:
    """The keywords of a schema; what `properties` and `$defs` hold are names."""
    if isinstance(schema, list):
        return set().union(*map(_words, schema))
    if not isinstance(schema, dict):
        return set()
    found = set(schema)
    for name, inner in schema.items():
        if name in ("enum", "const", "required"):
            continue
        found |= set().union(*map(_words, inner.values())) if name in ("properties", "$defs") else _words(inner)
    return found
