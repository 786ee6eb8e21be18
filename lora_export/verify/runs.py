"""The two sides of a comparison, the export and its reference, over the same batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        paths = [self.request.adapters[name] for name in names]
        return Reference(self.task, self.request.base, paths, self.session.manifest.dtype, n_labels)


def run_export(session: AnySession, batches: Sequence[Batch], adapters: RowAdapter | Sequence[RowAdapter]) -> Outputs:
    """The export's main output over `batches`; a decoder starts from an empty cache."""
    is_seq2seq = isinstance(session, Seq2SeqSession)
    name = "logits" if is_seq2seq else session.manifest.contract.outputs[0].name
    values = []
    for batch in batches:
        inputs = dict(batch.inputs)
        if not is_seq2seq:
            inputs |= empty_cache(session, len(next(iter(inputs.values()))))
        values.append(session.run(inputs, adapters, outputs=[name])[name].astype(np.float32))
    return Outputs(name, tuple(values), tuple(b.real for b in batches), tuple(b.labels for b in batches))


def run_reference(reference: Reference, batches: Sequence[Batch]) -> Outputs:
    """The reference's main output over `batches`."""
    found = [reference.run(batch.inputs) for batch in batches]
    name = next(iter(found[0]))
    values = tuple(outputs[name] for outputs in found)
    return Outputs(name, values, tuple(b.real for b in batches), tuple(b.labels for b in batches))
