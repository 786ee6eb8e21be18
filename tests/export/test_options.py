"""Every option of LoRA and every tuner of PEFT: merged, served, or refused, each proven by `check` on a tiny base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import peft
import pytest
import tiny
from peft import LoraConfig
from references import decoder_feeds, error, inputs_for

from lora_export.check.context import CheckOptions
from lora_export.errors import InputRefused
from lora_export.export.plan import Request
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import ExportOptions, check, export
from lora_export.runtime.adapter_session import AdapterSession

ALL, QUERY_VALUE = "all-linear", ["q_proj", "v_proj"]
LLAMA, GPT2 = ("llama", "LlamaForCausalLM", "text-generation"), ("gpt2", "GPT2LMHeadModel", "text-generation")
CLASSIFIER = ("classifier", "BertForSequenceClassification", "text-classification")
VIT = ("vit", "ViTForImageClassification", "image-classification")


@dataclass(frozen=True)
class Trained:
    """An adapter and what becomes of it: "" where it is exported, else a part of the refusal."""

    on: tuple[str, str, str]
    config: Callable[[], peft.PeftConfig]
    merge: str = ""
    dynamic: str = ""
    rank: float | None = None


def lora(on: tuple[str, str, str], merge: str = "", dynamic: str = "", **options: object) -> Trained:
    options = {"r": 4, "target_modules": ["query", "value"] if on is CLASSIFIER else QUERY_VALUE} | options
    return Trained(on, lambda: LoraConfig(**options), merge, dynamic)


def tuner(make: Callable[..., peft.PeftConfig], merge: str = "", dynamic: str = "", **options: object) -> Trained:
    options = {"target_modules": QUERY_VALUE} | options
    # Enough for any matrix of the tiny base: the conversion is exact.
    return Trained(LLAMA, lambda: make(**options), merge, dynamic, rank=0.9999 if not dynamic else None)


NO_INPUTS, OTHER = "a dynamic graph has no inputs for that", "`dynamic` does not export adapters of this tuner"
INVOKED = {"alora_invocation_tokens": [70, 71], "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "dora": lora(LLAMA, use_dora=True, target_modules=ALL, use_rslora=True, rank_pattern={"down_proj": 2}),
    "dora-flattened": lora(GPT2, use_dora=True, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "dora-gemm": lora(CLASSIFIER, use_dora=True, target_modules=["query", "pooler.dense", "classifier"]),
    "dora-embedding": lora(LLAMA, use_dora=True, target_modules=["embed_tokens"], dynamic=NO_INPUTS),
    "embedding": lora(LLAMA, target_modules=["embed_tokens", "q_proj"]),
    "embedding-positions": lora(CLASSIFIER, target_modules=["word_embeddings", "position_embeddings"]),
    "head-and-embedding": lora(LLAMA, target_modules=["embed_tokens", "lm_head"]),
    "tied-head-and-embedding": lora(LLAMA, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True),
    "tokens": lora(LLAMA, trainable_token_indices=[5, 9, 70]),
    "tokens-tied": lora(LLAMA, trainable_token_indices={"embed_tokens": [5, 9]}, ensure_weight_tying=True),
    "tokens-classifier": lora(CLASSIFIER, trainable_token_indices={"word_embeddings": [1, 40, 41]}),
    "bias-all": lora(CLASSIFIER, bias="all"),
    "bias-lora-only": lora(CLASSIFIER, bias="lora_only"),
    "bias-flattened": lora(GPT2, bias="lora_only", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "lora-bias": lora(CLASSIFIER, lora_bias=True),
    "lora-bias-added": lora(LLAMA, lora_bias=True, merge="adds a bias to modules that have none"),
    "dora-with-bias": lora(CLASSIFIER, use_dora=True, bias="all"),
    "saved-embedding": lora(LLAMA, modules_to_save=["embed_tokens"], dynamic="replaces modules that are not Linear"),
    "saved-norm": lora(LLAMA, modules_to_save=["norm"], dynamic="replaces modules that are not Linear"),
    "pissa": lora(LLAMA, init_lora_weights="pissa", target_modules=ALL),
    "pissa-conv1d": lora(GPT2, init_lora_weights="pissa", target_modules=["c_attn"], fan_in_fan_out=True),
    "olora": lora(LLAMA, init_lora_weights="olora"),
    "mica": lora(LLAMA, init_lora_weights="mica"),
    "velora": lora(LLAMA, velora_config=peft.VeloraConfig(num_groups=2)),
    "block-diagonal": lora(
        LLAMA, use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2)
    ),
    "kasa": lora(LLAMA, kasa_config=peft.KasaConfig(), dynamic="kasa_config"),
    "convolution": lora(VIT, target_modules=["projection", "q_proj"]),
    "convolution-biases": lora(VIT, target_modules=["projection", "fc1"], bias="all", lora_bias=True),
    "convolution-dora": lora(VIT, target_modules=["projection"], use_dora=True, dynamic=NO_INPUTS),
    "activated": lora(LLAMA, **INVOKED, target_modules=[*QUERY_VALUE, "lm_head"], merge="alora_invocation_tokens"),
    "activated-flattened": lora(GPT2, **INVOKED, target_modules=["c_attn", "c_fc"], merge="alora_invocation_tokens"),
    "activated-bias": lora(
        LLAMA, **INVOKED, lora_bias=True, merge="alora_invocation_tokens", dynamic="active for some tokens only"
    ),
    "activated-classifier": lora(
        CLASSIFIER, alora_invocation_tokens=[7], merge="alora_invocation_tokens", dynamic="is for decoders"
    ),
    "adalora": tuner(peft.AdaLoraConfig, total_step=10, init_r=6, target_r=4),
    "trainable-tokens": tuner(peft.TrainableTokensConfig, target_modules=["embed_tokens"], token_indices=[5, 9]),
    "loha": tuner(peft.LoHaConfig, r=4),
    "lokr": tuner(peft.LoKrConfig, r=4),
    "vera": tuner(peft.VeraConfig, target_modules=["q_proj"], r=8),
    "randlora": tuner(peft.RandLoraConfig, target_modules=["q_proj"], r=8, randlora_alpha=2),
    "vblora": tuner(peft.VBLoRAConfig, r=4, num_vectors=16, vector_length=8, topk=2),
    "gralora": tuner(peft.GraloraConfig, r=8),
    "delora": tuner(peft.DeloraConfig, r=4),
    "miss": tuner(peft.MissConfig, r=4),
    "c3a": tuner(peft.C3AConfig, block_size=8),
    "tinylora": tuner(peft.TinyLoraConfig),
    "unilora": tuner(peft.UniLoraConfig, r=4),
    "fourierft": tuner(peft.FourierFTConfig, n_frequency=50),
    "waveft": tuner(peft.WaveFTConfig, n_frequency=50),
    "oft": tuner(peft.OFTConfig, r=0, oft_block_size=8, dynamic=OTHER),
    "boft": tuner(peft.BOFTConfig, boft_block_size=8, dynamic=OTHER),
    "hra": tuner(peft.HRAConfig, r=4, dynamic=OTHER),
    "ia3": tuner(peft.IA3Config, target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"], dynamic=OTHER),
    "hira": tuner(peft.HiraConfig, r=4, dynamic=OTHER),
    "road": tuner(peft.RoadConfig, group_size=16, dynamic=OTHER),
    "glora": tuner(peft.GloraConfig, r=4, dynamic=OTHER),
    "shira": tuner(peft.ShiraConfig, r=4, dynamic=OTHER),
    "pvera": tuner(peft.PveraConfig, target_modules=["q_proj"], r=8, dynamic=OTHER),
    "deft": tuner(peft.DeftConfig, dynamic=OTHER),
    "peanut": tuner(peft.PeanutConfig, dynamic=OTHER),
    "supertuning": tuner(peft.SupertuningConfig, dynamic=OTHER),
    "ln-tuning": tuner(peft.LNTuningConfig, target_modules=["norm"], dynamic=OTHER),
    "beft": tuner(peft.BeftConfig, merge="adds a bias to modules that have none", dynamic=OTHER),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(bases, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("trained")

    def get(name: str):
        folder, spec = root / name, ADAPTERS[name]
        if not folder.exists():
            tiny.trained(bases[spec.on[0]], folder, spec.on[1], spec.config())
        return folder

    return get


@pytest.mark.parametrize("mode", ["merge", "dynamic"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_exported_exactly_or_refused_by_name(name, mode, trained, bases, tmp_path) -> None:
    spec = ADAPTERS[name]
    rank = spec.rank if mode == "dynamic" else None
    adapter = (str(trained(name)), name)
    request = Request(str(bases[spec.on[0]]), (adapter,), mode, task=spec.on[2], convert_rank=rank)
    refusal = spec.merge if mode == "merge" else spec.dynamic
    if refusal:
        with pytest.raises(InputRefused) as refused:
            export(request, ExportOptions(tmp_path / "out"))
        assert refusal in str(refused.value)
        assert refused.value.next_step
        return
    manifest = export(request, ExportOptions(tmp_path / "out"))
    report, _ = check(tmp_path / "out", SourceOverrides(), CheckOptions(n_rows=8))
    assert {case.name: case.failures for case in report.cases if case.failures} == {}
    assert next(case for case in report.cases if case.group == "adapter").largest_effect > 0.01
    assert all(error < 0.02 for error in manifest.adapters[0].conversion_errors.values())


MIXTURES = {
    "llama": ("dora", "embedding", "tokens", "pissa", "tied-head-and-embedding", "lora-bias-added", "activated"),
    "vit": ("convolution", "convolution-biases"),
    "classifier": ("bias-all", "lora-bias", "dora-gemm", "tokens-classifier", "embedding-positions"),
}


@pytest.mark.parametrize("base", MIXTURES)
def test_adapters_of_all_kinds_share_a_batch(base, trained, bases, adapters, tmp_path) -> None:
    """`check` runs a batch with another one in each row against each row alone, and all of them in turn."""
    names = MIXTURES[base]
    chosen = [(str(trained(name)), name) for name in names]
    plain = {"classifier": "shades", "llama": "chat"}
    chosen += [(str(adapters[plain[base]]), plain[base])] if base in plain else []
    task = ADAPTERS[names[0]].on[2]
    export(Request(str(bases[base]), tuple(chosen), "dynamic", task=task), ExportOptions(tmp_path / "out"))
    report, _ = check(tmp_path / "out", SourceOverrides(), CheckOptions(n_rows=8))
    assert {case.name: case.failures for case in report.cases if case.failures} == {}
    assert any(case.group == "rows" for case in report.cases)


@pytest.mark.parametrize(
    ("base", "blend"),
    [
        ("llama", {"dora": 0.5, "tokens": 0.7, "embedding": -0.4}),
        ("llama", {"dora": 0.3, "pissa": 0.9}),
        ("classifier", {"bias-all": 0.5, "dora-gemm": 0.25, "lora-bias": 1.5}),
    ],
)
def test_a_blend_at_run_time_is_the_weighted_merge(base, blend, trained, bases, tmp_path) -> None:
    """Both are `W0 + Σ w·(W_k − W0)`: of gains, of biases, of tokens and of pairs."""
    task = ADAPTERS[next(iter(blend))].on[2]
    chosen = tuple((str(trained(name)), name) for name in blend)
    merge = Request(str(bases[base]), chosen, "merge", task=task, weights=tuple(blend.values()))
    export(merge, ExportOptions(tmp_path / "merged"))
    export(Request(str(bases[base]), chosen, "dynamic", task=task), ExportOptions(tmp_path / "dynamic"))
    report, _ = check(tmp_path / "merged", SourceOverrides(), CheckOptions(n_rows=8))
    assert {case.name: case.failures for case in report.cases if case.failures} == {}, "differs from PEFT's sum"
    merged, dynamic = AdapterSession(tmp_path / "merged"), AdapterSession(tmp_path / "dynamic")
    feeds = decoder_feeds(inputs_for(base), merged.manifest.contract)
    expected = merged.run(feeds)["logits"]
    assert error(dynamic.run(feeds, blend)["logits"], expected) < 1e-5
    assert error(dynamic.run(feeds)["logits"], expected) > 0.01, "the blend does nothing"
