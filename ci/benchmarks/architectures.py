"""Which architectures export exactly: a tiny random base of each with two adapters, merged and dynamic, checked.

    python ci/benchmarks/architectures.py                 # all, a few minutes; writes results/architectures.json
    python ci/benchmarks/architectures.py llama vit       # some; with --record they join the results

Weights are random and scaled up, so that attention is not uniform and an adapter has an effect. Windows are
8 tokens long, shorter than the texts.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import click
import peft
import tokenizers
import torch
import transformers

from lora_export.artifact import versions
from lora_export.pipeline import ExportOptions, check, export
from lora_export.plan import Request
from lora_export.sources import SourceOverrides
from lora_export.verify.examples import built_in_examples

RESULTS = Path(__file__).parent / "results" / "architectures.json"
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
TEXT = SMALL | {"vocab_size": 600, "max_position_embeddings": 512}
GROUPED = TEXT | {"num_key_value_heads": 2}
WINDOWED = GROUPED | {"head_dim": 16, "sliding_window": 8}
ALTERNATING = WINDOWED | {"layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Architecture:
    """A tiny base: the Transformers config and auto class, PEFT's task type and targets, and the config's fields."""

    config: str
    auto: str
    task_type: str | None
    targets: str | list[str]
    fields: dict = field(default_factory=dict)


LM, SEQUENCE, TOKEN = "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
SEQ2SEQ = "AutoModelForSeq2SeqLM"
T5 = {"vocab_size": 600, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4} | {
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
    "initializer_factor": 1 / 3,  # its attention has no scale of its own: three times as much would be too sharp
}  # fmt: skip
BART = {"vocab_size": 600, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4} | {
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
CATALOGUE = {
    "BERT": Architecture("BertConfig", SEQUENCE, "SEQ_CLS", ["query", "dense"], TEXT),
    "BERT, features": Architecture("BertConfig", "AutoModel", "FEATURE_EXTRACTION", ["query", "value"], TEXT),
    "RoBERTa": Architecture("RobertaConfig", SEQUENCE, "SEQ_CLS", ["query", "dense"], TEXT | {"type_vocab_size": 1}),
    "DistilBERT": Architecture(
        "DistilBertConfig",
        SEQUENCE,
        "SEQ_CLS",
        ["q_lin", "lin1"],
        {"dim": 64, "n_heads": 4, "n_layers": 2, "hidden_dim": 128, "vocab_size": 600},
    ),
    "ModernBERT": Architecture(
        "ModernBertConfig", TOKEN, "TOKEN_CLS", ["Wqkv", "Wi"], TEXT | {"pad_token_id": 0, "local_attention": 8}
    ),
    "ALBERT": Architecture("AlbertConfig", SEQUENCE, "SEQ_CLS", ["query", "value"], TEXT | {"embedding_size": 32}),
    "DeBERTa-v2": Architecture("DebertaV2Config", SEQUENCE, "SEQ_CLS", ["query_proj", "value_proj"], TEXT),
    "GPT-2": Architecture(
        "GPT2Config", LM, "CAUSAL_LM", ["c_attn", "c_fc"], {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 600}
    ),
    "OPT": Architecture(
        "OPTConfig",
        LM,
        "CAUSAL_LM",
        "all-linear",
        {"hidden_size": 64, "word_embed_proj_dim": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
        | {"ffn_dim": 128, "vocab_size": 600},
    ),
    "GPT-NeoX": Architecture("GPTNeoXConfig", LM, "CAUSAL_LM", "all-linear", TEXT),
    "Llama": Architecture("LlamaConfig", LM, "CAUSAL_LM", "all-linear", GROUPED | {"tie_word_embeddings": True}),
    "Llama, classifier": Architecture(
        "LlamaConfig", SEQUENCE, "SEQ_CLS", ["q_proj", "v_proj"], GROUPED | {"pad_token_id": 0}
    ),
    "Qwen2": Architecture("Qwen2Config", LM, "CAUSAL_LM", "all-linear", GROUPED),
    "Qwen3": Architecture("Qwen3Config", LM, "CAUSAL_LM", "all-linear", GROUPED | {"head_dim": 16}),
    "Mistral": Architecture("MistralConfig", LM, "CAUSAL_LM", "all-linear", WINDOWED),
    "Gemma 2": Architecture("Gemma2Config", LM, "CAUSAL_LM", "all-linear", ALTERNATING),
    "Gemma 3": Architecture("Gemma3TextConfig", LM, "CAUSAL_LM", "all-linear", ALTERNATING),
    "Phi-3": Architecture("Phi3Config", LM, "CAUSAL_LM", "all-linear", GROUPED | {"pad_token_id": 0}),
    "ViT": Architecture(
        "ViTConfig",
        "AutoModelForImageClassification",
        None,
        ["q_proj", "v_proj"],
        SMALL | {"image_size": 32, "patch_size": 8},
    ),
    "T5": Architecture("T5Config", SEQ2SEQ, "SEQ_2_SEQ_LM", "all-linear", T5),
    "T5 1.1": Architecture(
        "T5Config",
        SEQ2SEQ,
        "SEQ_2_SEQ_LM",
        ["q", "v", "wi_0"],
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "BART": Architecture("BartConfig", SEQ2SEQ, "SEQ_2_SEQ_LM", "all-linear", BART | {"max_position_embeddings": 512}),
    "Whisper": Architecture(
        "WhisperConfig",
        "AutoModelForSpeechSeq2Seq",
        None,
        ["q_proj", "v_proj"],
        BART
        | {"num_mel_bins": 8, "max_source_positions": 100, "max_target_positions": 64, "decoder_start_token_id": 1}
        | {"suppress_tokens": None, "begin_suppress_tokens": None},
    ),
}


def save_tokenizer(folder: Path) -> None:
    """Train and save a byte-pair tokenizer of 600 entries on the built-in examples."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([row.source for row in built_in_examples(64).rows], trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def make(architecture: Architecture, folder: Path) -> tuple[Path, list[Path]]:
    """The base and two adapters (ranks 3 and 6) of `architecture`, saved under `folder`."""
    torch.manual_seed(0)
    config = getattr(transformers, architecture.config)(num_labels=3, **architecture.fields)
    auto = getattr(transformers, architecture.auto)
    base = auto.from_config(config).eval()
    if architecture.fields.get("tie_word_embeddings") is False and architecture.auto == SEQ2SEQ:
        # T5's configuration ties the head all the same; a checkpoint with another head does not.
        base.lm_head.weight = torch.nn.Parameter(torch.randn_like(base.lm_head.weight) / 8)
    for parameter in base.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    base.save_pretrained(folder / "base")
    if architecture.config != "ViTConfig":
        save_tokenizer(folder / "base")
    adapters = []
    for rank in (3, 6):
        options = peft.LoraConfig(
            r=rank,
            target_modules=architecture.targets,
            task_type=architecture.task_type,
            modules_to_save=["classifier"] if architecture.config == "ViTConfig" else None,
        )
        model = peft.get_peft_model(auto.from_pretrained(folder / "base"), options)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapters.append(folder / f"rank-{rank}")
        model.save_pretrained(adapters[-1])
    return folder / "base", adapters


