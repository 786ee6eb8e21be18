"""Parity of what a graph gives beside its main output: a host may read an encoder's pooled output alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from lora_export.base.tasks import SEQ2SEQ, Task
from lora_export.check.context import Bench, main_outputs
from lora_export.check.judge.compare import Outputs, compare
from lora_export.check.locate.probes import row_of, whole_probe, worst_probes
from lora_export.check.locate.where import Where
from lora_export.check.reference.unmerged import Reference
from lora_export.check.results import ParityCase
from lora_export.runtime.adapter_session import RowAdapter


def side_output_cases(
    label: str, adapter: RowAdapter, bench: Bench, reference: Reference, where: Where
) -> list[ParityCase]:
    """Pooled outputs, and a dual encoder's scores; none for decoders, which give logits and a cache only."""
    if bench.task is Task.TEXT_GENERATION or bench.task in SEQ2SEQ:
        return []
    how = (label, adapter, bench, reference, where)
    return [*_pooled_cases(*how), *_similarity_cases(*how)]


def _pooled_cases(
    label: str, adapter: RowAdapter, bench: Bench, reference: Reference, where: Where
) -> Iterator[ParityCase]:
    """Every other output that is no score: those of a row depend on that row alone."""
    given = [spec.name for spec in bench.session.manifest.contract.outputs]
    main = main_outputs(given)
    beside = [name for name in given if name not in main and not name.startswith("logits")]
    if not beside:
        return
    expected = reference.run(bench.mixed.inputs)
    precise = {} if reference.precise is None else reference.precise.run(bench.mixed.inputs)
    names = [name for name in beside if name in expected]
    found = bench.session.run(bench.mixed.inputs, adapter, outputs=names) if names else {}
    for name in names:
        theirs, mine = (Outputs(name, (of[name].astype(np.float32),), (bench.mixed.real,)) for of in (expected, found))
        theirs = replace(theirs, precise=(precise[name],) if precise else ())
        case = compare(f"{label}: {name}", _group(bench, adapter), "PyTorch", theirs, mine, bench.gates)
        probes = partial(worst_probes, bench.session, adapter, reference, [bench.mixed], theirs, mine)
        where.find(case, probes)
        yield case


def _similarity_cases(
    label: str, adapter: RowAdapter, bench: Bench, reference: Reference, where: Where
) -> Iterator[ParityCase]:
    """A dual encoder's scores, one image against many texts: what it computes across rows, and with unequal batches."""
    if bench.task is not Task.ZERO_SHOT_IMAGE_CLASSIFICATION:
        return
    name = "logits_per_image"
    inputs = bench.mixed.inputs | {"pixel_values": bench.mixed.inputs["pixel_values"][:1]}
    wider = () if reference.precise is None else (reference.precise.run(inputs)[name],)
    theirs = reference.run(inputs)[name]
    expected = Outputs("logits", (theirs,), (None,), precise=wider, n_flattened=theirs.size)
    values = bench.session.run(inputs, adapter, outputs=[name])[name].astype(np.float32)
    found = Outputs("logits", (values,), (None,))
    title = f"{label}: texts for an image"
    case = compare(title, _group(bench, adapter), "PEFT, unmerged", expected, found, bench.gates)
    text = int(np.nan_to_num(np.abs(values - expected.values[0])[0], nan=np.inf).argmax())
    one = row_of(bench.mixed, text)
    one = replace(one, inputs=one.inputs | {"pixel_values": inputs["pixel_values"]})
    described = f"text {text + 1} of {values.shape[1]}, which has the largest error, with the image"
    where.find(case, lambda: [whole_probe(bench.session, adapter, reference, one, 0, described)])
    yield case


def _group(bench: Bench, adapter: RowAdapter) -> str:
    is_merged = not bench.session.adapters and bench.session.manifest.adapters
    return "adapter" if adapter or is_merged else "base"
