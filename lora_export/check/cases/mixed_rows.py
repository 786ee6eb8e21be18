"""The cases of a dynamic export beyond one adapter: mixed rows, adapters in sequence, and a merged export beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lora_export.artifact import ExportKind, Manifest
from lora_export.check.cases.examination import Examination
from lora_export.check.context import CheckContext, run_export
from lora_export.check.judge.compare import Comparison, Outputs
from lora_export.check.locate.probe import Probe
from lora_export.check.locate.probes import row_of, row_probes, whole_probe, worst_row
from lora_export.contract import has_own_head
from lora_export.errors import UsageProblem


def assigned(context: CheckContext) -> list[str | None]:
    """Which adapter each row of the mixed batch runs with, None for the base, where that has scores of its own."""
    manifest = context.session.manifest
    names: list[str | None] = [record.name for record in manifest.adapters]
    names += [None] if has_own_head(manifest.adapter_inputs) else []
    return [names[row % len(names)] for row in range(len(context.mixed.labels))]


def own_rows(context: CheckContext, name: str | None, whole: Outputs) -> dict[int, Outputs]:
    """Of the reference's outputs for the `whole` mixed batch with one adapter, the rows that are that adapter's.

    They are copies, so that the rest need not be kept: of all adapters together it is one batch.
    """

    def one(values: Sequence[np.ndarray], row: int) -> tuple[np.ndarray, ...]:
        return tuple(each[row : row + 1].copy() for each in values)

    rows = [row for row, of in enumerate(assigned(context)) if of == name]
    return {row: replace(whole, values=one(whole.values, row), precise=one(whole.precise, row)) for row in rows}


def row_cases(examination: Examination, alone: Mapping[int, Outputs]) -> None:
    """A batch with another adapter in each row, against each row alone, in PEFT and in ONNX Runtime.

    Args:
        alone: The reference's, by row: `own_rows` of each adapter.
    """
    context, batch = examination.context, examination.context.mixed
    n_rows, names = len(batch.labels), assigned(context)
    mixed = context.run([batch], names)
    expected, precise, found, single = [], [], [], []
    for row, name in enumerate(names):
        reference = alone[row].values[0]
        expected.append(reference)
        precise += alone[row].precise
        found.append(mixed.values[0][row : row + 1, ..., : reference.shape[-1]])
        single.append(context.run([row_of(batch, row)], name).values[0])
    masks = [None if batch.real is None else batch.real[row : row + 1] for row in range(n_rows)]

    def rows(values: list[np.ndarray]) -> np.ndarray:
        # Heads differ in size, so rows are compared as one long list of numbers, padding left out.
        flat = [Outputs(mixed.name, (v,), (m,)).positions().reshape(1, -1) for v, m in zip(values, masks, strict=True)]
        return np.concatenate(flat, axis=1)

    label, together = f"{n_rows} mixed rows", Outputs("rows", (rows(found),), (None,))
    n_positions = n_rows if mixed.values[0].ndim < 3 or batch.real is None else int(batch.real.sum())
    wider = (rows(precise),) if precise else ()
    peft = Outputs("rows", (rows(expected),), (None,), precise=wider, n_flattened=n_positions)
    in_pytorch, exported = (Outputs(mixed.name, tuple(values), tuple(masks)) for values in (expected, found))
    examination.judge(
        Comparison(label, "rows", "PEFT, each row's adapter", peft, together, n_rows=n_rows),
        lambda: _mixed_probes(context, names, in_pytorch, found=exported),
    )
    del peft, wider
    apart = Outputs("rows", (rows(single),), (None,))
    examination.judge(
        Comparison(f"{label} alone", "rows", "ONNX Runtime, each row alone", apart, together, n_rows=n_rows),
        "Each row agrees with PEFT, and the batch differs from its rows alone by more than rounding: both are ONNX "
        "Runtime's results, so there is no PyTorch to compare nodes with.",
    )


def _mixed_probes(
    context: CheckContext, names: Sequence[str | None], expected: Outputs, *, found: Outputs
) -> Iterator[Probe]:
    """The row of the mixed batch with the largest error, against its own adapter in PEFT."""
    row, _ = worst_row(expected, found)
    name = names[row]
    n_labels = context.session.manifest.adapter(name).n_labels if name else None
    reference = context.reference([name] if name else [], n_labels)
    described = f"row {row + 1} of {len(names)} mixed rows ({name or 'base'}), which has the largest error"
    yield whole_probe(context.session, names, reference, batch=context.mixed, row=row, described=described)


def sequence_case(examination: Examination) -> None:
    """A → B → A → none in one session, against a fresh session for each; of one adapter A → none → A."""
    context = examination.context
    names = list(context.session.adapters)
    if not names:
        return
    first, last = names[0], names[-1]
    order: list[str | None] = [first, last, first, None] if len(names) > 1 else [first, None, first]
    values = [context.run([context.mixed], name).values[0].reshape(1, -1) for name in order]
    alone = {name: _in_a_fresh_session(context, name) for name in dict.fromkeys(order)}
    fresh = [alone[name] for name in order]
    # Runs that are equal to the last bit add nothing but memory; where all are, one of them says so.
    pairs = list(zip(values, fresh, strict=True))
    pairs = [pair for pair in pairs if not np.array_equal(*pair)] or pairs[:1]
    values, fresh = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    context.turns.take_session()

    def joined(parts: list[np.ndarray]) -> Outputs:
        return Outputs("rows", (np.concatenate(parts, axis=1),), (None,))

    label = " → ".join(name or "none" for name in order)
    n_rows = len(order) * len(context.mixed.labels)
    examination.judge(
        Comparison(label, "sequence", "a fresh session for each", joined(fresh), joined(values), n_rows=n_rows),
        "The same graph gives something else after other adapters than in a fresh session: what the session feeds "
        "differs, no node, so there is none to name.",
    )


def _in_a_fresh_session(context: CheckContext, name: str | None) -> np.ndarray:
    """The mixed batch with one adapter, in a session that is gone afterwards."""
    session = context.fresh_session()
    return run_export(session, [context.mixed], name).values[0].reshape(1, -1)


def require_same_adapters(manifest: Manifest, merged: Manifest, folder: Path) -> None:
    """Refuse a merged export in `folder` that a dynamic one cannot be compared with, before anything is.

    Raises:
        UsageProblem: It is not merged, or is of another task.
        InputRefused: It holds an adapter that the dynamic export lacks.
    """
    if merged.kind is not ExportKind.MERGED or merged.task != manifest.task:
        raise UsageProblem(
            "--merged names no merged export of the same task",
            where=str(folder),
            expected=f"a merged export for {manifest.task}",
            found=f"a {merged.kind} export for {merged.task}",
        )
    for record in merged.adapters:
        manifest.adapter(record.name)


def merged_against_dynamic(examination: Examination) -> None:
    """A merged export of one adapter, or of a sum, against the same in the dynamic export."""
    context = examination.context
    merged = context.open(context.request.merged)
    names = [record.name for record in merged.manifest.adapters]
    blend = {record.name: record.weight for record in merged.manifest.adapters}
    batches = context.own.get(names[0] if names else None) or context.own[None]
    expected, found = run_export(merged, batches, None), context.run(batches, blend or None)

    def probes() -> Iterator[Probe]:
        n_labels = next((record.n_labels for record in merged.manifest.adapters if record.n_labels), None)
        reference = context.reference_of(merged.manifest.adapters, n_labels)
        sides = {"the merged export": (merged, None), "the dynamic export": (context.session, blend or None)}
        for side, (session, adapters) in sides.items():
            batch, row = worst_row(expected, found)
            described = f"the row with the largest difference between the two, in {side}"
            yield next(row_probes(session, adapters, reference, batch=batches[batch], row=row, described=described))

    label, against = f"merged {' + '.join(names) or 'base'}", f"the merged export {context.request.merged}"
    examination.judge(Comparison(label, "merged-dynamic", against, expected, found), probes)
