"""The exported folder: its manifest, and how it appears."""

from __future__ import annotations

import copy
import dataclasses
import json
from importlib import resources
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from lora_export.artifact import read_manifest, write_manifest
from lora_export.contract import AdapterInputKind, GraphContract
from lora_export.errors import InputRefused, UsageProblem


@pytest.mark.parametrize("name", ["bert-dynamic", "llama-merged", "llama-voice", "t5-dynamic", "t5-merged"])
def test_a_manifest_survives_its_file(name, exports, tmp_path):
    manifest = read_manifest(exports[name])
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["lora_export.json"]
    assert (tmp_path / "lora_export.json").read_bytes() == (exports[name] / "lora_export.json").read_bytes()
    for contract in manifest.graphs.values():
        assert GraphContract.from_dict(json.loads(json.dumps(contract.to_dict()))) == contract


def test_another_schema_is_refused(exports, tmp_path):
    write_manifest(tmp_path, dataclasses.replace(read_manifest(exports["bert-merged"]), schema=99))
    with pytest.raises(InputRefused, match="manifest is of another version") as refused:
        read_manifest(tmp_path)
    assert (refused.value.expected, refused.value.found) == ("schema 1", "schema 99")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", "{}", '{"schema": 1}', '{"schema": 1, "kind": "x"}', "\xff"],
    ids=["empty", "cut", "list", "null", "number", "no schema", "no fields", "wrong kind", "no text"],
)
def test_a_damaged_manifest_is_refused(text, tmp_path):
    (tmp_path / "lora_export.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputRefused, match="The export's manifest is damaged"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("field", ["contract", "adapters", "base", "files", "kind"])
@pytest.mark.parametrize("value", [None, 3, [3], [[]], "text"], ids=str)
def test_fields_of_another_type_are_refused(field, value, exports, tmp_path):
    fields = json.loads((exports["bert-merged"] / "lora_export.json").read_text())
    (tmp_path / "lora_export.json").write_text(json.dumps(fields | {field: value}))
    with pytest.raises(InputRefused, match="The export's manifest is damaged"):
        read_manifest(tmp_path)


def test_an_adapter_is_found_by_name(exports):
    manifest = read_manifest(exports["bert-dynamic"])
    assert manifest.adapter("kind").name == "kind"
    with pytest.raises(UsageProblem, match="The export has no adapter 'nobody'") as refused:
        manifest.adapter("nobody")
    assert refused.value.found == "topic, kind"


SCHEMA = json.loads(
    resources.files("lora_export").joinpath("schema/manifest-1.schema.json").read_text(encoding="utf-8")
)
GOLDENS = Path(__file__).parent / "goldens"


@pytest.mark.parametrize("name", ["llama-voice", "classifier-merged", "bert-dynamic", "t5-dynamic", "clip-dynamic"])
def test_a_manifest_follows_its_published_schema(name, exports):
    fields = json.loads((exports[name] / "lora_export.json").read_text(encoding="utf-8"))
    Draft202012Validator(SCHEMA).validate(fields)
    for damage in (lambda f: f.pop("kind"), lambda f: f.update(extra=1), lambda f: f["files"].update(x="no hash")):
        wrong = copy.deepcopy(fields)
        damage(wrong)
        assert not Draft202012Validator(SCHEMA).is_valid(wrong)


def test_the_schema_names_every_field_that_is_written(exports):
    fields = json.loads((exports["bert-dynamic"] / "lora_export.json").read_text(encoding="utf-8"))
    assert set(SCHEMA["properties"]) == set(fields) | {"graphs"}
    assert set(SCHEMA["$defs"]["adapter"]["properties"]) == set(fields["adapters"][0]) | {"files"}
    assert set(SCHEMA["$defs"]["adapter_input"]["properties"]) == set(fields["contract"]["adapter_inputs"][0])
    assert set(SCHEMA["$defs"]["adapter_input"]["properties"]["kind"]["enum"]) == set(AdapterInputKind)


def test_a_manifest_of_an_older_version_is_read(tmp_path):
    """As lora-export wrote it before it knew activated LoRA, residual bases and tokenizers of adapters."""
    (tmp_path / "lora_export.json").write_bytes((GOLDENS / "manifest-1-first.json").read_bytes())
    Draft202012Validator(SCHEMA).validate(json.loads((tmp_path / "lora_export.json").read_text(encoding="utf-8")))
    record = read_manifest(tmp_path).adapter("topic")
    assert (record.invocation_tokens, record.residual_base, record.preprocessing) == (None, False, None)
    assert record.files == {"model": "adapters/topic.onnx_adapter"} and record.labels == {0: "a", 1: "b", 2: "c"}
