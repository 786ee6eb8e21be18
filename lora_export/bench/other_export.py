"""Another export, timed beside the first. A bench asks the same of it as of a `Peer`, another tool's graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_export.artifact import ExportKind, Manifest, read_manifest
from lora_export.bench.budget import AGAINST
from lora_export.bench.latency import Candidate
from lora_export.bench.memory_job import MemoryJob
from lora_export.contract import GraphContract
from lora_export.environment import subject
from lora_export.errors import InputRefused
from lora_export.reading import CONFIG, model_settings, size_in
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.seq2seq_session import Seq2SeqSession, open_export
from lora_export.verdict import Subject


@dataclass(frozen=True)
class OtherExport:
    """Another export.

    Attributes:
        is_of_base: Whether it is mostly timed for what it makes of the base, without an adapter.
    """

    folder: Path
    manifest: Manifest
    is_of_base = False

    @property
    def graphs(self) -> Mapping[str, GraphContract]:
        return self.manifest.graphs

    @property
    def vocabulary(self) -> int:
        """Tokens that it knows; 2 where it takes none."""
        return vocabulary_of(self.folder)

    def candidate(self, served: Sequence[str]) -> Candidate:
        """It with the first of the adapters `served` that it has, else its first; with none if it has none, or if
        none is served."""
        names = [record.name for record in self.manifest.adapters]
        if self.manifest.kind is ExportKind.MERGED:
            what = f"{' + '.join(names) or 'no adapter'} folded into the weights"
            return Candidate(AGAINST, f"{self.folder}: {what}", AGAINST)
        if not served or not names:
            return Candidate(AGAINST, f"{self.folder}: every adapter input at its default", AGAINST)
        name = next((name for name in served if name in names), names[0])
        return Candidate(AGAINST, f"{self.folder}: {name} for every row", AGAINST, name)

    def open(self, provider: str) -> AdapterSession | Seq2SeqSession:
        return open_export(self.folder, provider, stop_spinning=True)

    def memory_job(self, provider: str, vocabulary: int, runs: Sequence) -> MemoryJob:
        return MemoryJob(str(self.folder), provider, vocabulary, runs)

    def subject(self, task: str) -> Subject:
        """What it is, in a report; `task` is its own too."""
        return subject(self.folder, self.manifest)

    def notes(self, provider: str) -> list[str]:
        """What a reader of its times must know."""
        return fused_for_another("The other export's graph", self.manifest, provider)


def read_other_export(path: Path, folder: Path, manifest: Manifest) -> OtherExport:
    """The export in `path`, to be timed beside the one of `manifest` in `folder`.

    Raises:
        InputRefused: The two do not run the same task on the same inputs.
    """
    other = read_manifest(path)
    where, step = f"{folder} and {path}", "compare exports of the same task and architecture"
    if manifest.task != other.task:
        tasks = {"expected": str(manifest.task), "found": str(other.task)}
        raise InputRefused("The two exports do different tasks", where=where, **tasks, next_step=step)
    expected, found = _inputs(manifest), _inputs(other)
    if expected != found:
        raise InputRefused(
            "The two exports take different inputs", where=where, expected=expected, found=found, next_step=step
        )
    return OtherExport(path, other)


def vocabulary_of(folder: Path) -> int:
    """Tokens that the export in `folder` knows; 2 where its config names no number."""
    return size_in(model_settings(folder), "vocab_size", where=folder / CONFIG) or 2


def fused_for_another(what: str, manifest: Manifest, provider: str) -> list[str]:
    """A sentence where the graph of `manifest` is fused for another provider than it ran on."""
    if manifest.provider == provider:
        return []
    return [f"{what} is fused for {manifest.provider} and ran on {provider}: not its best speed."]


def _inputs(manifest: Manifest) -> str:
    names = {graph: sorted(spec.name for spec in contract.inputs) for graph, contract in manifest.graphs.items()}
    return "; ".join(f"{graph}: {', '.join(found)}" for graph, found in names.items())