def examine(architecture: Architecture, folder: Path) -> dict[str, dict]:
    """Export merged and dynamic and check both; per export: verdict, largest error, smallest effect, failures."""
    base, adapters = make(architecture, folder)
    task = "image-classification" if architecture.config == "ViTConfig" else None
    found = {}
    for mode in ("merge", "dynamic"):
        chosen = tuple((str(path), None) for path in (adapters[:1] if mode == "merge" else adapters))
        export(Request(str(base), chosen, mode, task, None, "cpu"), ExportOptions(folder / mode))
        merged = folder / "merge" if mode == "dynamic" else None
        report, _ = check(folder / mode, SourceOverrides(), provider="cpu", merged=merged)
        found[mode] = {
            "verdict": report.verdict,
            "cases": len(report.cases),
            "largest_error": max(case.error for case in report.cases if case.error == case.error),
            "smallest_effect": min(case.effect for case in report.cases if case.effect is not None),
            "failures": [f"{case.name}: {text}" for case in report.cases for text in case.failures],
        }
    return found


@click.command()
@click.argument("names", nargs=-1)
@click.option("--record", is_flag=True, help="Put NAMES' results among those recorded with the same versions.")
def main(names: tuple[str, ...], record: bool) -> None:
    """Examine the architectures whose names contain one of NAMES (all without one)."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    wanted = [key for key in CATALOGUE if not names or any(name.lower() in key.lower() for name in names)]
    results = {}
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = examine(CATALOGUE[name], Path(folder))
        for mode, row in results[name].items():
            numbers = f"error {row['largest_error']:.1e}, effect {row['smallest_effect']:.1e}, {row['cases']} cases"
            click.echo(f"{name:<18} {mode:<8} {row['verdict']:<5} {numbers} {'; '.join(row['failures'])}")
    if record and names:
        recorded = json.loads(RESULTS.read_text(encoding="utf-8"))
        if recorded["versions"] != versions():
            raise click.ClickException(f"{RESULTS} was recorded with other versions; run all")
        both = recorded["results"] | results
        results = {name: both[name] for name in CATALOGUE if name in both}
    if record or not names:
        RESULTS.write_text(json.dumps({"versions": versions(), "results": results}, indent=2) + "\n", encoding="utf-8")
        click.echo(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
