"""float64 without a copy of the weights: the same numbers as a model that is widened as a whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_export.base.tasks import Task
from lora_export.check.reference import widened as room
from lora_export.check.reference.trained import TrainedAdapter
from lora_export.check.reference.unmerged import Reference

IDS = np.array([[1, 9, 70, 40, 2], [1, 8, 33, 21, 5]])
DECODER = (Task.TEXT_GENERATION, {"input_ids": IDS, "attention_mask": np.ones_like(IDS)})
ENCODER_DECODER = (Task.TEXT2TEXT_GENERATION, DECODER[1] | {"decoder_input_ids": IDS})


def kept(reference: Reference) -> int:
    """Numbers of parameters that are still in float32."""
    return sum(p.numel() for p in reference.inner.parameters() if p.dtype is torch.float32)


@pytest.mark.parametrize(
    ("base", "adapter", "task", "is_narrowed"),
    [("llama", "code", DECODER, False), ("llama", "gains", DECODER, False), ("gpt2", "poet", DECODER, False),
     ("flan", "flan-attention", ENCODER_DECODER, True), ("t5", "t5-all", ENCODER_DECODER, True)],
)  # fmt: skip
def test_it_computes_as_a_whole_copy_does(base, adapter, task, is_narrowed, bases, adapters, monkeypatch):
    kind, inputs = task
    made = {}
    for large in (2**62, 1):
        monkeypatch.setattr(room, "_LARGE", large)
        monkeypatch.setattr(room, "_PART", 1000)
        made[large] = Reference(kind, bases[base], [TrainedAdapter(adapters[adapter])], dtype="float64", n_labels=None)
        made[large].module  # noqa: B018 made now
    assert kept(made[2**62]) == 0 and kept(made[1]) > 10_000
    expected, found = (made[large].run(inputs)["logits"] for large in (2**62, 1))
    assert found.dtype == np.float64
    # A sum in another order differs in the last digits of float64, numbers that went through float32 in the eighth.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    assert (kept(made[1]) == 0) == is_narrowed
    with made[1].without_adapter(), made[2**62].without_adapter():
        alone = made[1].run(inputs)["logits"]
        np.testing.assert_allclose(alone, made[2**62].run(inputs)["logits"], atol=1e-12 * np.abs(alone).max())


def test_a_reference_and_its_precise_one_keep_equal_weights_once(bases, adapters, monkeypatch):
    monkeypatch.setattr(room, "_LARGE", 1)
    options = {"dtype": "float32", "n_labels": None, "with_precise": True}
    reference = Reference(DECODER[0], bases["llama"], [TrainedAdapter(adapters["code"])], **options)
    own = {p.data_ptr() for p in reference.inner.parameters()}
    lazy = [p for p in reference.precise.inner.parameters() if p.dtype is torch.float32]
    assert lazy and {p.data_ptr() for p in lazy} <= own
    assert {p.dtype for p in reference.inner.parameters()} == {torch.float32}
    before = reference.run(DECODER[1])["logits"]
    room.wholly_widened(reference.precise.inner)
    np.testing.assert_array_equal(reference.run(DECODER[1])["logits"], before)


def test_weights_that_differ_are_not_shared(bases, monkeypatch):
    monkeypatch.setattr(room, "_LARGE", 1)
    one = Reference(DECODER[0], bases["llama"], [], dtype="float64", n_labels=None).inner
    other = Reference(DECODER[0], bases["llama"], [], dtype="float32", n_labels=None).inner
    large = [name for name, p in one.named_parameters() if p.dtype is torch.float32]
    other.get_parameter(large[0]).data[0, 0] += 1
    room.share_weights(one, other)
    shared = {name for name in large if one.get_parameter(name).data_ptr() == other.get_parameter(name).data_ptr()}
    assert shared == set(large[1:])


def test_an_error_that_has_nothing_to_do_with_it_is_told(bases):
    reference = Reference(Task.TEXT_GENERATION, bases["llama"], [], dtype="float64", n_labels=None)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        reference.run({"input_ids": IDS, "attention_mask": np.ones((3, 7, 9, 4), np.int64)})
