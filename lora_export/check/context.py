"""The two sides of a comparison, the export and its reference, over the same batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lora_export.artifact import AdapterRecord, ExportKind, Manifest
from lora_export.base.checkpoint import Checkpoint, Located
from lora_export.base.tasks import Task
from lora_export.check.inputs.examples import Batch, Examples
from lora_export.check.judge.compare import Outputs
from lora_export.check.judge.tolerances import Tolerances
from lora_export.check.reference.on_integers import IntegerBase
from lora_export.check.reference.sentence import SentenceReference
from lora_export.check.reference.trained import TrainedAdapter
from lora_export.check.reference.unmerged import Reference
from lora_export.check.turns import AnySession, Turns, in_turn
from lora_export.contract import graph_file
from lora_export.errors import InputRefused, LoraExportError
from lora_export.graph.module_values import WrittenGraph
from lora_export.graph.stored_integers import rounds_activations, stored_integers
from lora_export.runtime.adapter_session import RowAdapter
from lora_export.runtime.generate import empty_cache
from lora_export.runtime.seq2seq_session import Seq2SeqSession, open_export
from lora_export.runtime.session import open_session
from lora_export.sentence import SENTENCE_EMBEDDING

# Rounding is as large in so many batches as in all.
_PRECISE_BATCHES = 8


@dataclass(frozen=True)
class CheckOptions:
    """How to check an export.

    Attributes:
        provider: "cpu" or "cuda"; None for CUDA if usable, else the CPU.
        data: Files of examples by adapter name; the key None serves all others.
        merged: A merged export to compare a dynamic one with.
        n_rows: Most rows of each file; None for 128, or fewer of a large base.
        tolerances: Limits in place of the table's, by measure (`judge.tolerances.MEASURES`).
    """

    provider: str | None = None
    data: Mapping[str | None, Path] = field(default_factory=dict)
    merged: Path | None = None
    n_rows: int | None = None
    tolerances: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckRequest:
    """What to check, everything located.

    Attributes:
        base: The base's folder.
        adapters: PEFT folders by adapter name, all that the export holds.
        data: Examples by adapter name; the key None serves all others.
        merged: A merged export of one of the adapters, to compare a dynamic export with.
        tolerances: Limits in place of the table's, by measure.
        sentence: What makes an embedding of hidden states; None for none.
        keep_rows: Whether all of the examples are compared, however large the base is.
    """

    folder: Path
    base: Path
    adapters: Mapping[str, Path]
    provider: str | None
    data: Mapping[str | None, Examples]
    merged: Path | None = None
    tolerances: Mapping[str, float] = field(default_factory=dict)
    sentence: SentenceReference | None = None
    keep_rows: bool = False


@dataclass(frozen=True)
class CheckContext:
    """One export with its session and inputs, as the cases use it.

    Attributes:
        with_precise: Whether references also run at a wider dtype.
        own: Batches by adapter name; the key None serves all others.
        mixed: One batch whose rows get another adapter each.
        integers: The quantized weights of the export; None where it has none.
        turns: Whose it is to be in memory.
        as_it_is: The session of the file as it is, where that lets activations be rounded and `session` leaves them;
            else None.
    """

    request: CheckRequest
    session: AnySession
    task: Task
    limits: Tolerances
    with_precise: bool
    own: Mapping[str | None, Sequence[Batch]]
    mixed: Batch
    as_it_is: AnySession | None = None
    integers: IntegerBase | None = None
    turns: Turns = field(default_factory=Turns)

    @property
    def deployed(self) -> AnySession:
        """What a host runs."""
        return self.as_it_is or self.session

    @property
    def is_merged_integers(self) -> bool:
        """Whether adapters were folded in and the sums quantized."""
        return self.integers is not None and self.integers.is_merged

    def run(self, batches: Sequence[Batch], adapters: RowAdapter | Sequence[RowAdapter]) -> Outputs:
        return run_export(self.session, batches, adapters)

    def reference(self, names: Sequence[str], n_labels: int | None) -> Reference:
        return self.reference_of(list(map(self.session.manifest.adapter, names)), n_labels)

    def reference_of(self, records: Sequence[AdapterRecord], n_labels: int | None) -> Reference:
        """Unmerged PEFT with the adapters of `records`, each with its weight."""
        how = {"with_precise": self.with_precise, "integers": self.integers, "merged": self.is_merged_integers}
        return self._reference(records, n_labels, **how)

    def float_reference(self, records: Sequence[AdapterRecord], *, merged: bool = False) -> Reference:
        """As `reference_of` on the base's own floats, at the export's dtype alone; `merged`, PEFT's merge."""
        return self._reference(records, next((r.n_labels for r in records if r.n_labels), None), merged=merged)

    def _reference(self, records: Sequence[AdapterRecord], n_labels: int | None, **how: object) -> Reference:
        adapters = [
            TrainedAdapter(self.request.adapters[r.name], r.weight, r.convert_rank, r.residual_base) for r in records
        ]
        manifest = self.session.manifest
        how |= {"pad_token_id": manifest.pad_token_id, "sentence": self.request.sentence, "turns": self.turns}
        return Reference(self.task, self.request.base, adapters, dtype=manifest.dtype, n_labels=n_labels, **how)

    def fresh_session(self) -> AnySession:
        """Another session that computes as `session` does."""
        opened = self.open(self.request.folder)
        return opened if self.as_it_is is None else with_float_activations(opened, self.turns)

    def open(self, folder: Path) -> AnySession:
        """A session of the export in `folder`."""
        self.turns.take_session()
        return in_turn(open_export(folder, self.session.provider), self.turns)


