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
