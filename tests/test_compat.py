"""What is private to other libraries is in one table, is there today, and is missed in the way that the table says."""

from __future__ import annotations

import ast
import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lora_export
from lora_export import compat
from lora_export.compat import BORROWED, Borrowed, Without, borrow, borrow_if_there, untested
from lora_export.errors import EnvironmentUnusable

PACKAGE = Path(lora_export.__file__).parent
SOURCES = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
OURS = "lora_export"


@pytest.mark.parametrize("entry", BORROWED, ids=lambda entry: entry.place)
def test_each_is_there_today(entry):
    borrow(entry.name)
    installed = compat.version_of(entry.distribution)
    assert [int(n) for n in installed.split(".")[:2]] >= [int(n) for n in entry.since.split(".")[:2]]


def test_a_symbol_that_moved_is_found_where_it_is_now(monkeypatch):
    entry = Borrowed(
        "peft.gone:get_pattern_key|peft.utils.other:get_pattern_key", "peft", "0.21", "why", Without.REFUSED
    )
    monkeypatch.setitem(compat._BY_NAME, "get_pattern_key", entry)
    assert entry.name == "get_pattern_key" and borrow("get_pattern_key").__module__ == "peft.utils.other"


def test_what_is_patched_is_put_back():
    original = borrow("decompose_with_registry")
    with pytest.raises(ZeroDivisionError), compat.replaced("decompose_with_registry", None):
        assert borrow("decompose_with_registry") is None
        raise ZeroDivisionError
    assert borrow("decompose_with_registry") is original


def test_what_is_patched_may_have_another_name_in_a_later_release(monkeypatch):
    import peft.utils.other

    entry = Borrowed("peft.utils.other:old_name|peft.utils.other:new_name", "peft", "0.21", "why", Without.REFUSED)
    monkeypatch.setitem(compat._BY_NAME, entry.name, entry)
    monkeypatch.setattr(peft.utils.other, "new_name", 1, raising=False)
    with compat.replaced("old_name", 2):
        assert peft.utils.other.new_name == 2
    assert peft.utils.other.new_name == 1


@pytest.mark.parametrize("entry", BORROWED, ids=lambda entry: entry.place)
def test_each_is_used(entry):
    elsewhere = [text for path, text in SOURCES.items() if path.name != "compat.py"]
    assert any(re.search(rf"\b{entry.name}\b", text) for text in elsewhere)


def test_nothing_private_is_imported_anywhere_else():
    found = []
    for path, text in SOURCES.items():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] in (OURS, "__future__"):
                continue
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            if any(part.startswith("_") for part in parts):
                found.append(f"{path.relative_to(PACKAGE)}: {'.'.join(parts)}")
    assert found == []


def test_what_is_missing_and_needed_is_an_error_that_names_versions(monkeypatch):
    gone = Borrowed("peft.utils.other:no_such_thing", "peft", "0.21", "a reason", Without.REFUSED)
    monkeypatch.setitem(compat._BY_NAME, gone.name, gone)
    with pytest.raises(
        EnvironmentUnusable, match="This release of peft lacks something that lora-export uses"
    ) as found:
        borrow(gone.name)
    assert found.value.where == f"peft {importlib.metadata.version('peft')}"
    assert found.value.expected == "peft.utils.other.no_such_thing, as release 0.21 has it"
    assert borrow_if_there(gone.name) is None


def operators(base: Path) -> list[str]:
    """The operators of a traced and fused encoder."""
    from transformers import AutoConfig

    from lora_export.base.tasks import Task
    from lora_export.base.trace import trace
    from lora_export.base.weightless import build_weightless
    from lora_export.graph.fuse import fuse

    model = build_weightless(Task.FEATURE_EXTRACTION, AutoConfig.from_pretrained(base), "float32")
    return sorted(node.op_type for node in fuse(trace(Task.FEATURE_EXTRACTION, model), "cpu").graph)


def test_without_what_only_saves_time_the_graph_is_the_same(bases, monkeypatch):
    expected = operators(bases["bert"])
    for entry in (entry for entry in BORROWED if entry.without is Without.SLOWER):
        gone = Borrowed("no.such:thing", entry.distribution, "0", "gone", Without.SLOWER)
        monkeypatch.setitem(compat._BY_NAME, entry.name, gone)
    assert borrow_if_there("decompose_with_registry") is None and borrow_if_there("MatchResult") is None
    assert operators(bases["bert"]) == expected


def test_a_release_that_was_not_tested_is_said_in_a_line(monkeypatch):
    asked = map(Requirement, importlib.metadata.requires("lora-export"))
    floors = {of.name: each.version for of in asked for each in of.specifier if each.operator == ">="}
    monkeypatch.setattr(importlib.metadata, "version", floors.__getitem__)  # `ci/newest` has newer ones installed
    assert list(untested()) == []
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0" if name == "transformers" else "0")
    said = [line for line in untested() if "transformers" in line]
    assert len(said) == 1 and re.fullmatch(r"untested: transformers 99\.0; tested with .*<5\.25.*", said[0])
