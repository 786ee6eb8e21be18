"""Tiny random bases, adapters and a tokenizer, written to disk the way Transformers and PEFT write real ones.

Weights are scaled so that every layer, head and adapter changes the output by far more than rounding does.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
VOCABULARY = len(SPECIALS) + 256
POSITIONS = 160


def _generator(*names: object) -> torch.Generator:
    names = (*names, *filter(None, [os.environ.get("LORA_EXPORT_TEST_SEED")]))
    return torch.Generator().manual_seed(zlib.crc32(repr(names).encode()))


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: str) -> torch.nn.Module:
    """Weights of unit gain, norms near one, biases that matter; the same for the same `seed`."""
    generator = _generator(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            fan_in = parameter.shape[0] if "transformer.h." in name else math.prod(parameter.shape[1:])
            if name.endswith(".q.weight"):  # T5 has the scale of attention in here
                fan_in *= model.config.d_kv
            is_table = "embedding" in name or "wte" in name or "wpe" in name
            parameter.copy_(noise * (0.5 if is_table else 1 / math.sqrt(fan_in)))
        elif name.endswith("weight"):  # of a norm
            parameter.copy_(1 + 0.1 * noise)
        else:
            parameter.copy_(0.2 * noise)
    return model


def save_tokenizer(folder: Path, *, classifier: bool) -> None:
    """A byte-level tokenizer without merges: every text has tokens of its own, one a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if classifier:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)


def _save(model: transformers.PreTrainedModel, folder: Path, *, classifier: bool = False, text: bool = True) -> Path:
    randomize(model, f"{type(model).__name__}").save_pretrained(folder)
    if text:
        save_tokenizer(folder, classifier=classifier)
    return folder


def llama(folder: Path) -> Path:
    """Two layers, four query heads on two key heads, an output head tied to the embedding."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _save(transformers.LlamaForCausalLM(config), folder)


def gpt2(folder: Path) -> Path:
    """Two layers of Conv1D, whose weights are stored `[in, out]` and whose inputs are flattened."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    )
    return _save(transformers.GPT2LMHeadModel(config), folder)


def bert_config(**changes: object) -> transformers.BertConfig:
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": POSITIONS,
    }
    return transformers.BertConfig(**(fields | changes))


def bert(folder: Path) -> Path:
    """An encoder without a head: embeddings, two layers, a pooler."""
    return _save(transformers.BertModel(bert_config()), folder, classifier=True)


def bert_classifier(folder: Path) -> Path:
    """The same architecture with a trained head of three classes."""
    config = bert_config(id2label={0: "red", 1: "green", 2: "blue"}, label2id={"red": 0, "green": 1, "blue": 2})
    return _save(transformers.BertForSequenceClassification(config), folder, classifier=True)


def bert_tagger(folder: Path) -> Path:
    config = bert_config(num_labels=4)
    return _save(transformers.BertForTokenClassification(config), folder, classifier=True)


def albert(folder: Path) -> Path:
    """One set of weights called by both layers."""
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=POSITIONS,
    )
    return _save(transformers.AlbertModel(config), folder, classifier=True)


