"""The mathematics of merging against float64 and plain loops, and against PEFT where PEFT defines it."""

from __future__ import annotations

import math
from dataclasses import replace

import hypothesis.strategies as st
import peft
import pytest
import torch
from hypothesis import given, settings
from transformers.pytorch_utils import Conv1D

from lora_export.adapters.factors import Adapter, LoraFactors, TokenRows, dora_gain, fold_dora, served_pair
from lora_export.adapters.initialization import with_initial_pair
from lora_export.adapters.merging import apply_changes, change_of
from lora_export.adapters.peft_layer import PeftLayer
from lora_export.adapters.peft_pairs import convolution_pair_of

OUT, IN, RANK = 5, 4, 2


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_pair(*, is_in_out: bool = False, magnitude: bool = False, bias: bool = False) -> LoraFactors:
    return LoraFactors(
        "layer",
        random(RANK, IN, seed=1),
        random(OUT, RANK, seed=2),
        0.7,
        is_in_out,
        random(OUT, seed=3).abs() + 0.5 if magnitude else None,
        random(OUT, seed=4) if bias else None,
    )


def an_adapter(**facts: object) -> Adapter:
    return Adapter(**({"name": "a", "lora": {}, "replaced": {}, "replaced_modules": (), "config": {}} | facts))


def dora_by_loops(weight: torch.Tensor, pair: LoraFactors) -> torch.Tensor:
    """`[out, in]`, float64: `m_o (W + sBA)_oi / ‖(W + sBA)_o‖`."""
    rows = []
    for o in range(OUT):
        row = [
            float(weight[o, i]) + pair.scale * sum(float(pair.b[o, r]) * float(pair.a[r, i]) for r in range(RANK))
            for i in range(IN)
        ]
        norm = math.sqrt(sum(value * value for value in row))
        rows.append([float(pair.magnitude[o]) * value / norm for value in row])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("is_in_out", [False, True])
