"""`verify`: every changed, missing and extra file is named; nothing else is."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from command_line import call, fails

from lora_export.artifact import read_manifest
from lora_export.errors import InputRefused, UsageProblem
from lora_export.integrity.sources import SourceOverrides
from lora_export.integrity.verify import Problem, ProblemKind, SignatureState, verify


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["bert-dynamic", "llama-merged", "llama-voice", "vit-dynamic"])
def test_an_export_is_intact(name, exports):
    found = verify(exports[name])
    files = [path for path in exports[name].rglob("*") if path.is_file() and path.name != "lora_export.json"]
    assert found.passed and found.problems == () and found.signature is SignatureState.NONE
    assert (found.n_files, found.n_bytes) == (len(files), sum(path.stat().st_size for path in files))


def test_every_file_is_looked_at(exports, own):
    folder = own(exports["bert-dynamic"])
    for name in read_manifest(folder).files:
        before = (folder / name).read_bytes()
        expected = digest(folder / name)
        flip(folder / name)
        detail = f"expected sha256 {expected}, found sha256 {digest(folder / name)}"
        assert verify(folder).problems == (Problem(ProblemKind.CHANGED, name, detail),)
        (folder / name).unlink()
        assert verify(folder).problems == (Problem(ProblemKind.MISSING, name),)
        (folder / name).write_bytes(before)
    assert verify(folder).passed


def test_what_the_manifest_does_not_know_is_named(exports, own):
    folder = own(exports["bert-dynamic"])
    (folder / "reports").mkdir()
    (folder / "reports" / "check.html").write_text("written later")
    assert verify(folder).passed
    (folder / "adapters" / "other.onnx_adapter").write_bytes(b"x")
    (folder / "sub").mkdir()
    (folder / "sub" / ".hidden").write_bytes(b"x")
    (folder / "link").symlink_to(folder / "sub")
    assert [(problem.kind, problem.name) for problem in verify(folder).problems] == [
        ("extra", "adapters/other.onnx_adapter"), ("extra", "link"), ("extra", "sub/.hidden"),
    ]  # fmt: skip


def test_a_manifest_whose_meaning_changed_is_noticed_by_its_hash_of_itself(exports, own):
    """Each of these is JSON that the schema allows."""
    folder = own(exports["bert-dynamic"])
    path = folder / "lora_export.json"
    content = path.read_bytes()
    scale, given = re.search(rb'"scales": \[\s+\d', content).end() - 1, content.index(b'"given": "') + 12
    digits = content.index(b'"manifest_sha256": "') + 25
    for position in (scale, given, digits, len(content) - 2):
        wrong = bytearray(content)
        wrong[position] ^= 1
        if position == digits:  # a bit of a letter may make it none of a hash
            wrong[position] = ord("1") if content[position] == ord("0") else ord("0")
        path.write_bytes(wrong)
        if position < len(content) - 2:
            (problem,) = verify(folder).problems
            assert (problem.kind, problem.name) == ("changed", "lora_export.json") and "of itself" in problem.detail
        else:
            with pytest.raises(InputRefused, match="manifest is damaged"):
                verify(folder)
    path.write_bytes(re.sub(rb'  "manifest_sha256".*\n', b"", content))
    assert verify(folder).passed, "a manifest of an earlier release has no such hash"


def test_sources_are_compared_each_by_name(exports, bases, adapters, own, tmp_path):
    folder = exports["bert-dynamic"]
    found = verify(folder, SourceOverrides())
    assert found.passed and found.sources == ("base", "adapter topic", "adapter kind")
    base, topic = own(bases["bert"]), own(adapters["topic"])
    flip(base / "model.safetensors")
    (topic / "adapter_config.json").unlink()
    overrides = SourceOverrides(str(base), {"topic": str(topic), "kind": str(tmp_path / "nowhere")})
    problems = verify(folder, overrides).problems
    assert [(problem.kind, problem.name) for problem in problems] == [
        ("source", "base"), ("source", "adapter topic"), ("source", "adapter kind"),
    ]  # fmt: skip
    assert "This base is not the one that was exported" in problems[0].detail
    assert str(base / "model.safetensors") in problems[0].detail
    assert "no such file" in problems[1].detail
    assert "not where it was" in problems[2].detail and "--adapter kind=PATH" in problems[2].detail
    with pytest.raises(UsageProblem, match="The export has no adapter 'nobody'"):
        verify(folder, SourceOverrides(None, {"nobody": "x"}))


def test_the_command_says_what_it_found_and_exits_by_it(exports, own, bases, tmp_path):
    folder = own(exports["bert-dynamic"])
    result = call("verify", folder)
    assert result.exit_code == 0 and result.output.startswith(f"✓ intact: {folder}, ")
    assert "sources    as they were: base, adapter topic, adapter kind" in call("verify", folder, "--sources").output
    shutil.copytree(bases["bert"], tmp_path / "moved")
    assert "base" in call("verify", folder, "--base", tmp_path / "moved").output, "--base asks for the sources"
    (folder / "tokenizer.json").unlink()
    flip(folder / "model.onnx")
    (folder / "notes.txt").write_text("x")
    text = fails(1, "verify", folder)
    assert text.startswith(f"✕ not as it was exported: {folder}")
    assert "  missing    tokenizer.json" in text and "  extra      notes.txt" in text
    assert "  changed    model.onnx  expected sha256 " in text
    assert call("verify", folder, "--quiet").output == ""
    result = call("verify", folder, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and found["passed"] is False and found["signature"] == "none"
    assert {(problem["kind"], problem["name"]) for problem in found["problems"]} == {
        ("missing", "tokenizer.json"), ("changed", "model.onnx"), ("extra", "notes.txt"),
    }  # fmt: skip


def test_a_folder_that_is_no_export_is_refused(tmp_path):
    assert "The folder holds no export" in fails(3, "verify", tmp_path)
