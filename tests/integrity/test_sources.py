"""Finding an export's base and adapters again, and making sure that they are the same."""

from __future__ import annotations

import shutil

import pytest

from lora_export.artifact import read_manifest
from lora_export.errors import InputRefused, UsageProblem
from lora_export.integrity.sources import SourceOverrides, locate_sources


def test_they_are_found_where_they_were(exports, bases, adapters):
    base, found = locate_sources(read_manifest(exports["bert-dynamic"]), SourceOverrides())
    assert base == bases["bert"].resolve()
    assert found == {name: adapters[name].resolve() for name in ("topic", "kind")}
    assert locate_sources(read_manifest(exports["bert-dynamic"]), SourceOverrides(), only_base=True)[1] == {}


def test_they_may_have_moved(exports, bases, adapters, tmp_path):
    shutil.copytree(bases["bert"], tmp_path / "base")
    shutil.copytree(adapters["topic"], tmp_path / "topic")
    overrides = SourceOverrides(str(tmp_path / "base"), {"topic": str(tmp_path / "topic")})
    base, found = locate_sources(read_manifest(exports["bert-dynamic"]), overrides)
    assert base == tmp_path / "base" and found["topic"] == tmp_path / "topic"


def test_one_that_is_gone_is_refused_with_the_option_that_helps(exports):
    overrides = SourceOverrides("/nowhere/at/all")
    with pytest.raises(InputRefused, match="The export's base is not where it was") as refused:
        locate_sources(read_manifest(exports["bert-dynamic"]), overrides)
    assert refused.value.next_step == "say where it is now with --base PATH"


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_one_changed_byte_is_seen(file, exports, adapters, own):
    folder = own(adapters["kind"])
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    overrides = SourceOverrides(None, {"kind": str(folder)})
    with pytest.raises(InputRefused, match="This adapter is not the one that was exported") as refused:
        locate_sources(read_manifest(exports["bert-dynamic"]), overrides)
    assert refused.value.where == str(folder / file) and "--adapter kind=PATH" in refused.value.next_step


def test_a_lost_file_is_seen(exports, adapters, own):
    folder = own(adapters["kind"])
    (folder / "adapter_config.json").unlink()
    with pytest.raises(InputRefused) as refused:
        locate_sources(read_manifest(exports["bert-dynamic"]), SourceOverrides(None, {"kind": str(folder)}))
    assert refused.value.found == "no such file"


def test_an_override_for_nobody_is_a_usage_problem(exports):
    with pytest.raises(UsageProblem, match="The export has no adapter 'nobody'"):
        locate_sources(read_manifest(exports["bert-dynamic"]), SourceOverrides(None, {"nobody": "/x"}))
