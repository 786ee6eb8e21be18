"""The mathematics, against float64 and plain loops, and against PEFT's own merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from lora_export.adapters.factors import Adapter, LoraFactors, delta, fold, served_pair

# Half a unit in the last place, relative.
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def exact_delta(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """ΔW `[out, in]`, element by element: `scale · Σ_r b[o, r] a[r, i]`."""
    rank, n_in = a.shape
    found = np.zeros((b.shape[0], n_in))
    for o in range(b.shape[0]):
        for i in range(n_in):
            for r in range(rank):
                found[o, i] += scale * float(b[o, r]) * float(a[r, i])
    return found


@st.composite
def factors(draw) -> LoraFactors:
    n_in, n_out, rank = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    alpha = draw(st.floats(0.01, 64))
    scale = alpha / (rank**0.5 if draw(st.booleans()) else rank)
    dtype = draw(st.sampled_from(list(ROUNDING)))
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((rank, n_in), (n_out, rank)))
    return LoraFactors("m", a, b, scale, weight_is_in_out=draw(st.booleans()))


def reference_delta(pair: LoraFactors) -> np.ndarray:
    found = exact_delta(pair.a.double().numpy(), pair.b.double().numpy(), pair.scale)
    return found.T if pair.weight_is_in_out else found


def size_of(pair: LoraFactors) -> float:
    """A bound on the magnitudes that are summed, so that rounding can be told from a mistake."""
    return pair.rank * pair.scale * float(pair.a.abs().max()) * float(pair.b.abs().max()) + 1e-30


@given(factors())
@settings(max_examples=60, deadline=None)
def test_delta_is_scale_times_b_times_a(pair):
    found = delta(pair)
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - reference_delta(pair)).max() <= 8 * 2**-24 * size_of(pair)


@given(factors(), st.sampled_from(list(ROUNDING)), st.sampled_from(list(ROUNDING)), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_fold_is_the_exact_sum_rounded_once(pair, stored, dtype, seed):
    weight = torch.randn(reference_delta(pair).shape, generator=torch.Generator().manual_seed(seed)).to(stored)
    before = weight.clone()
    exact = weight.double().numpy() + 2 * reference_delta(pair)
    found = fold(weight, [pair, pair], dtype)
    assert found.dtype == dtype
    assert torch.equal(weight, before), "the base's weight was changed"
    bound = ROUNDING[dtype] * np.abs(exact) + 24 * 2**-24 * (size_of(pair) + 4) + 1e-7 * (dtype is torch.float16)
    assert (np.abs(found.double().numpy() - exact) <= bound).all()


@given(factors(), st.sampled_from(list(ROUNDING)), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_served_pair_gives_x_times_delta_transposed(pair, dtype, seed):
    a, b = (side.to(dtype) for side in served_pair(pair))
    n_in, n_out = pair.a.shape[1], pair.b.shape[0]
    assert (a.shape, b.shape) == ((n_in, pair.rank), (pair.rank, n_out))
    x = torch.randn(3, n_in, generator=torch.Generator().manual_seed(seed)).double()
    expected = np.zeros((3, n_out))
    exact = exact_delta(pair.a.double().numpy(), pair.b.double().numpy(), pair.scale)
    for row in range(3):
        for o in range(n_out):
            for i in range(n_in):
                expected[row, o] += float(x[row, i]) * exact[o, i]
    found = (x @ a.double()) @ b.double()
    bound = 4 * ROUNDING[dtype] * size_of(pair) * n_in * float(x.abs().max()) + 1e-6
    assert np.abs(found.numpy() - expected).max() <= bound


def test_fold_without_adapters_only_casts():
    weight = torch.tensor([[1.0, 1.0 + 2**-12]])
    assert torch.equal(fold(weight, [], torch.float16), weight.to(torch.float16))


def test_several_adapters_are_rounded_once_not_once_each():
    """Two deltas of a quarter of bfloat16's spacing each: one at a time they vanish, together they count."""
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    quarter = LoraFactors("m", torch.ones(1, 1), torch.ones(1, 1), 2**-9 * 1.01, weight_is_in_out=False)
    alone = fold(weight, [quarter], torch.bfloat16)
    assert alone.item() == 1.0
    assert fold(weight, [quarter, quarter], torch.bfloat16).item() == 1.0 + 2**-7


class _Tiny(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("in_out", [False, True], ids=["Linear", "Conv1D"])
def test_fold_is_never_further_from_the_truth_than_pefts_merge(dtype, in_out):
    torch.manual_seed(5)
    layer = Conv1D(24, 40) if in_out else torch.nn.Linear(40, 24)
    model = get_peft_model(
        _Tiny(layer.to(dtype)), LoraConfig(r=6, lora_alpha=9, target_modules=["layer"], fan_in_fan_out=in_out)
    )
    wrapped = model.base_model.model.layer
    with torch.no_grad():
        wrapped.lora_B["default"].weight.normal_()
    weight = wrapped.get_base_layer().weight.detach().clone()
    a, b = wrapped.lora_A["default"].weight.detach().clone(), wrapped.lora_B["default"].weight.detach().clone()
    change = exact_delta(a.double().numpy(), b.double().numpy(), 9 / 6)
    truth = weight.double().numpy() + (change.T if in_out else change)
    ours = fold(weight, [LoraFactors("layer", a, b, 9 / 6, weight_is_in_out=in_out)], dtype)
    theirs = model.merge_and_unload().layer.weight.detach()
    our_error = np.abs(ours.double().numpy() - truth)
    their_error = np.abs(theirs.double().numpy() - truth)
    assert theirs.dtype == ours.dtype == dtype
    if dtype is torch.float32:  # both are a few roundings away
        assert our_error.max() <= 4 * ROUNDING[dtype] * np.abs(truth).max()
    else:
        assert our_error.mean() <= their_error.mean()
        assert our_error.max() <= max(their_error.max(), ROUNDING[dtype] * np.abs(truth).max()) * (1 + 1e-3)


def test_an_adapter_lists_its_distinct_ranks():
    def pair(rank: int) -> LoraFactors:
        return LoraFactors("m", torch.zeros(rank, 2), torch.zeros(2, rank), 1.0, weight_is_in_out=False)

    adapter = Adapter("x", {"p": pair(8), "q": pair(2), "s": pair(8)}, {}, (), {})
    assert adapter.ranks == (2, 8)
