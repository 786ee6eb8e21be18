"""A fleet at an address: what is there is what a folder would have; one fleet at a time, also after one that died."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import call, fails
from mirrors import ADDRESS, as_if_whole, make_folder, silent, there, write_files

from lora_export.errors import EnvironmentUnusable
from lora_export.fleet import remote
from lora_export.fleet.address_lock import host
from lora_export.fleet.remote import mirrored
from lora_export.fleet.state import RECORDS
from lora_export.fleet.store import PARTIAL, Store
from lora_export.integrity.verify import verify


def fleet(listed: Path, base: Path, address: str):
    return call("fleet", listed, base, "-o", address, "--provider", "cpu", "--workers", 1, "--rows", 2)


def test_what_is_uploaded_is_the_fleet_and_a_second_run_does_what_changed(
    store, adapters, bases, tmp_path, monkeypatch
):
    listed = tmp_path / "list"
    for name in ("chat", "code"):
        shutil.copytree(adapters[name], listed / name)
    first = fleet(listed, bases["llama"], ADDRESS)
    assert first.exit_code == 0 and f"wrote {ADDRESS}/reports/fleet.html" in first.output, first.output
    files = there(ADDRESS)
    assert json.loads(files["reports/fleet.json"])["folder"] == ADDRESS and ".fleet.lock" not in files
    mirrors = Path(os.environ["LORA_EXPORT_CACHE"]) / "fleets"
    assert verify(next(mirrors.glob("*/out"))).passed
    shutil.rmtree(mirrors)  # another machine
    shutil.rmtree(listed / "code")
    shutil.copytree(adapters["chat"], listed / "late")
    put = store.put_file
    uploaded = []
    monkeypatch.setattr(
        type(store), "put_file", lambda self, here, at, **how: (uploaded.append(at), put(here, at, **how))
    )
    second = fleet(listed, bases["llama"], ADDRESS)
    assert "1 unchanged" in second.output or "2 served" in second.output, second.output
    names = [at.removeprefix("/store/served/") for at in uploaded]
    assert names[0] == "adapters/late.onnx_adapter" and names[-1] == "lora_export.json"
    assert not {"model.onnx.data", "adapters/chat.onnx_adapter"} & set(names)
    files = there(ADDRESS)
    assert {name for name in files if name.startswith("adapters/")} == {
        "adapters/chat.onnx_adapter", "adapters/late.onnx_adapter",
    }  # fmt: skip
    reused = {each["name"]: each["reused"] for each in json.loads(files["reports/fleet.json"])["adapters"]}
    assert reused == {"chat": True, "late": False}
    folder = tmp_path / "folder"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    assert verify(folder).passed


def test_what_is_no_fleet_is_not_touched(tmp_path, adapters, bases):
    for files in ({"notes.txt": "mine"}, {"lora_export.json": "{}"}):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        address = write_files(tmp_path / "out", files)
        message = fails(3, "fleet", adapters["chat"].parent, bases["llama"], "-o", address)
        assert "The output's address holds something that is no fleet" in message
        assert {path.name for path in (tmp_path / "out").iterdir()} == set(files)


def test_a_store_that_cannot_be_reached(tmp_path, adapters, bases):
    message = fails(4, "fleet", adapters["chat"].parent, bases["llama"], "-o", "nosuch://bucket/served")
    assert "The output's address cannot be read or written" in message and "nosuch" in message


def _held_by(process: int, host: str, folder: Path) -> str:
    return write_files(folder, {".fleet.lock": json.dumps({"host": host, "process": process, "run": "x"})})


def test_one_fleet_at_a_time(tmp_path):
    with mirrored(f"file://{tmp_path / 'out'}", tmp_path / "cache", silent) as mirror:
        assert mirror.brought.known == {} and (tmp_path / "out/.fleet.lock").is_file()
        with (
            pytest.raises(EnvironmentUnusable, match="Another fleet is being made at this address") as refused,
            mirrored(f"file://{tmp_path / 'out'}", tmp_path / "cache", silent),
        ):
            pass
        assert f"process {os.getpid()} on {socket.gethostname()}" in refused.value.found
    assert list((tmp_path / "out").iterdir()) == []


def test_the_lock_of_one_that_died_here_is_taken_over_and_another_machines_is_not(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    address = _held_by(ended.pid, host(), tmp_path / "here")
    with mirrored(address, tmp_path / "cache", silent):
        pass
    for elsewhere in ("elsewhere", socket.gethostname()):  # containers may have one name, and processes of their own
        address = _held_by(ended.pid, elsewhere, tmp_path / "there")
        with (
            pytest.raises(EnvironmentUnusable, match=r"remove \.fleet\.lock"),
            mirrored(address, tmp_path / "cache", silent),
        ):
            pass
        assert (tmp_path / "there/.fleet.lock").is_file()


def test_a_lock_that_another_took_is_not_removed_and_nothing_is_uploaded(tmp_path):
    lock = tmp_path / "out/.fleet.lock"
    with (
        pytest.raises(EnvironmentUnusable, match="Another fleet is being made at this address"),
        mirrored(f"file://{tmp_path / 'out'}", tmp_path / "cache", silent) as mirror,
    ):
        _held_by(1, "elsewhere", tmp_path / "out")
        mirror.published({})
    assert {path.name for path in lock.parent.iterdir()} == {lock.name, PARTIAL}
    assert json.loads(lock.read_text())["host"] == "elsewhere"


def test_what_is_gone_at_the_address_is_uploaded_again_and_what_is_not_of_the_fleet_stays(store, tmp_path, monkeypatch):
    as_if_whole(monkeypatch)
    with mirrored(ADDRESS, tmp_path, silent) as mirror:
        make_folder(mirror.folder, a="1", b="2", **dict.fromkeys(RECORDS, "{}"))
        mirror.published({})
    store.rm_file("/store/served/a")
    store.pipe_file("/store/served/eu/model.onnx", b"another fleet's")
    with mirrored(ADDRESS, tmp_path, silent) as mirror:
        assert "a" not in mirror.brought.known and "b" in mirror.brought.known
        (mirror.folder / "b").unlink()
        manifest = json.loads((mirror.folder / "lora_export.json").read_text())
        del manifest["files"]["b"]
        (mirror.folder / "lora_export.json").write_text(json.dumps(manifest))
        mirror.published({})
    files = there(ADDRESS)
    assert files["a"] == b"1" and "b" not in files and files["eu/model.onnx"] == b"another fleet's"


def test_what_was_stopped_before_its_first_file_is_gone_on_with(store, tmp_path):
    """Also on another machine, by which its lock was removed."""
    store.pipe({f"/store/served/{PARTIAL}/begun": b"x", "/store/served/model.onnx": b"part"})
    with mirrored(ADDRESS, tmp_path, silent) as mirror:
        assert mirror.brought.known == {} and mirror.brought.sizes == {"model.onnx": 4}


def test_files_outside_the_folder_are_refused(tmp_path):
    address = write_files(
        tmp_path / "out", {name: json.dumps({"files": {"../x": ""}}) for name in (*RECORDS, "lora_export.json")}
    )
    with pytest.raises(Exception, match="names files outside its folder"), mirrored(address, tmp_path / "c", silent):
        pass


def test_an_upload_that_failed_is_made_whole_by_the_next_run(store, tmp_path, monkeypatch):
    as_if_whole(monkeypatch)

    def full(self, here, at, **how):
        raise OSError("no space in the store")

    with (
        pytest.raises(EnvironmentUnusable, match="no space in the store"),
        mirrored(ADDRESS, tmp_path, silent) as mirror,
    ):
        make_folder(mirror.folder, a="1", b="2")
        with monkeypatch.context() as patch:
            patch.setattr(type(store), "put_file", full)
            mirror.published({})
    assert {name.partition("/")[0] for name in there(ADDRESS)} == {PARTIAL}
    with mirrored(ADDRESS, tmp_path, silent) as mirror:
        assert mirror.brought.known == {} and (mirror.folder / "a").read_text() == "1"
        assert mirror.published({"json": mirror.folder / "reports/fleet.json"}) == {
            "json": f"{ADDRESS}/reports/fleet.json"
        }
    assert set(there(ADDRESS)) == {"a", "b", "lora_export.json", "reports/fleet.json"}


def test_what_is_fetched_and_uploaded_is_told_in_bytes(store, tmp_path):
    store.pipe("/store/served/model.onnx.data", bytes(700))
    sizes = Store.of(ADDRESS).sizes()
    assert sizes == {"model.onnx.data": 700}
    found = list(remote._by_bytes(["model.onnx.data", "model.onnx"], sizes | {"model.onnx": 30}))
    assert found == [("model.onnx.data", 0, 730), ("model.onnx", 700, 730)]
