"""A folder that is killed while it is replaced is the old one or the new one, and one process changes it at a time."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_export import folders
from lora_export.artifact import MANIFEST
from lora_export.errors import EnvironmentUnusable
from lora_export.folders import held, own_folder
from lora_export.staging import staging

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "open"}


def _write(out: Path, content: str) -> None:
    with staging(out, overwrite=True, n_bytes=1) as stage:
        for name in (MANIFEST, "model.onnx", "adapters/a"):
            (stage / name).parent.mkdir(exist_ok=True)
            (stage / name).write_text(content)


def _contents(out: Path) -> set[str]:
    return {(out / name).read_text() for name in (MANIFEST, "model.onnx", "adapters/a")}


def _in_child(work: Callable[[], None]) -> int:
    """The status of a process that does `work`: 0 if it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def _killed_at(nth: int, work: Callable[[], None]) -> None:
    left = nth

    def hook(event: str, _arguments: object) -> None:
        nonlocal left
        if event in _CHANGES:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    work()


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_kill_at_any_change_leaves_the_old_or_the_new_and_the_next_run_cleans_up(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(folders, "_exchanged", lambda *_: False)
    out, seen = tmp_path / "out", set()
    for nth in range(1, 60):
        _write(out, "old")
        status = _in_child(lambda nth=nth: _killed_at(nth, lambda: _write(out, "new")))
        if out.exists() or can_exchange:
            (content,) = _contents(out)
            seen.add(content)
        _write(out, "next")
        assert _contents(out) == {"next"}
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert status == 0 and nth > 15
    assert seen == {"old", "new"}


def test_what_was_moved_away_is_put_back_before_anything_else(tmp_path, monkeypatch):
    """Where names cannot be exchanged, a kill between the two renames costs no export, even if the next run is refused."""
    monkeypatch.setattr(folders, "_exchanged", lambda *_: False)
    out = tmp_path / "out"
    _write(out, "old")
    out.rename(tmp_path / ".out.old")
    with pytest.raises(ZeroDivisionError), staging(out, overwrite=True, n_bytes=1):
        _ = 1 / 0
    assert _contents(out) == {"old"}


def test_two_processes_that_build_one_folder_are_told_apart(tmp_path):
    out = tmp_path / "out"
    _write(out, "old")
    with staging(out, overwrite=True, n_bytes=1) as stage:
        (stage / "file").write_text("mine")
        with pytest.raises(EnvironmentUnusable, match="Another process is writing this folder") as refused:
            _write(out, "theirs")
        assert refused.value.where == str(out)
        assert (stage / "file").read_text() == "mine"
        assert _contents(out) == {"old"}


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    _write(tmp_path / "v1", "old")
    (tmp_path / "current").symlink_to("v1")
    _write(tmp_path / "current", "new")
    assert (tmp_path / "current").is_symlink() and _contents(tmp_path / "v1") == {"new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "v1"]


def test_a_place_to_build_in_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    (tmp_path / ".out.partial").symlink_to("precious")
    with pytest.raises(EnvironmentUnusable, match="The place to build in is taken"):
        _write(tmp_path / "out", "new")
    assert (tmp_path / "precious" / "file").read_text() == "kept"


def test_a_folder_of_ones_own_goes_with_its_process_or_with_the_next(tmp_path):
    (tmp_path / ".mine-file").touch()
    with own_folder(tmp_path, ".mine-") as first:

        def killed() -> None:
            with own_folder(tmp_path, ".mine-") as second:
                (second / "file").touch()
                os.kill(os.getpid(), signal.SIGKILL)

        assert os.WTERMSIG(_in_child(killed)) == signal.SIGKILL
        assert len(list(tmp_path.glob(".mine-*/file"))) == 1
        with own_folder(tmp_path, ".mine-") as third:
            assert sorted(tmp_path.iterdir()) == sorted([tmp_path / ".mine-file", first, third])
    assert list(tmp_path.iterdir()) == [tmp_path / ".mine-file"]


def test_where_too_many_files_are_open_nothing_is_left(tmp_path, monkeypatch):
    def fails(_folder: Path) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(folders, "_open", fails)
    with pytest.raises(OSError, match="Too many"), own_folder(tmp_path, ".mine-"):
        pass
    with pytest.raises(OSError, match="Too many"), staging(tmp_path / "out", overwrite=True, n_bytes=1):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_change_waits_for_the_one_before_it_and_then_sees_what_is_there(tmp_path):
    out, order = tmp_path / "out", tmp_path / "order"
    _write(out, "old")
    order.touch()

    def slow() -> None:
        with held(out):
            order.write_text("began")
            time.sleep(0.4)
            order.write_text(order.read_text() + " ended")

    child = os.fork()
    if child == 0:
        slow()
        os._exit(0)
    while order.read_text() != "began":
        time.sleep(0.01)
    with held(out):
        assert order.read_text() == "began ended"
    os.waitpid(child, 0)


def test_who_reads_does_not_wait_for_others_that_read_but_who_changes_waits_for_them(tmp_path):
    out = tmp_path / "out"
    _write(out, "old")
    with held(out, to_read=True):

        def reads() -> None:
            with held(out, to_read=True):
                pass

        def changes() -> None:
            signal.alarm(1)
            with held(out):
                pass

        assert _in_child(reads) == 0
        assert os.WTERMSIG(_in_child(changes)) == signal.SIGALRM
    assert _in_child(changes) == 0


def test_an_export_waits_until_an_adapter_is_added_to_the_one_it_replaces(tmp_path):
    out = tmp_path / "out"
    _write(out, "old")
    began, ended = tmp_path / "began", tmp_path / "ended"

    def add() -> None:
        with held(out):
            began.touch()
            time.sleep(0.4)
            (out / "added").touch()
            ended.touch()

    child = os.fork()
    if child == 0:
        add()
        os._exit(0)
    while not began.exists():
        time.sleep(0.01)
    _write(out, "new")
    assert ended.exists() and _contents(out) == {"new"} and not (out / "added").exists()
    os.waitpid(child, 0)


_STRUCK = """
import os, shutil, signal
from lora_export import folders
signal.signal(signal.SIGINT, signal.default_int_handler)
place, remove = folders.workplace(), shutil.rmtree
shutil.rmtree = lambda *given, **how: (os.kill(os.getpid(), signal.SIGINT), remove(*given, **how))
print(place)
"""


def test_ctrl_c_while_the_process_ends_leaves_nothing(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", _STRUCK], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
