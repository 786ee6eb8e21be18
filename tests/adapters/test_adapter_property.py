"""Any LoRA configuration that PEFT accepts: what is read and folded is what PEFT merges, parameter by parameter."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import tiny
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from peft import LoraConfig, PeftModel

from lora_export.check.context import CheckOptions
from lora_export.errors import InputRefused
from lora_export.export.plan import Request, make_plan
from lora_export.export.resolve import resolve
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import ExportOptions, check, export

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PATTERNS = st.sampled_from((*LINEAR, "layers.0.self_attn.q_proj", r".*\.1\..*", "mlp.up_proj", "^model.layers.1.mlp.*"))


@st.composite
def lora_options(draw) -> dict:
    return {
        "r": draw(st.integers(1, 8)),
        "lora_alpha": draw(st.integers(1, 32)),
        "target_modules": draw(st.lists(st.sampled_from(LINEAR), min_size=1, unique=True)),
        "rank_pattern": draw(st.dictionaries(PATTERNS, st.integers(1, 12), max_size=3)),
        "alpha_pattern": draw(st.dictionaries(PATTERNS, st.integers(1, 64), max_size=3)),
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
        "layers_to_transform": draw(st.sampled_from([None, 0, [1], [0, 1]])),
        "init_lora_weights": draw(st.sampled_from([True, "gaussian", "orthogonal"])),
    }


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options=lora_options())
def test_whatever_the_options_the_fold_is_pefts_merge(options, bases):
    with tempfile.TemporaryDirectory() as folder:
        try:
            tiny.trained(bases["llama"], Path(folder) / "a", "LlamaForCausalLM", LoraConfig(**options))
        except ValueError:  # PEFT's own limits, such as an odd rank with an orthogonal start
            return
        model = transformers.AutoModelForCausalLM.from_pretrained(bases["llama"])
        request = Request(str(bases["llama"]), ((str(Path(folder) / "a"), None),), "merge", task="text-generation")
        try:
            expected = PeftModel.from_pretrained(model, Path(folder) / "a").merge_and_unload().state_dict()
        except RuntimeError:  # PEFT saves patterns sorted by name, and where two match, another one is first then
            refused = "PEFT cannot load the adapter onto this base|do not have the ranks that its config says"
            with pytest.raises(InputRefused, match=refused):
                resolve(make_plan(request))
            return
        source = resolve(make_plan(request)).parameters
        for name, tensor in expected.items():
            torch.testing.assert_close(source.parameter(name, torch.float32), tensor, atol=2e-5, rtol=1e-5, msg=name)


def test_a_resized_vocabulary_is_merged_at_its_new_size(bases, tmp_path):
    """PEFT saves the whole embedding beside the pairs; the export has the rows that training added."""
    model = transformers.LlamaForCausalLM.from_pretrained(bases["llama"])
    before = model.config.vocab_size
    model.resize_token_embeddings(before + 6, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[before:] = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    trained = tiny.get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    trained.save_pretrained(tmp_path / "grown", save_embedding_layers=True)
    request = Request(str(bases["llama"]), ((str(tmp_path / "grown"), None),), "merge", task="text-generation")
    resolved = resolve(make_plan(request))
    merged = trained.merge_and_unload().state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
        torch.testing.assert_close(resolved.parameters.parameter(name, torch.float32), merged[name], atol=1e-5, rtol=0)
    export(request, ExportOptions(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == before + 6
    report, _ = check(tmp_path / "out", SourceOverrides(), CheckOptions(n_rows=8))
    assert {case.name: case.failures for case in report.cases if case.failures} == {}


@pytest.mark.parametrize("mode", ["merge", "dynamic"])
def test_multihead_attention_is_merged_and_its_module_named_where_not_served(mode, tmp_path):
    """Siglip pools with torch's nn.MultiheadAttention, whose projections PEFT adapts inside the module."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipVisionConfig(**sizes, image_size=8, patch_size=4)
    tiny.randomize(transformers.SiglipVisionModel(config), "siglip").save_pretrained(tmp_path / "base")
    options = {"r": 2, "target_modules": r".*\.attention", "exclude_modules": r".*encoder.*"}
    tiny.trained(tmp_path / "base", tmp_path / "a", "SiglipVisionModel", LoraConfig(**options))
    request = Request(str(tmp_path / "base"), ((str(tmp_path / "a"), None),), mode, task="feature-extraction")
    if mode == "dynamic":
        with pytest.raises(InputRefused, match="adapts layers whose adapter is no pair") as refused:
            resolve(make_plan(request))
        assert "head.attention (MultiheadAttention)" in refused.value.where
        return
    source = resolve(make_plan(request)).parameters
    base = transformers.SiglipVisionModel.from_pretrained(tmp_path / "base")
    merged = PeftModel.from_pretrained(base, tmp_path / "a").merge_and_unload().state_dict()
    for name in (name for name in merged if "head.attention" in name):
        torch.testing.assert_close(source.parameter(name, torch.float32), merged[name], atol=1e-5, rtol=0, msg=name)
