"""--dry-run and the export name the same files and the same bytes, over tasks."""

from __future__ import annotations

import pytest
from catalogue import EXPORTS

from lora_export.artifact import read_manifest
from lora_export.export.describe import describe_plan
from lora_export.export.plan import Request

_PAGE = 4096  # what each tensor's place in a data file is rounded up to


@pytest.mark.parametrize(
    "name",
    ["llama-dynamic", "llama-voice", "bert-dynamic", "classifier-merged", "vit-merged", "clip-dynamic",
     "t5-head-dynamic", "t5-voice-merged", "whisper-dynamic"],
)  # fmt: skip
def test_a_dry_run_names_the_files_and_bytes_of_the_export(name, exports, bases, adapters, tmp_path):
    spec, out = EXPORTS[name], exports[name]
    chosen = tuple((str(adapters[adapter]), adapter) for adapter in spec.adapters)
    request = Request(str(bases[spec.base]), chosen, spec.mode, dtype=spec.dtype, provider=spec.provider)
    write = describe_plan(request, tmp_path / "out")["write"]
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert set(write["files"]) == found == {*read_manifest(out).files, "lora_export.json"}
    assert len(write["files"]) == len(found), "none twice"
    n_bytes = sum(path.stat().st_size for path in out.glob("*.data"))
    n_tensors = 120  # more than any of these models has
    assert write["weight_bytes"] <= n_bytes <= write["weight_bytes"] + _PAGE * n_tensors
