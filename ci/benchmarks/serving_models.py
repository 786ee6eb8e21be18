"""The exports that ci/benchmarks/serving.py serves, and what each adapter of them answers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from random_models import LlamaShape, write_adapter, write_llama

from lora_export.export.plan import Request
from lora_export.pipeline import ExportOptions, export
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.generate import generate
from lora_export.runtime.seq2seq_session import Seq2SeqSession

N_ADAPTERS = 16
_RANKS = (2, 4, 8, 16)
# So that every adapter says something else.
_STRENGTH, _STRENGTH_ON_T5 = 4.0, 40.0
_SHAPE = LlamaShape(4, 1024, 2816, heads=16, kv_heads=16, head_dim=64, vocab=32000, dtype="float32")
N_TOKENS = 16
_OF_T5_DECODER = ("SelfAttention", "EncDecAttention")
_TEXTS = (
    "Open a socket, bind it to an address and listen for connections.",
    "A lock is released when its owner ends.",
    "Compute the mean and the standard deviation of the samples, and draw a histogram of them with ten bins.",
    "Return a new list.",
)
_PROMPTS = tuple(tuple(range(100 * n, 100 * n + 8 + 5 * n)) for n in range(1, 5))


@dataclass(frozen=True)
class Served:
    """An export with its adapters, what they are asked and what each says alone.

    Attributes:
        questions: Texts, or token ids.
        answers: By adapter and number of the question: an embedding, or the tokens of a greedy text.
    """

    name: str
    folder: Path
    adapters: tuple[str, ...]
    questions: Sequence[str | tuple[int, ...]]
    answers: Mapping[tuple[str, int], np.ndarray | list[int]] = field(default_factory=dict)


def encoder(minilm: Path, work: Path) -> Served:
    """MiniLM for feature extraction; ranks 2 to 16 on query and value."""
    config = json.loads((minilm / "config.json").read_text(encoding="utf-8"))
    size = config["hidden_size"]
    linears = {
        f"encoder.layer.{layer}.attention.self.{module}": (size, size)
        for layer in range(config["num_hidden_layers"])
        for module in ("query", "value")
    }
    folder = _exported(minilm, work / "encoder", linears, "FEATURE_EXTRACTION", "feature-extraction")
    return _with_embeddings(Served("encoder", folder, _names(), _TEXTS))


def decoder(work: Path) -> Served:
    """A random Llama shape; ranks 2 to 16 on all seven linears. Its tokens are words that are their numbers."""
    base = write_llama(work / "decoder" / "base", _SHAPE)
    _write_tokenizer(base)
    folder = _exported(base, work / "decoder", _SHAPE.linears(), "CAUSAL_LM", "text-generation")
    return _with_texts(Served("decoder", folder, _names(), _PROMPTS))


def encoder_decoder(work: Path) -> Served:
    """T5's small shape with random weights; ranks 2 to 16 on query and value. Its tokens are words that are numbers."""
    base = work / "encoder-decoder" / "base"
    if not (base / "model.safetensors").exists():
        import torch
        import transformers

        torch.manual_seed(0)
        sizes = {"d_model": 512, "d_ff": 2048, "d_kv": 64, "num_layers": 6, "num_heads": 8}
        config = transformers.T5Config(vocab_size=_SHAPE.vocab, decoder_start_token_id=0, **sizes)
        model = transformers.T5ForConditionalGeneration(config)
        model.shared.weight.data.mul_(0.02)  # its head is tied to it: else the last token is said again and again
        model.save_pretrained(base)
    _write_tokenizer(base)
    attention = [("encoder", layer, 0, "SelfAttention") for layer in range(6)]
    attention += [("decoder", layer, at, name) for layer in range(6) for at, name in enumerate(_OF_T5_DECODER)]
    linears = {
        f"{stack}.block.{layer}.layer.{at}.{name}.{projection}": (512, 512)
        for stack, layer, at, name in attention
        for projection in ("q", "v")
    }
    folder = _exported(base, work / "encoder-decoder", linears, "SEQ_2_SEQ_LM", "text2text-generation", _STRENGTH_ON_T5)
    served = Served("encoder-decoder", folder, _names(), _PROMPTS)
    session, answers = Seq2SeqSession(folder, "cpu"), {}
    for index, prompt in enumerate(served.questions):
        ids = np.array([prompt])
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        for name in served.adapters:
            answers[name, index] = session.generate(inputs, name, max_new_tokens=N_TOKENS, eos_ids=())[0]
    return replace(served, answers=answers)


def _names() -> tuple[str, ...]:
    return tuple(f"task{index:02}" for index in range(N_ADAPTERS))


def _exported(
    base: Path,
    work: Path,
    linears: Mapping[str, tuple[int, int]],
    peft_type: str,
    task: str,
    strength: float = _STRENGTH,
) -> Path:
    adapters = [
        write_adapter(
            work / name, linears, rank=_RANKS[index % 4], base=base, task_type=peft_type, seed=index, strength=strength
        )
        for index, name in enumerate(_names())
    ]
    request = Request(str(base), tuple((str(path), None) for path in adapters), "dynamic", task, "float32", "cpu")
    export(request, ExportOptions(work / "served", overwrite=True))
    return work / "served"


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"t{index}": index for index in range(_SHAPE.vocab)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")


def _with_embeddings(served: Served) -> Served:
    """The mean over each text's tokens, of length 1, from a session that runs one row at a time."""
    from tokenizers import Tokenizer

    session = AdapterSession(served.folder, "cpu")
    tokenizer = Tokenizer.from_file(str(served.folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    answers = {}
    for index, text in enumerate(served.questions):
        ids = np.array([tokenizer.encode(text).ids])
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        for name in served.adapters:
            mean = session.run(inputs, name)["last_hidden_state"][0].mean(axis=0)
            answers[name, index] = mean / np.linalg.norm(mean)
    return replace(served, answers=answers)


def _with_texts(served: Served) -> Served:
    session = AdapterSession(served.folder, "cpu")
    answers = {
        (name, index): generate(session, [prompt], name, max_new_tokens=N_TOKENS)[0]
        for index, prompt in enumerate(served.questions)
        for name in served.adapters
    }
    return replace(served, answers=answers)


def nearest_of_others(served: Served) -> float:
    """How far the nearest other adapter's answer is: the largest difference of an embedding's numbers; of texts, the
    tokens that differ."""
    found = []
    for index in range(len(served.questions)):
        answers = [served.answers[name, index] for name in served.adapters]
        pairs = [(one, two) for place, one in enumerate(answers) for two in answers[place + 1 :]]
        found += [distance(one, two) for one, two in pairs]
    return min(found)


def distance(one: np.ndarray | list[int], two: np.ndarray | list[int]) -> float:
    """Of two answers: the largest difference of their numbers, or how many tokens differ."""
    if isinstance(one, list):
        return float(sum(a != b for a, b in zip(one, two, strict=False)) + abs(len(one) - len(two)))
    return float(np.abs(one - two).max())
