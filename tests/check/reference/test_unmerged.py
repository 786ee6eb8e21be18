"""The reference is PEFT, unmerged: with an adapter, without its pairs, without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references import inputs_for, outputs_of, unmerged

from lora_export.base.tasks import Task
from lora_export.check.reference.trained import TrainedAdapter
from lora_export.check.reference.unmerged import Reference

INPUTS = inputs_for("classifier")


@pytest.fixture
def shades(bases, adapters) -> Reference:
    return Reference(
        Task.TEXT_CLASSIFICATION, bases["classifier"], [TrainedAdapter(adapters["shades"])], dtype="float32", n_labels=4
    )


def test_it_is_peft(shades, bases, adapters):
    model = unmerged(bases["classifier"], "BertForSequenceClassification", [adapters["shades"]], 4)
    assert np.array_equal(shades.run(INPUTS)["logits"], outputs_of(model, INPUTS).astype(np.float32))


def test_without_pairs_keeps_the_head_and_comes_back(shades, bases, adapters):
    before = shades.run(INPUTS)["logits"]
    with shades.without_pairs():
        inside = shades.run(INPUTS)["logits"]
    assert inside.shape == before.shape and np.abs(inside - before).max() > 0.05
    assert np.array_equal(shades.run(INPUTS)["logits"], before)
    model = unmerged(bases["classifier"], "BertForSequenceClassification", [adapters["shades"]], 4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    np.testing.assert_allclose(inside, outputs_of(model, INPUTS), atol=1e-6)


def test_several_adapters_add_up(bases, adapters):
    inputs = inputs_for("llama")
    both = Reference(
        Task.TEXT_GENERATION,
        bases["llama"],
        [TrainedAdapter(adapters["chat"]), TrainedAdapter(adapters["code"])],
        dtype="float32",
        n_labels=None,
    )
    expected = outputs_of(unmerged(bases["llama"], "LlamaForCausalLM", [adapters["chat"], adapters["code"]]), inputs)
    np.testing.assert_allclose(both.run(inputs)["logits"], expected, atol=1e-6)
    with both.without_adapter():
        plain = outputs_of(unmerged(bases["llama"], "LlamaForCausalLM"), inputs)
        np.testing.assert_allclose(both.run(inputs)["logits"], plain, atol=1e-6)


@pytest.mark.parametrize(("dtype", "wider"), [("float16", np.float32), ("float32", np.float64)])
def test_the_same_model_at_a_wider_dtype_is_nearer_to_the_truth(dtype, wider, bases, adapters):
    chat, inputs = [TrainedAdapter(adapters["chat"])], inputs_for("llama")
    found = Reference(Task.TEXT_GENERATION, bases["llama"], chat, dtype=dtype, n_labels=None, with_precise=True)
    truth = Reference(Task.TEXT_GENERATION, bases["llama"], chat, dtype="float64", n_labels=None).run(inputs)["logits"]
    own, precise = found.run(inputs)["logits"], found.precise.run(inputs)["logits"]
    assert precise.dtype == wider and own.dtype == np.float32
    assert 0 < np.abs(own - truth).max() > 100 * np.abs(precise - truth).max()
    with found.without_pairs():
        assert np.abs(found.precise.run(inputs)["logits"] - precise).max() > 0.01
    assert np.array_equal(found.precise.run(inputs)["logits"], precise)
