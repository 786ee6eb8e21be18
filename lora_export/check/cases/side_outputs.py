"""Parity of what a graph gives beside its main output: a host may read an encoder's pooled output alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lora_export.base.tasks import SEQ2SEQ, Task
from lora_export.check.cases.examination import Examination, Examined
from lora_export.check.context import main_outputs
from lora_export.check.judge.compare import Comparison, Outputs
from lora_export.check.locate.probes import row_of, whole_probe


def side_output_cases(examination: Examination, examined: Examined) -> None:
    """Pooled outputs, and a dual encoder's scores; none for decoders, which give logits and a cache only."""
    task = examination.context.task
    if task is Task.TEXT_GENERATION or task in SEQ2SEQ:
        return
    _pooled_cases(examination, examined)
    if task is Task.ZERO_SHOT_IMAGE_CLASSIFICATION:
        _similarity_case(examination, examined)


def _pooled_cases(examination: Examination, examined: Examined) -> None:
    """Every other output that is no score: those of a row depend on that row alone."""
    mixed, reference = examination.context.mixed, examined.reference
    given = [spec.name for spec in examination.session.manifest.contract.outputs]
    main = main_outputs(given)
    beside = [name for name in given if name not in main and not name.startswith("logits")]
    if not beside:
        return
    expected = reference.run(mixed.inputs)
    precise = {} if reference.precise is None else reference.precise.run(mixed.inputs)
    names = [name for name in beside if name in expected]
    found = examination.session.run(mixed.inputs, examined.adapter, outputs=names) if names else {}
    for name in names:
        pytorch, exported = (Outputs(name, (of[name].astype(np.float32),), (mixed.real,)) for of in (expected, found))
        pytorch = replace(pytorch, precise=(precise[name],) if precise else ())
        comparison = Comparison(f"{examined.label}: {name}", examined.group, "PyTorch", pytorch, exported)
        examination.judge_rows(comparison, examined, [mixed])


def _similarity_case(examination: Examination, examined: Examined) -> None:
    """A dual encoder's scores, one image against many texts: what it computes across rows, and with unequal batches."""
    name = "logits_per_image"
    session, reference, mixed = examination.session, examined.reference, examination.context.mixed
    inputs = mixed.inputs | {"pixel_values": mixed.inputs["pixel_values"][:1]}
    wider = () if reference.precise is None else (reference.precise.run(inputs)[name],)
    pytorch = reference.run(inputs)[name]
    expected = Outputs("logits", (pytorch,), (None,), precise=wider, n_flattened=pytorch.size)
    values = session.run(inputs, examined.adapter, outputs=[name])[name].astype(np.float32)
    found = Outputs("logits", (values,), (None,))
    text = int(np.nan_to_num(np.abs(values - pytorch)[0], nan=np.inf).argmax())
    one = row_of(mixed, text)
    one = replace(one, inputs=one.inputs | {"pixel_values": inputs["pixel_values"]})
    described = f"text {text + 1} of {values.shape[1]}, which has the largest error, with the image"
    examination.judge(
        Comparison(
            f"{examined.label}: texts for an image",
            examined.group,
            "PEFT, unmerged",
            expected,
            found,
            n_rows=len(mixed.labels),
        ),
        lambda: [whole_probe(session, examined.adapter, reference, batch=one, row=0, described=described)],
    )
