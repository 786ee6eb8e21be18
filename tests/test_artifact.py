"""The exported folder: its manifest, and how it appears."""

from __future__ import annotations

import copy
import dataclasses
import json
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from lora_export.artifact import SCHEMA_VERSION, read_manifest, write_manifest
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
    assert refused.value.expected == "schema 1"
    assert refused.value.found == f"schema 99, written by lora-export {version('lora-export')}"


@pytest.mark.parametrize("schema", [0, 2, -1, "1", None, [], 1.5])
def test_a_schema_is_refused_by_its_name_before_anything_else_is_read(schema, tmp_path):
    (tmp_path / "lora_export.json").write_text(json.dumps({"schema": schema, "versions": {"lora-export": "9.1"}}))
    with pytest.raises(InputRefused, match="manifest is of another version") as refused:
        read_manifest(tmp_path)
    assert refused.value.found == f"schema {schema!r}, written by lora-export 9.1"
    (tmp_path / "lora_export.json").write_text(json.dumps({"schema": 7}))
    with pytest.raises(InputRefused) as refused:
        read_manifest(tmp_path)
    assert refused.value.found == "schema 7"


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


@pytest.mark.parametrize(
    "name", ["llama-voice", "classifier-merged", "bert-dynamic", "t5-dynamic", "clip-dynamic", "llama-cuda"]
)
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
    written = set(fields["contract"]["adapter_inputs"][0]) | {"parts"}  # of a pair that modules share
    assert set(SCHEMA["$defs"]["adapter_input"]["properties"]) == written
    assert set(SCHEMA["$defs"]["adapter_input"]["properties"]["kind"]["enum"]) == set(AdapterInputKind)


def test_every_schema_has_goldens_and_all_are_read(tmp_path):
    """`-first` is as it was first written, `-latest` as it is now; a field that is added is in `-latest` alone."""
    names = {path.name for path in GOLDENS.glob("manifest-*.json")}
    assert names == {f"manifest-{n + 1}-{when}.json" for n in range(SCHEMA_VERSION) for when in ("first", "latest")}
    for name in names:
        (tmp_path / "lora_export.json").write_bytes((GOLDENS / name).read_bytes())
        fields = json.loads((GOLDENS / name).read_text(encoding="utf-8"))
        Draft202012Validator(SCHEMA).validate(fields)
        manifest = read_manifest(tmp_path)
        assert [record.name for record in manifest.adapters] == [entry["name"] for entry in fields["adapters"]]
        assert manifest.adapter("topic").files and manifest.contract.adapter_inputs


def test_the_latest_golden_has_every_field_of_now(exports, request):
    golden = GOLDENS / f"manifest-{SCHEMA_VERSION}-latest.json"
    fields = json.loads((exports["bert-dynamic"] / "lora_export.json").read_text(encoding="utf-8"))
    for source in (fields["base"], *(entry["source"] for entry in fields["adapters"])):
        source["given"] = f"/models/{Path(source['given']).name}"
    if request.config.getoption("--update-goldens"):
        golden.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    assert _names(json.loads(golden.read_text(encoding="utf-8"))) == _names(fields), "write it anew: --update-goldens"


def _names(value: object, path: str = "") -> set[str]:
    """The fields of a manifest, by path; those of `files`, `versions` and the like are data."""
    if isinstance(value, dict) and not path.endswith(("files", "versions", "labels", "conversion_errors")):
        return {f"{path}.{key}" for key in value}.union(
            *(_names(inner, f"{path}.{key}") for key, inner in value.items())
        )
    return set().union(*(_names(inner, f"{path}[]") for inner in value)) if isinstance(value, list) else set()


def test_a_manifest_of_an_older_version_is_read(tmp_path):
    """As lora-export wrote it before it knew activated LoRA, residual bases and tokenizers of adapters."""
    (tmp_path / "lora_export.json").write_bytes((GOLDENS / "manifest-1-first.json").read_bytes())
    Draft202012Validator(SCHEMA).validate(json.loads((tmp_path / "lora_export.json").read_text(encoding="utf-8")))
    record = read_manifest(tmp_path).adapter("topic")
    assert (record.invocation_tokens, record.residual_base, record.preprocessing) == (None, False, None)
    assert record.files == {"model": "adapters/topic.onnx_adapter"} and record.labels == {0: "a", 1: "b", 2: "c"}


OUTSIDE = ("../outside", "/etc/hostname", "adapters/../../outside", "..", "adapters/..", "a\\..\\b", "")


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("place", ["files", "file", "preprocessing", "source", "name"])
def test_a_manifest_is_no_leave_to_read_elsewhere(place, name, exports, tmp_path):
    fields = json.loads((exports["bert-dynamic"] / "lora_export.json").read_text(encoding="utf-8"))
    adapter = fields["adapters"][0]
    if place == "files":
        fields["files"][name] = "0" * 64
    elif place == "source":
        adapter["source"]["files"][name] = "0" * 64
    else:
        adapter[place] = name
    (tmp_path / "lora_export.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(InputRefused, match="The export's manifest is damaged") as refused:
        read_manifest(tmp_path)
    assert repr(name) in refused.value.found


@pytest.mark.parametrize("name", ["a..b", "adapters/..a", "a/.b", "model.onnx.data", "adapters/x/tokenizer.json", "."])
def test_names_inside_the_folder_are_taken(name, exports, tmp_path):
    fields = json.loads((exports["bert-dynamic"] / "lora_export.json").read_text(encoding="utf-8"))
    fields["files"][name] = "0" * 64
    (tmp_path / "lora_export.json").write_text(json.dumps(fields), encoding="utf-8")
    assert name in read_manifest(tmp_path).files
