"""A base that is loaded once is the same for every adapter, whatever the one before did to its modules."""

from __future__ import annotations

import torch

from lora_export.check.reference.bases import SharedBases


def loaded() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight  # tied
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters(), 1):
            parameter.fill_(n)
    return model


def test_each_has_modules_of_its_own_over_the_same_memory():
    bases, n_loads = SharedBases(), []
    first, second = (bases.model("key", lambda: n_loads.append(1) or loaded()) for _ in range(2))
    assert len(n_loads) == 1 and first[0] is not second[0]
    assert first[0].weight.data_ptr() == second[0].weight.data_ptr() and first[1].weight is first[0].weight
    first[0].weight = torch.nn.Parameter(torch.zeros(3, 3))
    assert second[0].weight[0, 0] == 1
    bases.model("other", lambda: n_loads.append(1) or loaded())
    assert len(n_loads) == 2


def test_a_base_that_was_written_into_is_loaded_again():
    """As PEFT does with the biases and the embeddings that an adapter's file holds."""
    bases, n_loads = SharedBases(), []

    def model() -> torch.nn.Module:
        return bases.model("key", lambda: n_loads.append(1) or loaded())

    model().load_state_dict({"0.bias": torch.full((3,), 9.0)}, strict=False)
    assert model()[0].bias[0] == 2 and len(n_loads) == 2
    with torch.no_grad():
        model()[0].weight[1, 1] = 9
    assert model()[0].weight[1, 1] == 1 and len(n_loads) == 3
    model()
    assert len(n_loads) == 3
