"""Train all-MiniLM-L6-v2 in full, every weight of it, on the first task of text_classifiers.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from common import Build, out_folder, print_table, progress, read_json, write_json
from text_classifiers import BASE_PACKAGE, SEED, copy_base, encode, make_batches

if TYPE_CHECKING:
    from tasks import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RATE, HEAD_RATE = 2e-4, 1e-2
BATCH = 32


def main() -> None:
    """Build what is missing or stale, then print how good the fine-tune is."""
    build = Build(
        name="full_fine_tune",
        out=out_folder(__doc__ or ""),
        outputs=("topic-full", "topic-base", "full.json"),
        sources=("full_fine_tune.py", "text_classifiers.py", "tasks.py", "corpus.py", "training.py", "common.py"),
        packages=("torch", "transformers", "scikit-learn", "scipy", "numpy", BASE_PACKAGE),
    )
    if not build.is_current():
        build.run(make)
    found = read_json(build.out / "full.json")
    rows = [["topic-full", str(len(found["classes"])), f"{found['accuracy_pytorch']:.1%}", f"{found['seconds']:.0f} s"]]
    print_table(["fine-tune", "classes", "accuracy", "training"], rows)


def make(fresh: Path) -> None:
    """Write base, fine-tune and result to `fresh`."""
    import training
    from tasks import TASKS
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    copy_base(fresh / "topic-base")
    data = TASKS[0].dataset()
    progress(f"{TASKS[0].name}, all weights: {len(data.train)} texts in {len(data.labels)} classes")
    started = time.monotonic()
    training.prepare(SEED, threads=2)
    tokenizer = AutoTokenizer.from_pretrained(fresh / "topic-base")
    model = AutoModelForSequenceClassification.from_pretrained(
        fresh / "topic-base",
        id2label=dict(enumerate(data.labels)),
        label2id={label: number for number, label in enumerate(data.labels)},
    )
    training.fit(model, make_batches(tokenizer, data), training.adamw(model, RATE, HEAD_RATE))
    model.save_pretrained(fresh / "topic-full")
    tokenizer.save_pretrained(fresh / "topic-full")
    result = {"classes": list(data.labels), "accuracy_pytorch": evaluate(model, tokenizer, data)}
    write_json(fresh / "full.json", result | {"seconds": round(time.monotonic() - started, 1)})


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Dataset) -> float:
    """The accuracy, 0 to 1, on the held-out texts."""
    import torch
    import training

    expected = torch.tensor([data.labels.index(example.label) for example in data.heldout])
    texts = [example.text for example in data.heldout]
    with torch.inference_mode():
        parts = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        found = torch.cat([model(**encode(tokenizer, part)).logits.argmax(-1) for part in parts])
    return training.accuracy(found, expected)


if __name__ == "__main__":
    main()
