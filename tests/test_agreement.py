"""A manifest that does not describe its graph is refused by the field, whatever reads it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import fails

from lora_export.artifact import MANIFEST
from lora_export.errors import InputRefused
from lora_export.runtime.seq2seq_session import open_export

EXPORTS = ("llama-voice", "bert-dynamic", "t5-dynamic")


def linked(export: Path, folder: Path) -> Path:
    """The export's files in `folder`, its manifest a file of its own; that one's path."""
    folder.mkdir()
    for path in export.iterdir():
        if path.name != MANIFEST:
            (folder / path.name).symlink_to(path)
    (folder / MANIFEST).write_text((export / MANIFEST).read_text())
    return folder / MANIFEST


def places(value: object, path: str = "") -> Iterator[tuple[str, list, int]]:
    """Every size in a contract: its path in the manifest, and where it stands."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("dims", "shape"):
                yield from ((f"{path}.{key}", inner, index) for index in range(len(inner)))
            else:
                yield from places(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, f"{path}[{index}]")


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize("change", [lambda dim: 7, lambda dim: "x", None], ids=["number", "name", "missing"])
def test_a_well_typed_size_that_is_not_the_graphs_is_named(name, change, exports, tmp_path):
    file = linked(exports[name], tmp_path / "out")
    fields = json.loads(file.read_text())
    found = {path: (dims, index) for path, dims, index in places(fields)}
    for path in sorted(found)[:: max(1, len(found) // 12)]:
        dims, index = found[path]
        before = copy.copy(dims)
        if change is None:
            del dims[index]
        elif path.endswith("shape") and change(0) == "x":
            continue  # of another type, which the schema names
        else:
            dims[index] = change(dims[index])
        file.write_text(json.dumps(fields))
        with pytest.raises(InputRefused, match="manifest does not describe its graph") as refused:
            open_export(file.parent, "cpu")
        # A head's own size is a name, so that of its default is held against its bytes.
        assert refused.value.where in (f"{file}: {path}", f"{file}: {path.removesuffix('shape')}length"), path
        dims[:] = before


def damage(fields: dict, change: Callable[[dict], object]) -> dict:
    change(fields["contract"])
    return fields


@pytest.mark.parametrize(
    ("change", "where", "expected"),
    [
        (lambda c: c["inputs"][0].update(name="ids"), "inputs[0].name", "one of the graph's"),
        (lambda c: c["inputs"][1].update(dtype="float32"), "inputs[1].dtype", "int64"),
        (lambda c: c["inputs"].pop(0), "inputs", "input_ids"),
        (lambda c: c["outputs"][0].update(dtype="float16"), "outputs[0].dtype", "float32"),
        (lambda c: c["adapter_inputs"][0].update(dtype="int64"), "adapter_inputs[0].dtype", "float32"),
        (lambda c: c["adapter_inputs"][0].update(kind="lora_B"), "adapter_inputs[0].kind", "a kind that is called"),
        (lambda c: c["adapter_inputs"][0].update(module="x"), "adapter_inputs[0].kind", "a kind that is called"),
        (lambda c: stored(c)["default"].update(length=8), "default.length", "66560"),
        (lambda c: stored(c)["default"].update(offset=10**9), "default.offset", "at most"),
    ],
)  # fmt: skip
def test_other_fields_are_named_by_what_opens_and_by_what_packs(change, where, expected, exports, adapters, tmp_path):
    file = linked(exports["llama-voice"], tmp_path / "out")
    file.write_text(json.dumps(damage(json.loads(file.read_text()), change)))
    for text in (
        fails(3, "run", file.parent, "hello", "--provider", "cpu"),
        fails(3, "add", file.parent, adapters["chat"]),
    ):
        said = " ".join(text.split())
        assert "manifest does not describe its graph" in said and f"{file}: contract." in said
        assert where in said and f"expected: {expected}" in said, said


def stored(contract: dict) -> dict:
    return next(entry for entry in contract["adapter_inputs"] if entry["default"] is not None)


@pytest.mark.parametrize(
    ("name", "said", "found"),
    [("llama-dynamic", "columns", "tokens"), ("llama-dynamic", None, "tokens"), ("bert-dynamic", "tokens", "null")],
)
def test_a_cache_that_is_laid_out_otherwise_than_the_graphs_is_refused(name, said, found, exports, tmp_path):
    file = linked(exports[name], tmp_path / "out")
    fields = json.loads(file.read_text())
    assert fields["contract"]["cache_layout"] == (None if found == "null" else found)
    open_export(file.parent, "cpu")
    fields["contract"]["cache_layout"] = said
    file.write_text(json.dumps(fields))
    with pytest.raises(InputRefused, match="manifest does not describe its graph") as refused:
        open_export(file.parent, "cpu")
    assert refused.value.where.endswith("contract.cache_layout") and refused.value.expected.startswith(found)