def vit(folder: Path) -> Path:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    _save(transformers.ViTForImageClassification(config), folder, text=False)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def clip(folder: Path) -> Path:
    """A text and an image encoder of different widths, and their projections to 16 numbers."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 96,
        "bos_token_id": 1,
        "eos_token_id": 1,  # [CLS], the first token: any that every text has
        "pad_token_id": 0,
    }
    image = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "image_size": 16,
        "patch_size": 8,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=16)
    _save(transformers.CLIPModel(config), folder, classifier=True)
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    return folder


def t5(folder: Path, *, untied: bool = False, layers: tuple[int, int] = (1, 2)) -> Path:
    """One encoder and two decoder layers, relative positions, a head tied to the embedding and scaled.

    Args:
        untied: As T5 1.1 and FLAN-T5: a head of its own, not scaled, and gated activations.
        layers: Of the encoder and of the decoder.
    """
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=12,
        d_ff=48,
        num_layers=layers[0],
        num_decoder_layers=layers[1],
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        decoder_start_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        **({"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if untied else {}),
    )
    model = transformers.T5ForConditionalGeneration(config)
    if untied:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCABULARY, 32))
    return _save(model, folder, classifier=True)


def bart(folder: Path, *, layers: tuple[int, int] = (1, 2)) -> Path:
    """One encoder layer and two decoder layers of other widths, learned positions, a bias on the final logits."""
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=layers[0],
        decoder_layers=layers[1],
        encoder_attention_heads=4,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=40,
        max_position_embeddings=POSITIONS,
        scale_embedding=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    model = transformers.BartForConditionalGeneration(config)
    model.final_logits_bias.copy_(0.5 * torch.randn(model.final_logits_bias.shape, generator=_generator("bias")))
    return _save(model, folder, classifier=True)


def whisper(folder: Path, *, layers: tuple[int, int] = (1, 2)) -> Path:
    """One encoder layer behind the convolutions, two decoder layers, 50 positions (100 frames) of 8 bands."""
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=layers[0],
        decoder_layers=layers[1],
        encoder_attention_heads=4,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=40,
        max_source_positions=50,
        max_target_positions=POSITIONS,
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    _save(transformers.WhisperForConditionalGeneration(config), folder)
    # 100 frames of 160 samples at 16 kHz.
    transformers.WhisperFeatureExtractor(
        feature_size=8, sampling_rate=16000, hop_length=160, chunk_length=1, n_fft=400
    ).save_pretrained(folder)
    return folder


def in_dtype(source: Path, folder: Path, dtype: torch.dtype) -> Path:
    """A copy of the base in `source`, its weights stored in `dtype`."""
    architecture = transformers.AutoConfig.from_pretrained(source).architectures[0]
    getattr(transformers, architecture).from_pretrained(source, dtype=dtype).save_pretrained(folder)
    save_tokenizer(folder, classifier="Bert" in architecture)
    return folder


def trained(base: Path, folder: Path, model_class: str, config: PeftConfig, n_labels: int | None = None) -> Path:
    """An adapter of any tuner on `base`, moved from its start by noise as training would, saved by PEFT.

    Args:
        model_class: Name of the Transformers class to train on.
        n_labels: Size of the head, where it is not the base's.
    """
    sizes: Mapping = {} if n_labels is None else {"num_labels": n_labels, "ignore_mismatched_sizes": True}
    torch.manual_seed(0)  # some tuners draw their frozen parts
    model = get_peft_model(getattr(transformers, model_class).from_pretrained(base, **sizes), config)
    generator = _generator(folder.name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def adapter(
    base: Path,
    folder: Path,
    model_class: str,
    *,
    n_labels: int | None = None,
    strength: float = 0.5,
    edit: Callable[[torch.nn.Module], None] = lambda model: None,
    save_embedding_layers: bool | str = "auto",
    **options: object,
) -> Path:
    """A LoRA adapter on `base` with random A and B (a fresh one has B = 0 and does nothing), saved by PEFT.

    Args:
        model_class: Name of the Transformers class to train on, e.g. "BertForSequenceClassification".
        n_labels: Size of the head, where it is not the base's.
        strength: Standard deviation of B's elements times the scale's inverse: how much the adapter changes.
        edit: Called with the PEFT model before it is saved.
        save_embedding_layers: False to leave out the whole output head, which PEFT saves beside a pair on it.
        options: Those of `LoraConfig`.
    """
    sizes: Mapping = {} if n_labels is None else {"num_labels": n_labels, "ignore_mismatched_sizes": True}
    model = getattr(transformers, model_class).from_pretrained(base, **sizes)
    peft_model = get_peft_model(model, LoraConfig(**options))
    generator = _generator(folder.name)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_A" in name or "lora_embedding_A" in name:
                parameter.copy_(noise / math.sqrt(parameter.shape[1]))
            elif "lora_B" in name or "lora_embedding_B" in name:
                parameter.copy_(noise * strength / math.sqrt(parameter.shape[1]))
            elif "modules_to_save" in name:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.2 * noise)
    edit(peft_model)
    peft_model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return folder
