"""An export whose files change is the old one or the new one, whenever the process is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from test_folders import _in_child, _killed_at

from lora_export import changing as module
from lora_export.artifact import MANIFEST, SIGNATURE
from lora_export.changing import changing
from lora_export.errors import EnvironmentUnusable
from lora_export.staging import staging

OLD = {MANIFEST: "old", "model.onnx": "graph", "adapters/a": "old a", "adapters/b/file": "b", SIGNATURE: "old",
       "reports/check.md": "mine"}  # fmt: skip
NEW = {MANIFEST: "new", "model.onnx": "graph", "adapters/a": "new a", "adapters/c": "c", "reports/check.md": "mine"}


def _write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def _contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def _change(out: Path, *, sign: bool = False) -> None:
    with changing(out) as change:
        _write(change.made, {name: content for name, content in NEW.items() if OLD.get(name) != content})
        change.gone.add("adapters/b/file")
        change.publish(lambda folder: _write(folder, {SIGNATURE: "signed"} if sign else {}))


def test_a_kill_at_any_call_leaves_the_old_or_the_new_and_the_next_change_cleans_up(tmp_path):
    out, seen = _write(tmp_path / "out", OLD), []
    for nth in range(1, 90):
        status = _in_child(lambda nth=nth: _killed_at(nth, lambda: _change(out)))
        assert _contents(out) in (OLD, NEW)
        seen.append(_contents(out) == NEW)
        _change(out)
        assert _contents(out) == NEW and not (out / "adapters/b").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        _write(out, OLD)
        (out / "adapters/c").unlink()
    assert status == 0 and nth > 20 and True in seen and False in seen


def test_what_stays_is_the_same_file_and_the_folder_keeps_its_rights(tmp_path):
    out = _write(tmp_path / "out", OLD)
    out.chmod(0o750)
    before, reading = (out / "model.onnx").stat().st_ino, (out / "adapters/a").open()
    _change(out, sign=True)
    assert _contents(out) == NEW | {SIGNATURE: "signed"}
    assert (out / "model.onnx").stat().st_ino == before and out.stat().st_mode & 0o777 == 0o750
    assert reading.read() == "old a", "who has a file open keeps it"
    reading.close()


def test_a_change_that_fails_leaves_the_export_as_it_was(tmp_path):
    out = _write(tmp_path / "out", OLD)
    with pytest.raises(ZeroDivisionError), changing(out) as change:
        _write(change.made, NEW)
        _ = 1 / 0
    with pytest.raises(ZeroDivisionError), changing(out) as change:
        _write(change.made, {"adapters/a": "new a"})
        change.publish(lambda folder: 1 / 0)
    assert _contents(out) == OLD and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_nothing_can_be_made_beside_it_files_are_replaced_one_by_one_and_the_manifest_last(tmp_path, monkeypatch):
    """Killed in between, the same change made again ends it."""
    monkeypatch.setattr(module.Path, "is_mount", lambda path: path.name == "out")
    out, manifests = _write(tmp_path / "out", OLD), []
    for nth in range(1, 60):
        status = _in_child(lambda nth=nth: _killed_at(nth, lambda: _change(out, sign=True)))
        found = _contents(out)
        manifests.append(found[MANIFEST])
        if found[MANIFEST] == "new":
            assert found["adapters/a"] == "new a" and found["adapters/c"] == "c"
        _change(out, sign=True)
        assert _contents(out) == NEW | {SIGNATURE: "signed"}
        assert sorted(path.name for path in out.iterdir()) == sorted({Path(name).parts[0] for name in OLD})
        if status == 0:
            break
        _write(out, OLD)
        (out / "adapters/c").unlink()
    assert status == 0 and nth > 15 and set(manifests) == {"old", "new"}


def test_an_export_that_is_being_made_anew_is_not_changed(tmp_path):
    out = _write(tmp_path / "out", OLD)
    with (
        staging(out, overwrite=True, n_bytes=1) as stage,
        pytest.raises(EnvironmentUnusable, match="Another process is writing this folder"),
    ):
        _write(stage, {MANIFEST: "whole"})
        _change(out)
    assert _contents(out) == {MANIFEST: "whole"}
