"""A fleet at an address of S3, as a local server speaks it: no renames, no folders, and refusals of its own."""

from __future__ import annotations

import shutil
import urllib.request
from functools import partial

import boto3
import pytest
import s3fs
from command_line import fails
from mirrors import FIRST, SECOND, THIRD, as_if_whole, bring, gone_after, there
from moto.server import ThreadedMotoServer

from lora_export.errors import EnvironmentUnusable
from lora_export.fleet.roster import Entry
from lora_export.fleet.sources import open_all
from lora_export.fleet.state import RECORDS
from lora_export.fleet.store import PARTIAL, Store

ADDRESS = "s3://bucket/served"


@pytest.fixture(scope="module")
def server():
    served = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    served.start()
    host, port = served.get_host_and_port()
    yield f"http://{host}:{port}"
    served.stop()


@pytest.fixture
def s3(server, monkeypatch):
    """A client of a store with one bucket, which the environment names as users' do."""
    urllib.request.urlopen(urllib.request.Request(f"{server}/moto-api/reset", method="POST"))
    found = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (found | {"AWS_ENDPOINT_URL": server, "AWS_EC2_METADATA_DISABLED": "true"}).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    s3fs.S3FileSystem.clear_instance_cache()


def objects(s3) -> set[str]:
    return {found["Key"] for found in s3.list_objects_v2(Bucket="bucket").get("Contents", ())}


def test_a_fleet_appears_there_and_is_renewed_from_another_machine(s3, tmp_path, monkeypatch):
    as_if_whole(monkeypatch)
    s3.put_object(Bucket="bucket", Key="served/", Body=b"")  # what S3's console makes of a folder
    s3.put_object(Bucket="bucket", Key="served2/mine", Body=b"mine")
    s3.put_bucket_versioning(Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})
    bring(tmp_path / "one", FIRST, ADDRESS)
    for cache, files in (("two", SECOND), ("one", THIRD)):
        bring(tmp_path / cache, files, ADDRESS)
        found = there(ADDRESS)
        assert {name: found[name].decode() for name in files} == files
        named = {"lora_export.json", "reports/fleet.json", *RECORDS, *files}
        assert objects(s3) == {f"served/{name}" for name in named} | {"served/", "served2/mine"}
    assert len(s3.list_object_versions(Bucket="bucket", Prefix="served/model.onnx")["Versions"]) == 1, "sent once"


@pytest.mark.parametrize("struck", [2, 7, 12, 16, 20, 24])
def test_where_a_run_is_killed_the_next_one_goes_on(struck, s3, tmp_path, monkeypatch):
    as_if_whole(monkeypatch)
    bring(tmp_path / "one", FIRST, ADDRESS)
    with gone_after(struck, s3fs.S3FileSystem, ("_call_s3",)) as counted, pytest.raises(EnvironmentUnusable):
        bring(tmp_path / "one", SECOND, ADDRESS)
    assert counted[0] > struck
    s3.delete_object(Bucket="bucket", Key="served/.fleet.lock")
    bring(tmp_path / "two", SECOND, ADDRESS)
    found = there(ADDRESS)
    assert {name: found[name].decode() for name in SECOND} == SECOND
    assert "c" not in found and not any(name.startswith(PARTIAL) for name in found)


def test_of_two_that_begin_at_once_the_store_refuses_one(s3, monkeypatch):
    store = Store.of(ADDRESS)
    monkeypatch.setattr(Store, "exists", lambda self, name: False)  # as it was a moment before
    store.create(".fleet.lock", b"first")
    with pytest.raises(FileExistsError):
        store.create(".fleet.lock", b"second")
    assert store.read(".fleet.lock") == b"first"


def test_what_is_larger_than_a_part_is_sent_in_parts(s3, tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(256)) * (12 << 12))  # 12 MiB
    store = Store.of(ADDRESS)
    store.system.put_file = partial(store.system.put_file, chunksize=5 << 20)
    store.put(tmp_path / "file", "a")
    assert s3.head_object(Bucket="bucket", Key="served/a")["ETag"].endswith('-3"')
    store.move("a", "b")
    assert store.sizes() == {"b": 12 << 20}
    store.get("b", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()


def test_what_the_store_refuses_ends_the_command(s3, server, adapters, bases, monkeypatch):
    """One message and exit code 4; no bucket is made."""

    def said(address: str) -> str:
        s3fs.S3FileSystem.clear_instance_cache()
        told = fails(4, "fleet", adapters["chat"].parent, bases["llama"], "-o", address)
        assert "The output's address cannot be read or written" in told and address in told
        return told

    assert "The specified bucket does not exist" in said("s3://nowhere/served")
    assert "The specified bucket does not exist" in said("s3://nowhere")
    assert [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]] == ["bucket"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert "Unable to locate credentials" in said(ADDRESS)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unknown")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "unknown")
    try:
        _let(server, b"0")
        assert "PermissionError" in said(ADDRESS)
    finally:
        _let(server, b"inf")
    assert objects(s3) == set()


def _let(server: str, n_calls: bytes) -> None:
    """Let everyone in for so many calls, and then nobody."""
    told = {"data": n_calls, "headers": {"Content-Type": "text/plain"}, "method": "POST"}
    urllib.request.urlopen(urllib.request.Request(f"{server}/moto-api/reset-auth", **told))


def test_adapters_are_fetched_and_a_store_that_cannot_be_asked_refuses_none(s3, adapters, tmp_path, monkeypatch):
    for file in adapters["chat"].iterdir():
        s3.upload_file(str(file), "bucket", f"list/chat/{file.name}")
    entries = [Entry(name, f"s3://bucket/list/{name}", "here") for name in ("chat", "gone")]

    def opened(entries: list[Entry]):
        s3fs.S3FileSystem.clear_instance_cache()
        shutil.rmtree(tmp_path / "fetched", ignore_errors=True)
        return open_all(entries, "base", None, fetched=tmp_path / "fetched", progress=lambda *_: None)

    found, refused = opened(entries)
    assert [each.entry.name for each in found] == ["chat"] and [each.name for each in refused] == ["gone"]
    assert "s3://bucket/list/gone" in refused[0].reason
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(EnvironmentUnusable, match="Unable to locate credentials"):
        opened(entries)
