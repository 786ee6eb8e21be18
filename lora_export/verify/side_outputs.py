"""Parity of what a graph gives beside its main output: a host may read an encoder's pooled output alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lora_export.base.tasks import SEQ2SEQ, Task
from lora_export.runtime.adapter_session import RowAdapter
from lora_export.verify.check_results import ParityCase
from lora_export.verify.compare import Outputs, compare
from lora_export.verify.reference import Reference
from lora_export.verify.runs import Bench, main_outputs


def side_output_cases(label: str, adapter: RowAdapter, bench: Bench, reference: Reference) -> list[ParityCase]:
    """Pooled outputs, and a dual encoder's scores; none for decoders, which give logits and a cache only."""
    if bench.task is Task.TEXT_GENERATION or bench.task in SEQ2SEQ:
        return []
    return [*_pooled_cases(label, adapter, bench, reference), *_similarity_cases(label, adapter, bench, reference)]


def _pooled_cases(label: str, adapter: RowAdapter, bench: Bench, reference: Reference) -> Iterator[ParityCase]:
    """Every other output that is no score: those of a row depend on that row alone."""
    given = [spec.name for spec in bench.session.manifest.contract.outputs]
    main = main_outputs(given)
    expected = reference.run(bench.mixed.inputs)
    wider = None if reference.precise is None else reference.precise.run(bench.mixed.inputs)
    names = [name for name in given if name in expected and name not in main and not name.startswith("logits")]
    found = bench.session.run(bench.mixed.inputs, adapter, outputs=names) if names else {}
    for name in names:
        masks, precise = (bench.mixed.real,), () if wider is None else (wider[name],)
        theirs = Outputs(name, (expected[name].astype(np.float32),), masks, precise=precise)
        mine = Outputs(name, (found[name].astype(np.float32),), masks)
        yield compare(f"{label}: {name}", _group(bench, adapter), "PyTorch", theirs, mine, bench.gates)


def _similarity_cases(label: str, adapter: RowAdapter, bench: Bench, reference: Reference) -> Iterator[ParityCase]:
    """A dual encoder's scores, one image against many texts: what it computes across rows, and with unequal batches."""
    if bench.task is not Task.ZERO_SHOT_IMAGE_CLASSIFICATION:
        return
    name = "logits_per_image"
    inputs = bench.mixed.inputs | {"pixel_values": bench.mixed.inputs["pixel_values"][:1]}
    wider = () if reference.precise is None else (reference.precise.run(inputs)[name],)
    expected = Outputs("logits", (reference.run(inputs)[name],), (None,), precise=wider)
    values = bench.session.run(inputs, adapter, outputs=[name])[name].astype(np.float32)
    found = Outputs("logits", (values,), (None,))
    described = f"{label}: texts for an image"
    yield compare(described, _group(bench, adapter), "PEFT, unmerged", expected, found, bench.gates)


def _group(bench: Bench, adapter: RowAdapter) -> str:
    is_merged = not bench.session.adapters and bench.session.manifest.adapters
    return "adapter" if adapter or is_merged else "base"
