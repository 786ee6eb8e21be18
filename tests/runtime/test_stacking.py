"""Stacking the adapters of a batch, against the formula in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export.contract import AdapterInput, AdapterInputKind, GraphContract, TensorSpec
from lora_export.errors import UsageProblem
from lora_export.runtime.stacking import classes_by_row, stack_rows

IN, OUT = 4, 3


def contract(*, bias: bool = True, base_has_head: bool = True) -> GraphContract:
    a = AdapterInput("q.lora_A.weight", "q", AdapterInputKind.LORA_A, "float32", ("rows", IN, "q.rank"))
    b = AdapterInput("q.lora_B.weight", "q", AdapterInputKind.LORA_B, "float32", ("rows", "q.rank", OUT))
    size = "head.out_features"
    heads = [
        AdapterInput(
            "head.weight", "head", AdapterInputKind.WEIGHT, "float32", ("rows", OUT, size), None, base_has_head
        )
    ]
    if bias:
        dims = ("rows", 1, size)
        heads.append(AdapterInput("head.bias", "head", AdapterInputKind.BIAS, "float32", dims, None, base_has_head))
    return GraphContract((), (TensorSpec("logits", "float32", ("batch_size", size)),), (a, b, *heads))


def pair(rank: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((1, IN, rank)), rng.standard_normal((1, rank, OUT))
    return {"q.lora_A.weight": a.astype(np.float32), "q.lora_B.weight": b.astype(np.float32)}


def head(n: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    weight, bias = rng.standard_normal((1, OUT, n)), rng.standard_normal((1, 1, n))
    return {"head.weight": weight.astype(np.float32), "head.bias": bias.astype(np.float32)}


DEFAULTS = head(2, 99)


def change(x: np.ndarray, adapters: dict, row: tuple) -> np.ndarray:
    """Σ_k w_k (x A_k) B_k, in float64 and plain loops."""
    found = np.zeros(OUT)
    for name, weight in row:
        if "q.lora_A.weight" in adapters[name]:
            a, b = adapters[name]["q.lora_A.weight"][0], adapters[name]["q.lora_B.weight"][0]
            for r in range(a.shape[1]):
                low = sum(float(x[i]) * float(a[i, r]) for i in range(IN))
                for o in range(OUT):
                    found[o] += weight * low * float(b[r, o])
    return found


ADAPTERS = {"r1": pair(1, 1), "r3": pair(3, 2), "r5": pair(5, 3) | head(2, 7), "head only": head(4, 4)}
ENTRIES = st.dictionaries(
    st.sampled_from(["r1", "r3", "r5"]), st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3), max_size=3
)


@given(st.lists(ENTRIES, min_size=1, max_size=5), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_each_row_gets_its_own_blend(entries, seed):
    rows = [tuple(entry.items()) for entry in entries]
    found = stack_rows(contract(), ADAPTERS, rows, defaults=DEFAULTS)
    x = np.random.default_rng(seed).standard_normal((len(rows), IN))
    if not any(rows):
        assert found == {}, "nothing is bound for the base"
        return
    a, b = found["q.lora_A.weight"], found["q.lora_B.weight"]
    ranks = {"r1": 1, "r3": 3, "r5": 5}
    assert a.shape[2] == b.shape[1] == max(sum(ranks[name] for name, _ in row) for row in rows)
    assert a.dtype == b.dtype == np.float32
    for index, row in enumerate(rows):
        np.testing.assert_allclose(x[index] @ a[index] @ b[index], change(x[index], ADAPTERS, row), atol=1e-4)


def test_an_adapter_without_a_module_leaves_it_alone():
    found = stack_rows(contract(), ADAPTERS, [(("r1", 1.0),), (("head only", 1.0),)], defaults=DEFAULTS)
    assert not found["q.lora_A.weight"][1].any() and not found["q.lora_B.weight"][1].any()
    assert "q.lora_A.weight" not in stack_rows(contract(), ADAPTERS, [(("head only", 1.0),)], defaults=DEFAULTS)


def test_heads_are_left_out_where_no_row_needs_one():
    found = stack_rows(contract(), ADAPTERS, [(("r1", 1.0),), ()], defaults=DEFAULTS)
    assert set(found) == {"q.lora_A.weight", "q.lora_B.weight"}


@pytest.mark.parametrize("bias", [True, False], ids=["with a bias", "without a bias"])
def test_heads_of_unequal_size_are_padded(bias):
    adapters = {"four": head(4, 1), "one": head(1, 2)}
    if not bias:
        adapters = {name: {"head.weight": tensors["head.weight"]} for name, tensors in adapters.items()}
    rows = [(("four", 1.0),), (("one", 1.0),), ()]
    found = stack_rows(contract(bias=bias), adapters, rows, defaults=DEFAULTS)
    assert found["head.weight"].shape == (3, OUT, 4)
    np.testing.assert_array_equal(found["head.weight"][0], adapters["four"]["head.weight"][0])
    np.testing.assert_array_equal(found["head.weight"][1, :, :1], adapters["one"]["head.weight"][0])
    np.testing.assert_array_equal(found["head.weight"][2, :, :2], DEFAULTS["head.weight"][0])
    assert not found["head.weight"][1, :, 1:].any()
    if bias:
        assert (found["head.bias"][1, 0, 1:] == np.finfo(np.float32).min).all()
        assert (found["head.bias"][2, 0, 2:] == np.finfo(np.float32).min).all()
        assert np.isfinite(found["head.bias"]).all(), "an infinity would make NaN"
    assert classes_by_row(contract(bias=bias), adapters, rows, defaults=DEFAULTS) == {"head.out_features": [4, 1, 2]}


def test_a_blend_of_heads_moves_from_the_bases_head():
    """W0 + Σ w_k (W_k − W0)."""
    adapters = {"a": head(2, 1), "b": head(2, 2)}
    found = stack_rows(contract(), adapters, [(("a", 0.25), ("b", 0.5))], defaults=DEFAULTS)
    for name in ("head.weight", "head.bias"):
        start = DEFAULTS[name].astype(np.float64)
        expected = start + 0.25 * (adapters["a"][name] - start) + 0.5 * (adapters["b"][name] - start)
        np.testing.assert_allclose(found[name], expected, atol=1e-6)


def test_a_blend_of_heads_without_a_base_head_is_their_weighted_sum():
    adapters = {"a": head(5, 1), "b": head(5, 2)}
    zeros = {name: np.zeros_like(value) for name, value in DEFAULTS.items()}
    found = stack_rows(contract(base_has_head=False), adapters, [(("a", 0.25), ("b", 0.75))], defaults=zeros)
    expected = 0.25 * adapters["a"]["head.weight"].astype(np.float64) + 0.75 * adapters["b"]["head.weight"]
    np.testing.assert_allclose(found["head.weight"], expected, atol=1e-6)


@pytest.mark.parametrize("sizes", [(3, 4), (4, 4)], ids=["of the two", "of the base"])
def test_a_blend_of_heads_of_different_sizes_is_refused(sizes):
    adapters = {"a": head(sizes[0], 1), "b": head(sizes[1], 2)}
    with pytest.raises(UsageProblem, match="A row blends heads of different sizes") as refused:
        stack_rows(contract(), adapters, [(("a", 0.5), ("b", 0.5))], defaults=DEFAULTS)
    assert refused.value.found == "a × 0.5, b × 0.5"


def test_adapters_are_not_changed_by_stacking():
    before = {name: {k: v.copy() for k, v in tensors.items()} for name, tensors in ADAPTERS.items()}
    found = stack_rows(contract(), ADAPTERS, [(("r5", 0.5),)], defaults=DEFAULTS)
    for array in found.values():
        array[...] = 7
    for name, tensors in before.items():
        for key, value in tensors.items():
            np.testing.assert_array_equal(ADAPTERS[name][key], value)
