"""The two sides of a comparison, the export and its reference, over the same batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_export.base.tasks import Task
from lora_export.runtime.adapter_session import AdapterSession, RowAdapter
from lora_export.runtime.generate import empty_cache
from lora_export.runtime.seq2seq_session import Seq2SeqSession
from lora_export.verify.compare import Outputs
from lora_export.verify.examples import Batch, Examples
from lora_export.verify.reference import Reference
from lora_export.verify.tolerances import Tolerances
from lora_export.verify.trained import TrainedAdapter

AnySession = AdapterSession | Seq2SeqSession


@dataclass(frozen=True)
class CheckRequest:
    """What to check, everything located.

    Attributes:
        base: The base's folder.
        adapters: PEFT folders by adapter name, all that the export holds.
        data: Examples by adapter name; the key None serves all others.
        merged: A merged export of one of the adapters, to compare a dynamic export with.
    """

    folder: Path
    base: Path
    adapters: Mapping[str, Path]
    provider: str | None
    data: Mapping[str | None, Examples]
    merged: Path | None = None


@dataclass(frozen=True)
class Bench:
    """One export with its session and inputs, as the cases below use it."""

    request: CheckRequest
    session: AnySession
    task: Task
    gates: Tolerances
    own: Mapping[str | None, Sequence[Batch]]
    mixed: Batch

    def run(self, batches: Sequence[Batch], adapters: RowAdapter | Sequence[RowAdapter]) -> Outputs:
        return run_export(self.session, batches, adapters)

    def reference(self, names: Sequence[str], n_labels: int | None) -> Reference:
        manifest = self.session.manifest
        records = map(manifest.adapter, names)
        adapters = [
            TrainedAdapter(self.request.adapters[r.name], r.weight, r.convert_rank, r.residual_base) for r in records
        ]
        return Reference(self.task, self.request.base, adapters, manifest.dtype, n_labels)


# What the rows of a batch are compared by: the first of these that a model gives; of a dual encoder, two embeddings.
_MAIN_OUTPUTS = (
    ("logits",),
    ("text_embeds", "image_embeds"),
    ("text_embeds",),
    ("image_embeds",),
    ("last_hidden_state",),
)


def main_outputs(names: Iterable[str]) -> tuple[str, ...]:
    """The main output among `names`, or the two of a dual encoder."""
    given = tuple(names)
    return next((group for group in _MAIN_OUTPUTS if set(group) <= set(given)), given[:1])


def run_export(session: AnySession, batches: Sequence[Batch], adapters: RowAdapter | Sequence[RowAdapter]) -> Outputs:
    """The export's main output over `batches`; a decoder starts from an empty cache."""
    is_seq2seq = isinstance(session, Seq2SeqSession)
    names = ("logits",) if is_seq2seq else main_outputs(spec.name for spec in session.manifest.contract.outputs)
    found = []
    for batch in batches:
        inputs = dict(batch.inputs)
        if not is_seq2seq:
            inputs |= empty_cache(session, len(next(iter(inputs.values()))))
        found.append(session.run(inputs, adapters, outputs=names))
    return _joined(names, found, batches)


def run_reference(reference: Reference, batches: Sequence[Batch]) -> Outputs:
    """The reference's main output over `batches`."""
    found = [reference.run(batch.inputs) for batch in batches]
    return _joined(main_outputs(found[0]), found, batches)


def _joined(names: Sequence[str], found: Sequence[Mapping[str, np.ndarray]], batches: Sequence[Batch]) -> Outputs:
    values = tuple(np.concatenate([run[name].astype(np.float32) for name in names], axis=-1) for run in found)
    return Outputs(" and ".join(names), values, tuple(b.real for b in batches), tuple(b.labels for b in batches))