def test_dora_is_the_papers_formula(is_in_out):
    weight, pair = random(OUT, IN), a_pair(is_in_out=is_in_out, magnitude=True)
    expected = dora_by_loops(weight, pair)
    found = fold_dora(weight.T if is_in_out else weight, pair)
    torch.testing.assert_close((found.T if is_in_out else found).double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("is_in_out", [False, True])
def test_dora_as_inputs_is_the_same(is_in_out):
    """`y = (W x) ⊙ g + (x A) B`, with the gain folded into B."""
    weight, pair, x = random(OUT, IN), a_pair(is_in_out=is_in_out, magnitude=True), random(3, IN, seed=9)
    gain = dora_gain(weight.T if is_in_out else weight, pair)
    a, b = served_pair(pair, gain)
    expected = x.double() @ dora_by_loops(weight, pair).T
    torch.testing.assert_close(((x @ weight.T) * gain + (x @ a) @ b).double(), expected, atol=1e-5, rtol=0)


def test_a_sum_is_weighted_whatever_the_kinds():
    weight = random(OUT, IN)
    plain, dora = a_pair(), a_pair(magnitude=True)
    whole, rows = random(OUT, IN, seed=7), TokenRows(torch.tensor([3, 0]), random(2, IN, seed=8))
    adapters = [
        (an_adapter(lora={"layer": plain}), 0.5),
        (an_adapter(lora={"layer": dora}), -0.25),
        (an_adapter(replaced={"layer.weight": whole}), 0.1),
        (an_adapter(token_rows={"layer.weight": rows}), 2.0),
    ]
    expected = weight.double()
    expected += 0.5 * plain.scale * (plain.b.double() @ plain.a.double())
    expected += -0.25 * (dora_by_loops(weight, dora) - weight.double())
    expected += 0.1 * (whole.double() - weight.double())
    for place, index in enumerate([3, 0]):
        expected[index] += 2.0 * (rows.rows[place].double() - weight[index].double())
    changes = [change_of(adapter, share, "layer.weight", read=lambda path: weight) for adapter, share in adapters]
    before = weight.clone()
    found = apply_changes(weight, changes, torch.float32)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    transposed = apply_changes(weight, changes, torch.float32, transposed=True)
    torch.testing.assert_close(transposed.T, found, atol=1e-6, rtol=0)
    assert transposed.is_contiguous() and torch.equal(weight, before)


def test_a_bias_of_the_pair_is_scaled():
    pair, bias = a_pair(bias=True), random(OUT, seed=5)
    change = change_of(an_adapter(lora={"layer": pair}), 1.0, "layer.bias", read=lambda path: bias)
    expected = bias.double() + pair.scale * pair.bias.double()
    torch.testing.assert_close(apply_changes(bias, [change], torch.float32).double(), expected, atol=1e-6, rtol=0)


def test_what_an_adapter_does_not_touch_has_no_change():
    adapter = an_adapter(lora={"layer": a_pair()}, replaced={"head.weight": random(2, 2)})
    for path in ("other.weight", "layer.bias", "head.bias"):
        assert change_of(adapter, 1.0, path, read=lambda _: pytest.fail("nothing is read")) is None


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("is_in_out", [False, True])
def test_an_untrained_pair_that_changed_the_base_changes_nothing(init, is_in_out):
    """Right after its start, PEFT's `W0 − s·B0·A0` with the pair `s·B0·A0` is W0."""
    if init == "olora" and is_in_out:
        pytest.skip("PEFT's OLoRA does not know Conv1D's layout")
    base = Conv1D(OUT, IN) if is_in_out else torch.nn.Linear(IN, OUT, bias=False)
    weight = random(*base.weight.shape)
    base.weight.data = weight.clone()
    config = peft.LoraConfig(
        r=RANK, lora_alpha=3, init_lora_weights=init, target_modules=["0"], fan_in_fan_out=is_in_out
    )
    layer = peft.get_peft_model(torch.nn.Sequential(base), config).base_model.model[0]
    assert not torch.allclose(layer.get_base_layer().weight, weight), "the start changes the base"
    pair = LoraFactors(
        "layer", layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach(), 3 / RANK, is_in_out
    )
    whole = with_initial_pair(pair, weight, {"init_lora_weights": init})
    change = change_of(an_adapter(lora={"layer": whole}), 1.0, "layer.weight", read=lambda _: weight)
    torch.testing.assert_close(apply_changes(weight, [change], torch.float32), weight, atol=1e-5, rtol=0)
    assert whole.rank == 2 * RANK


def test_a_layer_is_merged_by_peft_without_being_changed():
    base = torch.nn.Conv2d(3, 6, 2)
    model = peft.get_peft_model(torch.nn.Sequential(base), peft.LoraConfig(r=RANK, target_modules=["0"]))
    layer = model.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    pixels = random(2, 3, 5, 5)
    real = {name: tensor.detach().clone() for name, tensor in base.named_parameters()}
    with torch.no_grad():
        expected = layer(pixels)
        base.weight.data = torch.zeros(()).expand(base.weight.shape)
        once, again = (PeftLayer.of(layer).merged(real) for _ in range(2))
        found = torch.nn.functional.conv2d(pixels, once["weight"], once["bias"])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert torch.equal(once["weight"], again["weight"]) and base.weight.stride() == (0, 0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layer", [torch.nn.Conv1d(3, 6, 2), torch.nn.Conv2d(3, 6, (2, 1)), torch.nn.Conv3d(3, 6, 2)])
def test_a_convolution_is_peft_s(layer, dtype):
    weight = layer.weight.detach().to(dtype)
    model = peft.get_peft_model(torch.nn.Sequential(layer), peft.LoraConfig(r=RANK, lora_alpha=3, target_modules=["0"]))
    adapted = model.base_model.model[0]
    torch.nn.init.normal_(adapted.lora_B["default"].weight)
    pair = convolution_pair_of("layer", adapted)
    change = change_of(an_adapter(convolutions={"layer": pair}), 1.0, "layer.weight", read=lambda _: weight)
    expected = (weight.double() + adapted.get_delta_weight("default").detach().double()).to(dtype)
    torch.testing.assert_close(apply_changes(weight, [change], dtype), expected, atol=1e-6, rtol=1e-3)
    blended = apply_changes(weight, [replace(change, weight=0.5)], torch.float32)
    half = weight.double() + 0.5 * adapted.get_delta_weight("default").detach().double()
    torch.testing.assert_close(blended.double(), half, atol=1e-6, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 6),
    alpha=st.floats(0.1, 16),
    share=st.floats(-2, 2),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_one_rounding_is_the_nearest_there_is(rank, alpha, share, shape, dtype):
    """In half precision no element is farther from the float64 truth than half a step of the dtype (and float32's)."""
    n_out, n_in = shape
    pair = LoraFactors("layer", random(rank, n_in, seed=rank), random(n_out, rank, seed=3), alpha / rank, False)
    weight = random(n_out, n_in).to(dtype)
    truth = weight.double() + share * pair.scale * (pair.b.double() @ pair.a.double())
    change = change_of(an_adapter(lora={"layer": pair}), share, "layer.weight", read=lambda _: weight)
    found = apply_changes(weight, [change], dtype).double()
    float32_error = 1e-6 * (1 + share * pair.scale * (pair.b.abs().double() @ pair.a.abs().double())).abs()
    step = torch.finfo(dtype).eps / 2 * truth.abs() + torch.finfo(dtype).smallest_normal
    assert bool(((found - truth).abs() <= step + float32_error).all())
