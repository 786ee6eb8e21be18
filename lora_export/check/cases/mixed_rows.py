"""The cases of a dynamic export beyond one adapter: mixed rows, adapters in sequence, and a merged export beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lora_export.check.context import Bench, run_export
from lora_export.check.judge.compare import Outputs, compare
from lora_export.check.locate.probe import Probe
from lora_export.check.locate.probes import row_of, row_probes, whole_probe, worst_row
from lora_export.check.locate.where import Where
from lora_export.check.results import ParityCase
from lora_export.runtime.seq2seq_session import open_export


def row_cases(bench: Bench, alone: Mapping[str | None, Outputs], where: Where) -> list[ParityCase]:
    """A batch with another adapter in each row, against each row alone, in PEFT and in ONNX Runtime."""
    names = list(alone)
    n_rows = len(bench.mixed.labels)
    assigned = [names[row % len(names)] for row in range(n_rows)]
    mixed = bench.run([bench.mixed], assigned)
    expected, precise, found, single = [], [], [], []
    for row, name in enumerate(assigned):
        reference = alone[name].values[0][row : row + 1]
        expected.append(reference)
        precise += [values[row : row + 1] for values in alone[name].precise]
        found.append(mixed.values[0][row : row + 1, ..., : reference.shape[-1]])
        single.append(bench.run([row_of(bench.mixed, row)], name).values[0])
    masks = [None if bench.mixed.real is None else bench.mixed.real[row : row + 1] for row in range(n_rows)]

    def rows(values: list[np.ndarray]) -> np.ndarray:
        # Heads differ in size, so rows are compared as one long list of numbers, padding left out.
        flat = [Outputs(mixed.name, (v,), (m,)).positions().reshape(1, -1) for v, m in zip(values, masks, strict=True)]
        return np.concatenate(flat, axis=1)

    label, described = f"{n_rows} mixed rows", "PEFT, each row's adapter"
    n_positions = n_rows if mixed.values[0].ndim < 3 or bench.mixed.real is None else int(bench.mixed.real.sum())
    wider = (rows(precise),) if precise else ()
    peft = Outputs("rows", (rows(expected),), (None,), precise=wider, n_flattened=n_positions)
    together, apart = (Outputs("rows", (rows(values),), (None,)) for values in (found, single))
    in_peft = compare(label, "rows", described, peft, together, bench.gates)
    parts = Outputs(mixed.name, tuple(expected), tuple(masks)), Outputs(mixed.name, tuple(found), tuple(masks))
    where.find(in_peft, lambda: _mixed_probes(bench, assigned, *parts))
    in_onnx = compare(f"{label} alone", "rows", "ONNX Runtime, each row alone", apart, together, bench.gates)
    where.cannot(
        in_onnx,
        "Each row agrees with PEFT, and the batch differs from its rows alone by more than rounding: both are ONNX "
        "Runtime's results, so there is no PyTorch to compare nodes with.",
    )
    return [in_peft, in_onnx]


def _mixed_probes(bench: Bench, assigned: Sequence[str | None], expected: Outputs, found: Outputs) -> Iterator[Probe]:
    """The row of the mixed batch with the largest error, against its own adapter in PEFT."""
    row, _ = worst_row(expected, found)
    name = assigned[row]
    n_labels = bench.session.manifest.adapter(name).n_labels if name else None
    reference = bench.reference([name] if name else [], n_labels)
    described = f"row {row + 1} of {len(assigned)} mixed rows ({name or 'base'}), which has the largest error"
    yield whole_probe(bench.session, assigned, reference, bench.mixed, row, described)


def sequence_cases(bench: Bench, where: Where) -> list[ParityCase]:
    """A → B → A → none in one session, against a fresh session for each."""
    names = list(bench.session.adapters)
    if not names:
        return []
    order: list[str | None] = [names[0], names[-1], names[0], None]
    label = " → ".join(name or "none" for name in order)
    values, fresh = [], []
    for name in order:
        values.append(bench.run([bench.mixed], name).values[0].reshape(1, -1))
    for name in order:
        session = open_export(bench.request.folder, bench.session.provider)
        fresh.append(run_export(session, [bench.mixed], name).values[0].reshape(1, -1))

    def joined(parts: list[np.ndarray]) -> Outputs:
        return Outputs("rows", (np.concatenate(parts, axis=1),), (None,))

    case = compare(label, "sequence", "a fresh session for each", joined(fresh), joined(values), bench.gates)
    where.cannot(
        case,
        "The same graph gives something else after other adapters than in a fresh session: what the session feeds "
        "differs, no node, so there is none to name.",
    )
    return [case]


def merged_against_dynamic(bench: Bench, where: Where) -> ParityCase:
    merged = open_export(bench.request.merged, bench.session.provider)
    names = [record.name for record in merged.manifest.adapters]
    blend = {record.name: record.weight for record in merged.manifest.adapters}
    batches = bench.own.get(names[0] if names else None) or bench.own[None]
    expected, found = run_export(merged, batches, None), bench.run(batches, blend or None)
    label = f"merged {' + '.join(names) or 'base'}"
    against = f"the merged export {bench.request.merged}"
    case = compare(label, "merged-dynamic", against, expected, found, bench.gates)

    def probes() -> Iterator[Probe]:
        n_labels = next((record.n_labels for record in merged.manifest.adapters if record.n_labels), None)
        reference = bench.reference_of(merged.manifest.adapters, n_labels)
        sides = {"the merged export": (merged, None), "the dynamic export": (bench.session, blend or None)}
        for side, (session, adapters) in sides.items():
            batch, row = worst_row(expected, found)
            described = f"the row with the largest difference between the two, in {side}"
            yield next(row_probes(session, adapters, reference, batches[batch], row, described))

    where.find(case, probes)
    return case
