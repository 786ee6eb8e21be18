"""Adapters whose start changed the base in a way that cannot be repeated, exported from the base that it left."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from references import decoder_feeds, error, inputs_for, outputs_of

from lora_export.check.context import CheckOptions
from lora_export.errors import InputRefused
from lora_export.export.plan import Request
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import AddOptions, ExportOptions, add_adapter, check, export
from lora_export.runtime.adapter_session import AdapterSession

INIT = "pissa_niter_4"  # a randomized SVD: another one each time


@pytest.fixture(scope="module")
def trained(bases, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    """(the base that the start left, the adapter, what PEFT's trained model says of the usual inputs)."""
    root = tmp_path_factory.mktemp("residual")
    base = transformers.LlamaForCausalLM.from_pretrained(bases["llama"])
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=INIT)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    said = outputs_of(model, inputs_for("llama"))
    model.save_pretrained(root / "adapter")
    model.unload().save_pretrained(root / "base")
    tiny.save_tokenizer(root / "base", classifier=False)
    return root / "base", root / "adapter", said


@pytest.mark.parametrize("mode", ["merge", "dynamic"])
def test_it_is_what_was_trained(mode: str, trained, tmp_path: Path) -> None:
    base, adapter, said = trained
    export(Request(str(base), ((str(adapter), "a"),), mode, residual_base=True), ExportOptions(tmp_path / "out"))
    session = AdapterSession(tmp_path / "out", "cpu")
    feeds = decoder_feeds(inputs_for("llama"), session.manifest.contract)
    found = session.run(feeds, "a" if mode == "dynamic" else None)["logits"]
    real = feeds["attention_mask"].astype(bool)
    assert error(found[real], said[real]) < 1e-5
    report, _ = check(tmp_path / "out", SourceOverrides(), CheckOptions(n_rows=8))
    assert {case.name: case.failures for case in report.cases if case.failures} == {}


def test_it_is_added_to_a_dynamic_export(trained, tmp_path: Path) -> None:
    base, adapter, _ = trained
    request = Request(str(base), ((str(adapter), "a"),), "dynamic", residual_base=True)
    export(request, ExportOptions(tmp_path / "out"))
    with pytest.raises(InputRefused, match="start cannot be repeated"):
        add_adapter(tmp_path / "out", [(str(adapter), "b")], SourceOverrides())
    manifest = add_adapter(
        tmp_path / "out", [(str(adapter), "b")], SourceOverrides(), options=AddOptions(residual_base=True)
    )
    assert [record.residual_base for record in manifest.adapters] == [True, True]


def test_on_another_base_the_way_out_is_named(trained, bases, tmp_path: Path) -> None:
    with pytest.raises(InputRefused) as refused:
        export(Request(str(bases["llama"]), ((str(trained[1]), "a"),), "merge"), ExportOptions(tmp_path / "out"))
    assert refused.value.found == f"init_lora_weights = {INIT!r}"
    assert "--residual-base" in refused.value.next_step
