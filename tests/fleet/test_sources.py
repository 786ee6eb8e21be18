"""Adapters of a list, fetched and opened; which of them are refused, and which a disk only did not give."""

from __future__ import annotations

import errno
import os
import shutil

import fsspec
import pytest

from lora_export.fleet import sources
from lora_export.fleet.outcomes import Outcome
from lora_export.fleet.roster import Entry
from lora_export.fleet.sources import open_all


def test_an_address_is_fetched(adapters, tmp_path):
    memory = fsspec.filesystem("memory")
    for file in adapters["chat"].iterdir():
        memory.pipe(f"/store/chat/{file.name}", file.read_bytes())
    memory.pipe("/store/chat/chat_template.jinja", b"mine")
    entries = [Entry("chat", "memory://store/chat", "here"), Entry("gone", "memory://store/gone", "here")]
    opened, refused = open_all(entries, "base", None, fetched=tmp_path, progress=lambda *_: None)
    assert [each.folder.shapes.keys() for each in opened] and opened[0].folder.path == tmp_path / "chat"
    assert "chat_template.jinja" in opened[0].carried
    assert [(outcome.name, outcome.reason) for outcome in refused] == [
        ("gone", "The adapter cannot be fetched (memory://store/gone)")
    ]


@pytest.mark.parametrize(
    ("number", "outcome"), [(errno.EIO, Outcome.BROKEN), (errno.EACCES, Outcome.REFUSED), (errno.EMFILE, None)]
)
def test_what_a_disk_does_not_give_is_not_refused_as_if_it_could_not_be_exported(number, outcome, adapters, tmp_path):
    """It would be dropped from the fleet with exit code 0; where the machine is short, nothing is known of any."""
    entry = Entry("chat", str(adapters["chat"]), "here")

    def fail(path):
        raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "sha256_of", fail)
        patch.setattr(sources, "source_hashes", fail)
        if outcome is None:
            with pytest.raises(OSError, match="Too many open files"):
                open_all([entry], "base", None, fetched=tmp_path, progress=lambda *_: None)
            return
        _, (found,) = open_all([entry], "base", None, fetched=tmp_path, progress=lambda *_: None)
    assert found.outcome is outcome and os.strerror(number) in found.reason


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", "LICENSE", "generation_config.json"])
def test_what_lies_beside_an_adapter_decides_with_it(name, adapters, tmp_path):
    shutil.copytree(adapters["chat"], tmp_path / "chat")
    found = []
    for text in ("{}", '{"a": 1}'):
        (tmp_path / "chat" / name).write_text(text)
        (opened,), _ = open_all(
            [Entry("chat", str(tmp_path / "chat"), "here")], "base", None, fetched=tmp_path, progress=lambda *_: None
        )
        found.append(opened)
    is_source = name == "config.json"  # of its labels
    assert (found[0].hashes != found[1].hashes) == is_source and found[0].kind == found[1].kind
    assert found[0].carried[name] != found[1].carried[name]
