"""Train a tiny Llama-shaped decoder from scratch, and two LoRA adapters that change its style."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    ATTENTION,
    FEED_FORWARD,
    Build,
    DecoderAdapter,
    out_folder,
    print_table,
    progress,
    read_json,
    write_json,
)

if TYPE_CHECKING:
    import torch
    from styles import Split, Texts
    from transformers import PreTrainedTokenizerFast

PROMPTS = ("Return a new list", "This module provides a", "Compute the mean of")
NEW_TOKENS = 40
TOKENS_PER_ROW = 128
ROWS = 4
BASE_STEPS = 1000
SEED = 11
README = """# tiny-llama

A Llama-shaped decoder of about 1.4 million parameters, trained from scratch by `samples/tiny_decoder.py` in about a
minute and a half of CPU time, to export something real and small. It writes what looks like docstrings, no more.

It learned from the first sentences of docstrings of Python's standard library (PSF licence), SciPy, scikit-learn and
PyTorch (BSD licences), and from the licences of the Python packages installed where it was trained. Some of that text
was put in capitals.
"""


ADAPTERS = (
    DecoderAdapter("shout", 8, 16, (*ATTENTION, *FEED_FORWARD), 150, 5e-3),
    DecoderAdapter("legal", 16, 32, ("q_proj", "v_proj", *FEED_FORWARD), 150, 5e-3),
)


def main() -> None:
    """Build what is missing or stale, then print losses and what the decoder writes."""
    build = Build(
        name="tiny_decoder",
        out=out_folder(__doc__ or ""),
        outputs=("tiny-llama", *(f"decoder-adapters/{a.name}" for a in ADAPTERS), "decoder.json"),
        sources=("tiny_decoder.py", "styles.py", "corpus.py", "training.py", "common.py"),
        packages=("torch", "transformers", "peft", "tokenizers", "scikit-learn", "scipy"),
    )
    if not build.is_current():
        build.run(lambda fresh: make(fresh, build.out))
    show(read_json(build.out / "decoder.json"))


def make(fresh: Path, out: Path) -> None:
    """Write base, adapters and results to `fresh`, which becomes `out`."""
    import styles
    import training

    progress("collecting text")
    texts = styles.collect(SEED)
    training.prepare(SEED)
    tokenizer = styles.train_tokenizer([*texts.base.train, *texts.shout.train])
    base = fresh / "tiny-llama"
    results = {
        "prompts": list(PROMPTS),
        "new_tokens": NEW_TOKENS,
        "base": train_base(tokenizer, texts, base),
        "adapters": {a.name: train_adapter(a, tokenizer, texts, base, fresh, out) for a in ADAPTERS},
    }
    write_json(fresh / "decoder.json", results)


def train_base(tokenizer: PreTrainedTokenizerFast, texts: Texts, folder: Path) -> dict[str, Any]:
    """Train the decoder and save it with its tokenizer; returns what decoder.json says of it."""
    import training
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    progress(f"base: {model.num_parameters():,} parameters, {len(texts.base.train):,} texts")
    before = mean_loss(model, tokenizer, texts.base)
    started = time.monotonic()
    training.fit(model, batches(tokenizer, texts.base.train, BASE_STEPS), training.adamw(model, 3e-3, 3e-3))
    seconds = time.monotonic() - started
    model.generation_config.update(do_sample=False, max_new_tokens=NEW_TOKENS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(README, encoding="utf-8")
    return {
        "parameters": model.num_parameters(),
        **outcome(model, tokenizer, texts.base, before, seconds),
    }


def train_adapter(
    adapter: DecoderAdapter, tokenizer: PreTrainedTokenizerFast, texts: Texts, base: Path, fresh: Path, out: Path
) -> dict[str, Any]:
    """Train one adapter and save it; returns what decoder.json says of it.

    The results are those of the adapter as saved, loaded again on the base as saved.
    """
    import training
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    split: Split = getattr(texts, adapter.name)
    progress(f"{adapter.name}: {len(split.train):,} texts")
    training.prepare(SEED)
    options = LoraConfig(**adapter.lora_options())
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), options)
    before = mean_loss(model, tokenizer, split)
    started = time.monotonic()
    rows = batches(tokenizer, split.train, adapter.steps)
    training.fit(model, rows, training.adamw(model, adapter.learning_rate, adapter.learning_rate))
    seconds = time.monotonic() - started
    model.peft_config["default"].base_model_name_or_path = str(out / base.name)
    folder = fresh / "decoder-adapters" / adapter.name
    model.save_pretrained(folder, save_embedding_layers=False)
    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    return {"rank": adapter.r, "alpha": adapter.lora_alpha, **outcome(saved, tokenizer, split, before, seconds)}


def batches(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """Batches of full rows of tokens, the texts one behind the other, as many as `steps` and no more.

    Texts are used again, in another order, where they are too few.
    """
    import torch

    shuffler = random.Random(SEED)
    encoded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(texts))["input_ids"]]
    needed = steps * ROWS * TOKENS_PER_ROW
    stream: list[int] = []
    while len(stream) < needed:
        for ids in shuffler.sample(encoded, len(encoded)):
            stream += ids
    rows = torch.tensor(stream[:needed]).view(steps, ROWS, TOKENS_PER_ROW)
    return [{"input_ids": part, "labels": part} for part in rows]


def mean_loss(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, split: Split) -> float:
    """The mean loss in nats per token on some held-out rows."""
    import torch

    parts = batches(tokenizer, split.heldout, steps=12)
    with torch.inference_mode():
        return round(sum(model.eval()(**part).loss.item() for part in parts) / len(parts), 3)


def outcome(
    model: Any, tokenizer: PreTrainedTokenizerFast, split: Split, loss_before: float, seconds: float
) -> dict[str, Any]:
    """Held-out losses, training time and greedy continuations of the prompts."""
    import torch

    continuations = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.inference_mode():
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0]
        continuations[prompt] = tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {
        "loss_before": loss_before,
        "loss_after": mean_loss(model, tokenizer, split),
        "seconds": round(seconds, 1),
        "continuations": continuations,
    }


def show(results: dict[str, Any]) -> None:
    """Print losses, then what base and adapters write."""
    named = {"base": results["base"], **results["adapters"]}
    rows = [
        (name, f"{r['loss_before']:.2f}", f"{r['loss_after']:.2f}", f"{r['seconds']:.0f}") for name, r in named.items()
    ]
    print_table(("model", "loss before", "after", "seconds"), rows)
    for prompt in results["prompts"]:
        print(f"\n{prompt} ...")
        print_table(("", ""), [(f"  {name}", r["continuations"][prompt]) for name, r in named.items()])


if __name__ == "__main__":
    main()
