"""Exports that are fused for CUDA are what was trained: in float32 a CPU runs them too, with the pairs that modules share."""

from __future__ import annotations

from dataclasses import replace

import pytest
from catalogue import EXPORTS, export_to

from lora_export.artifact import read_manifest
from lora_export.check.context import CheckOptions
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import check

SHARED = {
    "llama-dynamic": "self_attn.q_proj+k_proj+v_proj",
    "bert-dynamic": "attention.self.query+key+value",
    "t5-dynamic": "EncDecAttention.k+v",
}


@pytest.mark.parametrize("name", SHARED)
def test_it_passes_check(name, bases, adapters, tmp_path):
    export_to(tmp_path / "out", replace(EXPORTS[name], provider="cuda"), bases, adapters)
    contracts = read_manifest(tmp_path / "out").graphs.values()
    shared = {entry.module for contract in contracts for entry in contract.adapter_inputs if entry.parts}
    assert any(module.endswith(SHARED[name]) for module in shared), shared
    report = check(tmp_path / "out", SourceOverrides(), CheckOptions(provider="cpu"))[0]
    assert report.verdict == "pass", [case.name for case in report.cases if not case.passed]
