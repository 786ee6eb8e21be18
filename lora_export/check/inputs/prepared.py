"""All inputs of a check: what makes them, the rows by adapter, and their batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_export.artifact import Manifest
from lora_export.base.tasks import SEQ2SEQ, Task
from lora_export.check.inputs.amount import Amount, amount_of
from lora_export.check.inputs.batcher import Batcher
from lora_export.check.inputs.examples import Batch, Examples, as_pairs, built_in_examples
from lora_export.check.inputs.seq2seq_examples import Seq2SeqBatcher
from lora_export.check.inputs.tokenizers import SEEDED, SeededTokenizer, has_tokenizer, tokenizer_of
from lora_export.contract import ENCODER
from lora_export.errors import InputRefused
from lora_export.reading import read_json

AnyBatcher = Batcher | Seq2SeqBatcher
BATCH_SIZE = 8


@dataclass(frozen=True)
class Prepared:
    """The inputs of a check.

    Attributes:
        data: Examples by adapter name; the key None serves all others.
        batches: Theirs, and those of adapters with a tokenizer of their own.
    """

    batcher: AnyBatcher
    data: Mapping[str | None, Examples]
    batches: Mapping[str | None, Sequence[Batch]]


def prepare(
    folder: Path, manifest: Manifest, data: Mapping[str | None, Examples], *, keep_rows: bool = False
) -> Prepared:
    """The inputs to compare the export in `folder` on.

    Args:
        data: Examples that were asked for, by adapter name or None.
        keep_rows: Whether all of them are compared, however large the base is.

    Raises:
        InputRefused: Texts were asked for and nothing makes tokens of them.
    """
    amount = amount_of(folder, manifest)
    batcher, rows = _batcher(folder, manifest, amount), dict(data)
    if not batcher.takes_text:
        batcher = _batcher(folder, manifest, Amount())
        batches = {name: batcher.batches(examples, BATCH_SIZE) for name, examples in rows.items()}
        return Prepared(batcher, rows, {None: [batcher.noise(BATCH_SIZE)]} | batches)
    is_seeded = isinstance(batcher.tokenizer, SeededTokenizer)
    if is_seeded and data:
        raise InputRefused(
            "The export has no tokenizer, so the data's texts cannot be turned into inputs",
            where=str(folder),
            next_step="copy the tokenizer's files into this folder, or leave out --data for seeded token ids",
        )
    rows = {
        name: amount.described(examples) if keep_rows else amount.of_file(examples) for name, examples in rows.items()
    }
    usual = built_in_examples(amount.n_rows)
    if _is_of_pairs(folder, manifest):
        usual = as_pairs(usual)
    if is_seeded:
        usual = replace(usual, description=f"{len(usual.rows)} rows of {SEEDED}")
    rows.setdefault(None, amount.described(usual))
    batches = {name: batcher.batches(examples, BATCH_SIZE) for name, examples in rows.items()}
    for record in manifest.adapters:
        if record.preprocessing not in (None, ".") and has_tokenizer(folder / record.preprocessing):
            examples = rows.get(record.name, rows[None])
            batches[record.name] = _batcher(folder, manifest, amount, adapter=record.name).batches(examples, BATCH_SIZE)
    return Prepared(batcher, rows, batches)


def _is_of_pairs(folder: Path, manifest: Manifest) -> bool:
    """Whether the export scores pairs of texts, as rerankers do: a classifier of texts with one label."""
    if manifest.task != Task.TEXT_CLASSIFICATION:
        return False
    labels = read_json(folder / "config.json").get("id2label") or {}
    of_adapters = {record.n_labels for record in manifest.adapters if record.n_labels}
    return (of_adapters or {len(labels)}) == {1}


def _batcher(folder: Path, manifest: Manifest, amount: Amount, *, adapter: str | None = None) -> AnyBatcher:
    task = Task(manifest.task)
    graph = manifest.graphs[ENCODER] if task in SEQ2SEQ else manifest.contract
    takes_text = any(spec.name == "input_ids" for spec in graph.inputs)
    tokenizer = tokenizer_of(folder, manifest, adapter) if takes_text else None
    if task in SEQ2SEQ:
        return Seq2SeqBatcher(folder, manifest, tokenizer, n_tokens=amount.n_tokens)
    return Batcher(
        folder,
        task,
        manifest.contract,
        tokenizer=tokenizer,
        pad_token_id=manifest.pad_token_id,
        n_tokens=amount.n_tokens,
    )
