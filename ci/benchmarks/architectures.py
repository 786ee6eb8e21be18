"""Tiny random bases of the architectures that are exported, and how PEFT adapts each; `matrix.py` runs them.

Weights are random and scaled up, so that attention is not uniform and an adapter has an effect. Windows are
8 tokens long, shorter than the texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import torch
import transformers

from lora_export.check.inputs.examples import built_in_examples

SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
TEXT = SMALL | {"vocab_size": 600, "max_position_embeddings": 512}
GROUPED = TEXT | {"num_key_value_heads": 2}
WINDOWED = GROUPED | {"head_dim": 16, "sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# CLIP reads the embedding of the text's end, or of the highest token where eos_token_id is 2.
CLIP_TEXT = TEXT | {"max_position_embeddings": 77, "projection_dim": 32, "eos_token_id": 2}
CLIP_IMAGE = SMALL | {"image_size": 32, "patch_size": 8, "projection_dim": 32}
ALTERNATING = WINDOWED | {"layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Architecture:
    """A tiny base and its usual adapter.

    Attributes:
        config: The Transformers config class, with its `fields`.
        auto: The auto class.
        task_type: PEFT's task type, where it has one.
        targets: The usual adapter's targets.
        packed: Projections that hold several in one weight (query, key and value), where the architecture has any.
        head: What an adapter may bring whole (modules_to_save).
        task: `--task`, where nothing else tells it.
        refused: What the refusal of this base says; None for a base that is exported.
    """

    config: str
    auto: str
    task_type: str | None
    targets: str | list[str]
    fields: dict = field(default_factory=dict)
    packed: tuple[str, ...] = ()
    head: str | None = None
    task: str | None = None
    refused: str | None = None


LM, SEQUENCE, TOKEN = "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def _decoder(config: str, targets: str | list[str], fields: dict, packed: tuple[str, ...] = ()) -> Architecture:
    return Architecture(config, LM, "CAUSAL_LM", targets, fields, packed, head="lm_head")


def _classifier(config: str, targets: list[str], fields: dict) -> Architecture:
    return Architecture(config, SEQUENCE, "SEQ_CLS", targets, fields, head="classifier")


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
    "BERT": _classifier("BertConfig", ["query", "dense"], TEXT),
    "BERT, features": Architecture(
        "BertConfig", "AutoModel", "FEATURE_EXTRACTION", ["query", "value"], TEXT, head="pooler"
    ),
    "RoBERTa": _classifier("RobertaConfig", ["query", "dense"], TEXT | {"type_vocab_size": 1}),
    "DistilBERT": _classifier(
        "DistilBertConfig",
        ["q_lin", "lin1"],
        {"dim": 64, "n_heads": 4, "n_layers": 2, "hidden_dim": 128, "vocab_size": 600},
    ),
    "ModernBERT": Architecture(
        "ModernBertConfig",
        TOKEN,
        "TOKEN_CLS",
        ["Wqkv", "Wi"],
        TEXT | {"pad_token_id": 0, "local_attention": 8},
        packed=("Wqkv", "Wi"),
        head="classifier",
    ),
    "ALBERT": _classifier("AlbertConfig", ["query", "value"], TEXT | {"embedding_size": 32}),
    "DeBERTa-v2": _classifier("DebertaV2Config", ["query_proj", "value_proj"], TEXT),
    "GPT-2": _decoder(
        "GPT2Config",
        ["c_attn", "c_fc"],
        {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 600},
        packed=("c_attn",),
    ),
    "OPT": _decoder(
        "OPTConfig",
        "all-linear",
        {"hidden_size": 64, "word_embed_proj_dim": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
        | {"ffn_dim": 128, "vocab_size": 600},
    ),
    "GPT-NeoX": _decoder("GPTNeoXConfig", "all-linear", TEXT, packed=("query_key_value",)),
    "Llama": _decoder("LlamaConfig", "all-linear", GROUPED | {"tie_word_embeddings": True}),
    "Llama, classifier": Architecture(
        "LlamaConfig", SEQUENCE, "SEQ_CLS", ["q_proj", "v_proj"], GROUPED | {"pad_token_id": 0}, head="score"
    ),
    "Qwen2": _decoder("Qwen2Config", "all-linear", GROUPED),
    "Qwen3": _decoder("Qwen3Config", "all-linear", GROUPED | {"head_dim": 16}),
    "Mistral": _decoder("MistralConfig", "all-linear", WINDOWED),
    "Gemma 2": _decoder("Gemma2Config", "all-linear", ALTERNATING),
    "Gemma 3": _decoder("Gemma3TextConfig", "all-linear", ALTERNATING),
    "Phi-3": _decoder("Phi3Config", "all-linear", GROUPED | {"pad_token_id": 0}, packed=("qkv_proj", "gate_up_proj")),
    "Mixtral": _decoder("MixtralConfig", ATTENTION, GROUPED | {"num_local_experts": 4}),
    "Qwen2-MoE": _decoder(
        "Qwen2MoeConfig",
        [*ATTENTION, "gate_proj", "up_proj", "down_proj", "shared_expert_gate"],
        GROUPED | EXPERTS | {"shared_expert_intermediate_size": 48},
    ),
    "Qwen3-MoE": _decoder("Qwen3MoeConfig", ATTENTION, GROUPED | EXPERTS | {"head_dim": 16}),
    "ViT": Architecture(
        "ViTConfig",
        "AutoModelForImageClassification",
        None,
        ["q_proj", "v_proj"],
        SMALL | {"image_size": 32, "patch_size": 8},
        head="classifier",
    ),
    "CLIP": Architecture(
        "CLIPConfig",
        "AutoModelForZeroShotImageClassification",
        None,
        ["q_proj", "v_proj", "fc1", "text_projection", "visual_projection"],
        {"text_config": CLIP_TEXT, "vision_config": CLIP_IMAGE, "projection_dim": 32},
    ),
    "CLIP, text": Architecture(
        "CLIPTextConfig", "CLIPTextModelWithProjection", None, ["q_proj", "v_proj"], CLIP_TEXT, head="text_projection"
    ),
    "CLIP, images": Architecture(
        "CLIPVisionConfig",
        "CLIPVisionModelWithProjection",
        None,
        ["q_proj", "v_proj"],
        CLIP_IMAGE,
        head="visual_projection",
    ),
    "T5": Architecture("T5Config", SEQ2SEQ, "SEQ_2_SEQ_LM", ["q", "v", "wo"], T5),
    "T5 1.1": Architecture(
        "T5Config",
        SEQ2SEQ,
        "SEQ_2_SEQ_LM",
        ["q", "v", "wi_0"],
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "BART": Architecture(
        "BartConfig", SEQ2SEQ, "SEQ_2_SEQ_LM", ["q_proj", "v_proj", "fc1"], BART | {"max_position_embeddings": 512}
    ),
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
IMAGES = ("ViTConfig", "CLIPVisionConfig")


def save_tokenizer(folder: Path, *, longest: int) -> None:
    """Train and save a byte-pair tokenizer of 600 entries on the built-in examples."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([row.text_or_file for row in built_in_examples(64).rows], trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, **names)
    saved.save_pretrained(folder)


def make_base(architecture: Architecture, folder: Path) -> Path:
    """Save the base of `architecture` to `folder`, as Transformers does, with a tokenizer where it reads text."""
    torch.manual_seed(0)
    config = getattr(transformers, architecture.config)(**{"num_labels": 3} | architecture.fields)
    auto = getattr(transformers, architecture.auto)
    base = (auto.from_config(config) if architecture.auto.startswith("Auto") else auto(config)).eval()
    if architecture.fields.get("tie_word_embeddings") is False and architecture.auto == SEQ2SEQ:
        # T5's configuration ties the head all the same; a checkpoint with another head does not.
        base.lm_head.weight = torch.nn.Parameter(torch.randn_like(base.lm_head.weight) / 8)
    for parameter in base.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    base.save_pretrained(folder)
    if architecture.config not in IMAGES:
        save_tokenizer(folder, longest=getattr(config.get_text_config(), "max_position_embeddings", 512))
    if base.main_input_name == "pixel_values" and not hasattr(config, "image_size"):
        (folder / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 64}}', encoding="utf-8")
    return folder
