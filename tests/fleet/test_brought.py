"""What a run brings to an address: by adapter, beside what is there; and wherever it is killed, the next goes on."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil

import pytest
from mirrors import ADDRESS, FIRST, SECOND, THIRD, as_if_whole, bring, gone_after, silent, there

from lora_export.artifact import sha256_of
from lora_export.errors import EnvironmentUnusable, InputRefused
from lora_export.fleet.remote import mirrored
from lora_export.fleet.state import RECORDS
from lora_export.fleet.store import PARTIAL


def test_an_adapter_appears_as_soon_as_it_is_done_and_what_replaces_another_waits(store, tmp_path, monkeypatch):
    as_if_whole(monkeypatch)
    bring(tmp_path / "cache", FIRST)
    before = there(ADDRESS)
    with mirrored(ADDRESS, tmp_path / "other", silent) as mirror:
        made = tmp_path / "made"
        for name in ("b", "d"):
            (made / name).parent.mkdir(exist_ok=True)
            (made / name).write_text(SECOND[name])
            mirror.appear(made, {name: sha256_of(made / name)})
        mirror.arrived()
        found = there(ADDRESS)
        assert found["d"] == b"4" and {name: found[name] for name in before} == before
        waits = f"{PARTIAL}/next/{sha256_of(made / 'b')}/b"
        assert found[waits] == b"other"


def test_a_fleet_that_is_refused_leaves_nothing_at_its_address(store, tmp_path, monkeypatch):
    as_if_whole(monkeypatch)
    for first in ({}, FIRST):
        if first:
            bring(tmp_path / "cache", first)
        before = there(ADDRESS)
        (tmp_path / "d").write_text("4")
        with pytest.raises(InputRefused), mirrored(ADDRESS, tmp_path / "cache", silent) as mirror:
            mirror.appear(tmp_path, {"d": sha256_of(tmp_path / "d")})
            mirror.arrived()
            assert "d" in there(ADDRESS)
            raise InputRefused("none can be exported")
        assert there(ADDRESS) == before


@pytest.mark.parametrize("first", [{}, FIRST, FIRST | {"model.onnx": "older"}], ids=["new", "renewed", "other graph"])
def test_wherever_a_run_is_killed_the_next_one_makes_the_address_whole(first, store, tmp_path, monkeypatch):
    """On the same machine or on another, with the same list or with another; and nothing else stays there."""
    as_if_whole(monkeypatch)
    n_calls, n_resumed = 1000, 0
    for struck in itertools.count():
        if struck > n_calls:
            break
        for cache, then in zip(("same", "other"), (SECOND, THIRD)[:: (-1) ** struck], strict=True):
            shutil.rmtree(tmp_path, ignore_errors=True)
            store.store.clear()
            if first:
                bring(tmp_path / "same", first)
            before = there(ADDRESS)
            with gone_after(struck) as counted, contextlib.suppress(EnvironmentUnusable):
                bring(tmp_path / "same", SECOND)
                n_calls = counted[0]
            found = there(ADDRESS)
            if found.get("lora_export.json") == before.get("lora_export.json") and not _is_replacing(found):
                assert all(found[name] == before[name] for name in before if "reports" not in name)
            if cache == "other":
                store.store.pop("/store/served/.fleet.lock", None)
            with gone_after(1000) as counted:
                bring(tmp_path / cache, then)
            n_resumed += then == SECOND and counted[0] < n_calls
            found = there(ADDRESS)
            manifest = json.loads(found["lora_export.json"])["files"]
            named = {name for name in found if name != "lora_export.json" and not name.startswith("reports/fleet.")}
            assert {name: found[name].decode() for name in then} == then, (struck, cache)
            assert named == {*then, *RECORDS} == set(manifest), (struck, cache)
            assert all(hashlib.sha256(found[name]).hexdigest() == manifest[name] for name in named)
    assert struck > 15 and n_resumed > 10


def _is_replacing(found: dict[str, bytes]) -> bool:
    """Whether a run got so far that it moves what replaces something."""
    waiting = {name.split("/", 3)[3] for name in found if name.startswith(f"{PARTIAL}/next/")}
    announced = {name.split("/", 3)[3] for name in found if name.startswith(f"{PARTIAL}/placed/")}
    return bool(announced & (waiting | FIRST.keys()))
