"""Packs one adapter after another for a finished graph, and compares each with PEFT; all that stays is loaded once."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

from lora_export.adapters.initialization import changes_base
from lora_export.artifact import AdapterRecord, Manifest, SourceRecord, read_manifest
from lora_export.base.sentence_folder import sentence_root
from lora_export.base.tasks import Task
from lora_export.carried import copy_carried
from lora_export.check.context import run_export, run_reference
from lora_export.check.inputs.examples import Batch, read_examples, require_classes, spread
from lora_export.check.inputs.invoked import with_invocation
from lora_export.check.inputs.prepared import BATCH_SIZE, Prepared, prepare
from lora_export.check.judge.compare import Comparison, compare
from lora_export.check.judge.tolerances import Tolerances, tolerances
from lora_export.check.opened import classes_of
from lora_export.check.reference.bases import SharedBases
from lora_export.check.reference.sentence import SentenceReference
from lora_export.check.reference.trained import TrainedAdapter
from lora_export.check.reference.unmerged import Reference
from lora_export.check.results import ParityCase
from lora_export.errors import EnvironmentUnusable, LoraExportError
from lora_export.export.plan import Plan, Request, make_plan
from lora_export.export.pooling import remarks_on_texts
from lora_export.export.records import Sources, adapter_records, hashes_of, require_gated
from lora_export.export.resolve import resolve
from lora_export.fleet.assignments import Job, Packing
from lora_export.fleet.kinds import ReaderOfKinds
from lora_export.fleet.outcomes import AdapterOutcome, Outcome
from lora_export.fleet.sources import refusal
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.sentence import MODULES, NONE


class Workbench:
    """A worker's graph, session, inputs and base."""

    def __init__(self, job: Job) -> None:
        if not job.graph.is_dir():
            raise EnvironmentUnusable(
                "A worker does not see the fleet's folder",
                where=f"{job.graph} on {socket.gethostname()}",
                next_step="put -o, the adapters and the base into a folder that all nodes have under the same path",
            )
        import torch

        torch.set_num_threads(job.n_threads)
        self._job, self._bases, self._read = job, SharedBases(), ReaderOfKinds()
        self.manifest: Manifest = read_manifest(job.graph)

    @cached_property
    def _session(self) -> AdapterSession:
        return AdapterSession(self._job.graph, self._job.provider, n_threads=self._job.n_threads)

    @cached_property
    def _prepared(self) -> Prepared:
        return prepare(self._job.graph, self.manifest, {})

    @cached_property
    def _limits(self) -> Tolerances:
        return tolerances(self.manifest.dtype, self._session.provider, self._job.limits)

    @cached_property
    def _usual_batches(self) -> list[Batch]:
        batcher, n_rows = self._prepared.batcher, self._job.n_rows
        if not batcher.takes_text:
            return [batcher.noise(n_rows)]
        usual = self._prepared.data[None]
        return batcher.batches(replace(usual, rows=spread(usual.rows, n_rows)), BATCH_SIZE)

    def outcome(self, task: Packing) -> AdapterOutcome:
        """What becomes of an adapter; its file lies in `task.into` unless it is refused."""
        started, processor = time.monotonic(), time.process_time()
        what = {"name": task.name, "given": task.given, "key": task.key}
        try:
            with self._one_thread():
                plan, record, files = self._packed(task)
                remarks = plan.remarks + _on_texts(plan, task)
        except EnvironmentUnusable:
            raise
        except LoraExportError as error:
            return refusal(task.name, task.given, error, key=task.key, seconds=time.monotonic() - started)
        seconds_packing, processor_seconds = time.monotonic() - started, time.process_time() - processor
        case = self._compared(task, plan, record)
        packed = {
            "remarks": remarks,
            "seconds_packing": seconds_packing,
            "processor_seconds_packing": processor_seconds,
            "files": files,
            "record": asdict(record),
            "n_bytes": sum((task.into / file).stat().st_size for file in record.files.values()),
        }
        judged = {
            "n_rows": case.n_rows,
            "measures": case.measures,
            "largest_error": case.largest_error,
            "largest_effect": case.largest_effect,
        }
        outcome = Outcome.SERVED if case.passed else Outcome.FAILED
        reason = "; ".join(case.failures) or None
        seconds = time.monotonic() - started
        return AdapterOutcome(**what, outcome=outcome, reason=reason, seconds=seconds, **packed, **judged)

    @contextlib.contextmanager
    def _one_thread(self) -> Iterator[None]:
        """On tensors as small as an adapter's, PyTorch's other threads only wait, and take the processors for that."""
        import torch

        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(self._job.n_threads)

    def _packed(self, task: Packing) -> tuple[Plan, AdapterRecord, dict[str, str]]:
        manifest = self.manifest
        how = (manifest.task, manifest.dtype, manifest.provider)
        adapters, pad = ((task.path, task.name),), manifest.pad_token_id
        request = Request(self._job.base, adapters, "dynamic", *how, pad_token_id=pad, pooling=NONE)
        task.into.mkdir(parents=True, exist_ok=True)
        plan = make_plan(request, added_to=self._job.graph)
        resolved = resolve(plan, read_adapter=self._read)
        require_gated(resolved.adapters[0], manifest)
        sources = Sources(manifest.base, (SourceRecord(task.given, None, dict(task.hashes)),))
        (record,) = adapter_records(plan, resolved, sources, graphs=manifest.graphs, folder=task.into)
        return plan, record, hashes_of([record], task.into) | copy_carried(plan.carried, task.into)

    def _compared(self, task: Packing, plan: Plan, record: AdapterRecord) -> ParityCase:
        batches = [with_invocation(batch, record.invocation_tokens) for batch in self._batches(task, record)]
        reference = self._reference(plan, record)
        expected = run_reference(reference, batches)
        with reference.without_pairs() if record.replaced else reference.without_adapter():
            without = run_reference(reference, batches)
        self._session.load(task.into / record.file, task.name, invocation_tokens=record.invocation_tokens)
        try:
            found = run_export(self._session, batches, task.name)
        finally:
            self._session.unload(task.name)
        return compare(Comparison(task.name, "adapter", "PEFT, unmerged", expected, found, without), self._limits)

    def _batches(self, task: Packing, record: AdapterRecord) -> Sequence[Batch]:
        if task.data is None:
            return self._usual_batches
        examples = read_examples(Path(task.data), self._job.n_rows)
        require_classes(examples, classes_of(self.manifest, record))
        return self._prepared.batcher.batches(examples, BATCH_SIZE)

    def _reference(self, plan: Plan, record: AdapterRecord) -> Reference:
        folder = plan.folders[0]
        shared = None if changes_base(folder.config) else self._bases.model
        return Reference(
            Task(self.manifest.task),
            plan.checkpoint.path,
            [TrainedAdapter(folder.path)],
            dtype=self.manifest.dtype,
            n_labels=record.n_labels,
            pad_token_id=self.manifest.pad_token_id,
            shared=shared,
            sentence=self._sentence(plan),
        )

    def _sentence(self, plan: Plan) -> SentenceReference | None:
        embedding = self.manifest.sentence_embedding
        if embedding is None:
            return None
        return SentenceReference.of_folder(embedding, self._job.embeds_as or sentence_root(plan.checkpoint.path))


def _on_texts(plan: Plan, task: Packing) -> tuple[str, ...]:
    """What hosts must do to the adapter's texts, where its folder's way to embed them is the graph's."""
    root = sentence_root(plan.folders[0].path) if MODULES in task.hashes else None
    return () if root is None else remarks_on_texts(root, task.name)