def integer_base(session: AnySession) -> IntegerBase | None:
    """The quantized weights of an export; None where its graphs have none, whatever the manifest says."""
    graphs = tuple(session.folder / graph_file(graph) for graph in session.manifest.graphs)
    if not any(next(stored_integers(graph), None) for graph in graphs):
        return None
    return IntegerBase(graphs, session.manifest.kind is ExportKind.MERGED)


def read_in_floats(base: Path) -> list[str]:
    """What cannot be compared of a base that is quantized itself, a sentence; none where it is not."""
    method = Checkpoint.open(Located(base, str(base))).quantization
    said = "its integers are read in floats by the same code for both sides; tests hold it to the method's own library"
    return [] if method is None else [f"Whether the base's weights, {method}, are read right: {said}."]


def rounds(session: AnySession) -> bool:
    """Whether the CPU's products of this export round activations to 8-bit integers."""
    graphs = [session.folder / graph_file(graph) for graph in session.manifest.graphs]
    return session.provider == "cpu" and any(map(rounds_activations, graphs))


def with_float_activations(session: AnySession, turns: Turns) -> AnySession:
    """The same adapters on the same graphs and weights, with products that round no activations."""
    return in_turn(session, turns, _open_with_float_activations)


def _open_with_float_activations(graph: Path, provider: str) -> object:
    model = WrittenGraph(graph, is_to_run=True).with_outputs(())
    return open_session(model, provider, weights=graph.parent, prepack=True)


@contextlib.contextmanager
def run_as_hosts_do(manifest: Manifest) -> Iterator[None]:
    """Refuse a given graph that ONNX Runtime fails to run in one of the ways in which a host may run it."""
    try:
        yield
    except RuntimeError as error:
        if manifest.given_graph is None or isinstance(error, LoraExportError):
            raise
        raise InputRefused(
            "ONNX Runtime fails to run the given graph in a way that a host may: on a prompt, a step, or several new "
            "tokens on a past",
            where=manifest.given_graph.given,
            found=str(error)[:300],
            next_step="make that graph anew with a newer tool, or leave --graph out",
        ) from error


# What the rows of a batch are compared by: the first of these that a model gives; of a dual encoder, two embeddings; of
# a reader, the scores of an answer's start and end.
_SPAN = ("start_logits", "end_logits")
_MAIN_OUTPUTS = (
    ("logits",),
    _SPAN,
    ("predicted_depth",),
    ("text_embeds", "image_embeds"),
    ("text_embeds",),
    ("image_embeds",),
    (SENTENCE_EMBEDDING,),
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


def run_reference(reference: Reference, batches: Sequence[Batch], *, precisely: bool = False) -> Outputs:
    """The reference's main output over `batches`; `precisely`, also at its wider dtype, if it has one."""
    found = [reference.run(batch.inputs) for batch in batches]
    names = main_outputs(found[0])
    outputs = _joined(names, found, batches)
    if not precisely or reference.precise is None:
        return outputs
    wider = [_run_rows_alone(reference.precise, batch) for batch in batches[:_PRECISE_BATCHES]]
    return replace(outputs, precise=tuple(main_of(run, names) for run in wider))


_BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def _run_rows_alone(reference: Reference, batch: Batch) -> dict[str, np.ndarray]:
    """As `reference.run`, each row alone and without its padding, which gets zeros; an encoder-decoder's as they are.

    A padded position that sees no token has no number where the dtype is wider than that of the softmax (Gemma 2), and
    through attention no real position has one then.
    """
    inputs = batch.inputs
    if "attention_mask" not in inputs or "decoder_input_ids" in inputs or batch.real is None:
        return reference.run(inputs)
    found = []
    for row, mask in enumerate(inputs["attention_mask"] == 1):
        one = {name: array[row : row + 1] for name, array in inputs.items()}
        outputs = reference.run({name: a[:, mask] if name in _BY_TOKEN else a for name, a in one.items()})
        by_token = {name for name, array in outputs.items() if array.ndim == 3 or name in _SPAN}
        found.append({name: _padded(a, mask) if name in by_token else a for name, a in outputs.items()})
    return {name: np.concatenate([outputs[name] for outputs in found]) for name in found[0]}


def _padded(array: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`array` `[1, real, …]` at the real positions of `[1, sequence, …]`, zeros elsewhere."""
    padded = np.zeros((1, len(mask), *array.shape[2:]), array.dtype)
    padded[:, mask] = array
    return padded


def _joined(names: Sequence[str], found: Sequence[Mapping[str, np.ndarray]], batches: Sequence[Batch]) -> Outputs:
    values = tuple(main_of(run, names).astype(np.float32) for run in found)
    masks, labels = tuple(b.real for b in batches), tuple(b.labels for b in batches)
    return Outputs(" and ".join(names), values, masks, labels, tuple(b.targets for b in batches))


def main_of(run: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """The main output with what is told apart on the last axis: classes, embeddings, a token's two scores."""
    if tuple(names) == _SPAN:
        return np.stack([run[name] for name in names], axis=-1)
    found = np.concatenate([run[name] for name in names], axis=-1)
    return np.moveaxis(found, 1, -1) if found.ndim == 4 else found  # the classes of a pixel
