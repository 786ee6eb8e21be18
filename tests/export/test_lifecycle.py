"""Adapters that come, are replaced and go: the graph stays, and so does all that is not theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from command_line import call, fails
from references import error, inputs_for, outputs_of, unmerged

from lora_export.artifact import read_manifest, sha256_of
from lora_export.errors import InputRefused, UsageProblem
from lora_export.export.lifecycle import AddOptions
from lora_export.export.plan import Request
from lora_export.integrity.verify import verify
from lora_export.pipeline import ExportOptions, add_adapter, export, remove_adapters
from lora_export.runtime.adapter_session import AdapterSession

BERT = "BertForSequenceClassification"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def retrained(bases, tmp_path) -> Path:
    """Another training of `plain`, with a licence and a tokenizer of its own."""
    options = {"r": 5, "lora_alpha": 5, "target_modules": ["query"]}
    folder = tiny.adapter(bases["classifier"], tmp_path / "plain", BERT, **options)
    (folder / "LICENSE.md").write_text("terms")
    tiny.save_tokenizer(folder, classifier=False)
    return folder


def test_an_adapter_is_replaced_in_its_place(exports, own, bases, retrained):
    out = own(exports["classifier-dynamic"])
    before, names = contents(out), [record.name for record in read_manifest(out).adapters]
    with pytest.raises(InputRefused, match="already has an adapter 'plain'") as refused:
        add_adapter(out, [(str(retrained), None)])
    assert "--replace" in refused.value.next_step and contents(out) == before
    manifest = add_adapter(out, [(str(retrained), None)], options=AddOptions(replace=True))
    assert [record.name for record in manifest.adapters] == names
    assert manifest.adapter("plain").source.files["adapter_config.json"] == sha256_of(retrained / "adapter_config.json")
    new = contents(out)
    assert set(new) - set(before) == {
        "LICENSE.plain.md", "adapters/plain/tokenizer.json", "adapters/plain/tokenizer_config.json",
    }  # fmt: skip
    assert {name for name in before if new[name] != before[name]} == {"adapters/plain.onnx_adapter", "lora_export.json"}
    assert verify(out).passed
    inputs = inputs_for("classifier")
    expected = outputs_of(unmerged(bases["classifier"], BERT, [retrained]), inputs)
    assert error(AdapterSession(out, "cpu").run(inputs, "plain")["logits"], expected) < 1e-5


def test_an_adapter_is_removed_with_all_that_is_its_own(exports, own, retrained):
    out = own(exports["classifier-dynamic"])
    add_adapter(out, [(str(retrained), "late")])
    with_late = contents(out)
    assert "LICENSE.late.md" in with_late and "adapters/late/tokenizer.json" in with_late
    text = call("remove", out, "late").output
    assert "adapters/shades.onnx_adapter" in text and "late" not in text
    assert contents(out) == contents(exports["classifier-dynamic"]), "byte for byte as before"
    assert not (out / "adapters/late").exists() and verify(out).passed
    remove_adapters(out, ["plain", "shades"])
    assert read_manifest(out).adapters == () and AdapterSession(out, "cpu").adapters == ()


def test_what_is_not_there_is_not_removed(exports, own):
    out = own(exports["classifier-dynamic"])
    before = contents(out)
    with pytest.raises(UsageProblem, match="has no adapter 'plian'") as refused:
        remove_adapters(out, ["shades", "plian"])
    assert refused.value.next_step == "did you mean 'plain'?"
    assert contents(out) == before
    text = fails(3, "remove", exports["bert-merged"], "kind")
    assert "has its adapters in its weights, and none can be taken out" in text and "lora-export dynamic" in text


def test_licences_of_names_that_begin_alike_are_told_apart(exports, own, retrained):
    out = own(exports["classifier-dynamic"])
    add_adapter(out, [(str(retrained), "late"), (str(retrained), "late.v2")])
    remove_adapters(out, ["late"])
    assert (out / "LICENSE.late.v2.md").is_file() and not (out / "LICENSE.late.md").exists()


def test_all_linear_serves_every_module_but_the_head(bases, adapters, tmp_path):
    request = Request(str(bases["llama"]), (), "dynamic")
    manifest = export(request, ExportOptions(tmp_path / "out", targets=("all-linear",)))
    assert len(manifest.contract.modules) == 14 and "lm_head" not in manifest.contract.modules
    assert add_adapter(tmp_path / "out", [(str(adapters["code"]), None)]).adapter("code").files
    with pytest.raises(InputRefused, match="needs modules that the graph has no inputs for") as refused:
        add_adapter(tmp_path / "out", [(str(adapters["voice"]), None)])
    assert refused.value.where == "lm_head"
    assert refused.value.next_step == "export again with `lora-export dynamic`: list this adapter among the others"
    with pytest.raises(UsageProblem, match="names no linear module") as unknown:
        export(request, ExportOptions(tmp_path / "no", targets=("all_linear",)))
    assert unknown.value.expected.startswith("all-linear, or one of down_proj")


def test_targets_are_proposed_where_they_would_serve(exports, own, adapters):
    with pytest.raises(InputRefused) as refused:
        add_adapter(own(exports["classifier-targets"]), [(str(adapters["plain"]), None)])
    assert refused.value.next_step.endswith("or name its modules with --targets (all-linear for all)")
