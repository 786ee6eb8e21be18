"""Another base than the one that an adapter records: said in the plan, kept in the manifest, repeated by check."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lora_export.adapters.folder import AdapterFolder
from lora_export.artifact import read_manifest
from lora_export.base.checkpoint import Located
from lora_export.check.context import CheckOptions
from lora_export.errors import EnvironmentUnusable, InputRefused
from lora_export.export.origin import another_base
from lora_export.export.plan import Request, make_plan
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import ExportOptions, check, export
from lora_export.report.text import render_check_text

COMMITS = "a" * 40, "b" * 40
HUB = "/root/.cache/huggingface/hub/models--meta--Llama-2-7b/snapshots/"


def adapter(base: str | None, revision: str | None = None) -> AdapterFolder:
    return AdapterFolder("x", Path(), "x", {"base_model_name_or_path": base, "revision": revision}, {})


@pytest.mark.parametrize(
    ("recorded", "revision", "given", "path", "used", "expected"),
    [
        ("meta/Llama-2-7b", None, "meta/Llama-2-7b", HUB + COMMITS[0], COMMITS[0], None),
        ("meta/Llama-2-7b", None, "/models/llama-2-7b", "/models/llama-2-7b", None, None),
        ("/content/llama-2-7b/", None, "models/Llama-2-7b", "/x/models/Llama-2-7b", None, None),
        (HUB + COMMITS[0], None, "/models/Llama-2-7b", "/models/Llama-2-7b", None, None),
        ("C:\\models\\llama", None, "/models/llama", "/models/llama", None, None),
        (None, None, "/models/llama", "/models/llama", None, None),
        ("meta/Llama-2-7b", "main", "meta/Llama-2-7b", HUB + COMMITS[0], COMMITS[0], None),
        ("meta/Llama-2-7b", None, "/models/Llama-3-8b", "/models/Llama-3-8b", None, "meta/Llama-2-7b"),
        ("meta/Llama-2-7b", "v1", "/models/other", "/models/other", None, "meta/Llama-2-7b at revision v1"),
        (
            "meta/Llama-2-7b", COMMITS[1], "meta/Llama-2-7b", HUB + COMMITS[0], COMMITS[0],
            f"meta/Llama-2-7b at revision {COMMITS[1]}",
        ),
    ],
)  # fmt: skip
def test_a_base_is_the_same_by_its_name(recorded, revision, given, path, used, expected):
    assert another_base(adapter(recorded, revision), Located(Path(path), given, used)) == expected


def test_another_base_is_said_and_kept(bases, adapters, tmp_path):
    base, said = Path(shutil.copytree(bases["classifier"], tmp_path / "other")), []
    request = Request(str(base), ((str(adapters["plain"]), None),), "merge")
    recorded = str(bases["classifier"])
    manifest = export(request, ExportOptions(tmp_path / "out"), remark=said.append)
    assert said == [f"adapter 'plain' records another base, {recorded}; it is exported on {base}, whose shapes fit"]
    assert (
        read_manifest(tmp_path / "out").adapter("plain").other_base == manifest.adapter("plain").other_base == recorded
    )
    report, _ = check(tmp_path / "out", SourceOverrides(), CheckOptions(provider="cpu"))
    sentence = f"Whether 'plain' was trained on this base: it records {recorded}, and the export was made from {base}."
    assert report.skipped[0] == f"{sentence} Their shapes fit."
    assert "Whether 'plain' was trained on this base" in " ".join(render_check_text(report).split())
    assert make_plan(Request(recorded, request.adapters, "merge")).other_bases == {}


@pytest.mark.parametrize(
    ("recorded", "error"), [("/content/llama", InputRefused), ("nobody/no-such-base", EnvironmentUnusable)]
)
def test_a_recorded_base_that_is_not_there_is_told_from_one_that_was_named(recorded, error, adapters, own):
    folder = own(adapters["chat"])
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": recorded}))
    with pytest.raises(error) as refused:
        make_plan(Request(None, ((str(folder), None),), "merge"))
    assert refused.value.where == f"{file}: base_model_name_or_path = {recorded!r}"
    assert refused.value.next_step.startswith("name the base as the first argument")
