"""Integers of ONNX Runtime's own quantizer are within its rounding; the nearest numbers of a wrong grid are not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
    HQQWeightOnlyQuantizer,
)
from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

from lora_export.check.judge.tolerances import tolerances
from lora_export.check.judge.weights import WeightErrors, weights_case
from lora_export.graph.stored_integers import StoredInteger
from lora_export.quantization import Method

N_OUT, N_IN = 24, 512
RANDOM = np.random.default_rng(0)
SHAPE = (N_OUT, N_IN)
FLOATS = {
    "normal": RANDOM.normal(size=SHAPE),
    "positive": RANDOM.random(SHAPE),
    "far from zero": 5 + 1e-3 * RANDOM.random(SHAPE),
    "negative and far": -5 - RANDOM.random(SHAPE),
    "heavy tails": RANDOM.standard_t(1.2, SHAPE),
    "mostly zero": RANDOM.normal(size=SHAPE) * (RANDOM.random(SHAPE) < 0.1),
    "zero": np.zeros(SHAPE),
    "either end": RANDOM.choice([-1.0, 0, 1.0], SHAPE),
    "one end almost": RANDOM.choice([-0.999, 1.0], SHAPE),
    "half steps": RANDOM.integers(-16, 17, SHAPE) / 2,
    "between two zeros": np.where(RANDOM.random(SHAPE) < 0.5, 1.0, -1 / 30),
}
KINDS = [(4, True), (4, False), (8, True), (8, False)]


def quantized(floats: np.ndarray, bits: int, block_size: int, *, symmetric: bool) -> StoredInteger:
    config = DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=symmetric, bits=bits)
    packed, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(floats.T))
    blocks = N_IN // block_size
    zeros = np.full((N_OUT, blocks), 1 << (bits - 1)) if symmetric else unpacked(zeros, bits)[:, :blocks]
    scales = np.asarray(scales, np.float64).reshape(N_OUT, blocks)
    return StoredInteger(
        ("weight",), bits, block_size, unpacked(packed, bits), scales, zeros.astype(np.float64), not symmetric
    )


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    rows = packed.reshape(N_OUT, -1)
    return rows if bits == 8 else np.stack([rows & 15, rows >> 4], axis=-1).reshape(N_OUT, -1)


def nearest(stored: StoredInteger, floats: np.ndarray) -> StoredInteger:
    """`stored` with the best integers that its scales and zeros allow."""
    scales, zeros = stored.by_element(stored.scales), stored.by_element(stored.zeros)
    place = np.round(floats / np.where(scales == 0, 1, scales) + zeros)
    return replace(stored, integers=np.clip(place, 0, (1 << stored.bits) - 1))


def with_chosen_grids(floats: np.ndarray, method: Method, bits: int, block_size: int) -> StoredInteger:
    if method is Method.K_QUANT:
        with np.errstate(divide="ignore", invalid="ignore"):
            found = quant_tensor_k_quant_cpu(floats, bits, block_size)
    else:
        found = HQQWeightOnlyQuantizer(None).quantize_internal(
            torch.from_numpy(floats), bits=bits, group_size=block_size
        )
    integers, *of_blocks = (np.asarray(each) for each in found)
    scales, zeros = (each.reshape(N_OUT, -1).astype(floats.dtype).astype(np.float64) for each in of_blocks)
    return StoredInteger(("weight",), bits, block_size, integers.reshape(SHAPE).astype(np.uint8), scales, zeros, True)


def errors(stored: StoredInteger, floats: np.ndarray, method: Method = Method.RTN) -> WeightErrors:
    found = WeightErrors(method)
    found.take("weight", stored, floats)
    return found


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.parametrize("name", FLOATS)
def test_onnxruntimes_own_rounding_is_within_the_limits(name, bits, symmetric):
    for block_size in (16, 32, 64, 128, 256):
        for dtype in ("float32", "float16"):
            if dtype == "float16" and name == "mostly zero":
                continue  # blocks of small numbers alone have scales below float16's normal range
            floats = FLOATS[name].astype(dtype)
            found = errors(quantized(floats, bits, block_size, symmetric=symmetric), floats)
            case = weights_case(found, tolerances(dtype, "cpu", quantized=True), "floats")
            assert not case.failures, (block_size, dtype, case.failures)


# Their numbers all have one sign, which ONNX Runtime's k-quant has no zero for.
OF_ONE_SIGN = ("positive", "far from zero", "negative and far")


@pytest.mark.parametrize(("method", "bits"), [(Method.K_QUANT, 4), (Method.K_QUANT, 8), (Method.HQQ, 4)])
@pytest.mark.parametrize("name", FLOATS)
def test_grids_that_a_method_chooses_are_within_the_limits(name, method, bits):
    """But where ONNX Runtime's k-quant loses the weights, which is caught."""
    for dtype in ("float32", "float16"):
        if dtype == "float16" and name == "far from zero":
            continue  # one number throughout
        floats = FLOATS[name].astype(dtype)
        for block_size in (32, 128):
            found = errors(with_chosen_grids(floats, method, bits, block_size), floats, method)
            failures = weights_case(found, tolerances(dtype, "cpu", quantized=True), "floats").failures
            if method is Method.K_QUANT and name in OF_ONE_SIGN:
                if name == "positive" and block_size == 128:
                    continue  # of so many, one is near zero
                assert "a block's grid does not reach a weight" in failures[-1]
            else:
                assert not failures, (block_size, dtype, failures)


@pytest.mark.parametrize("method", [Method.K_QUANT, Method.HQQ])
def test_a_grid_that_no_method_chooses_is_caught(method):
    """The nearest numbers of a coarser, a finer, a reversed and a shifted one; and a scale that is no number."""
    floats = FLOATS["normal"].astype(np.float32)
    stored = with_chosen_grids(floats, method, 4, 32)
    assert not weights_case(errors(stored, floats, method), tolerances("float32", "cpu", quantized=True), "").failures
    scales = [factor * stored.scales for factor in (1.5, 0.7, -1)]
    wrong = [*(replace(stored, scales=each) for each in scales), replace(stored, zeros=stored.zeros + 3)]
    for each in wrong:
        found = errors(nearest(each, floats), floats, method)
        assert found.off < 1e-6
        assert weights_case(found, tolerances("float32", "cpu", quantized=True), "floats").failures
    scales = stored.scales.copy()
    scales[3, 2] = np.nan
    found = errors(replace(stored, scales=scales), floats, method)
    assert len(weights_case(found, tolerances("float32", "cpu", quantized=True), "floats").failures) == 3


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shift", [1, "all"])
def test_the_nearest_numbers_of_a_shifted_grid_are_clipped(bits, shift):
    floats = FLOATS["positive"].astype(np.float32)
    stored = quantized(floats, bits, 32, symmetric=False)
    assert (stored.zeros == 0).all()
    shift = (1 << bits) - 1 if shift == "all" else shift
    found = errors(nearest(replace(stored, zeros=stored.zeros + shift), floats), floats)
    assert found.off < 1e-6 and found.range_error < 1e-6  # which those measures cannot see
    assert found.clipped == pytest.approx((shift - 0.5) / (1 << bits), abs=1e-6)
    (failure,) = weights_case(found, tolerances("float32", "cpu", quantized=True), "floats").failures
    assert "a block's grid does not reach a weight" in failure and failure.endswith("(weight)")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_scale_of_the_wrong_sign_is_caught(bits):
    """The largest number then falls on the end of the grid that lacks one."""
    floats = FLOATS["normal"].astype(np.float32)
    stored = quantized(floats, bits, 32, symmetric=True)
    scales = stored.scales.copy()
    scales[3, 2] *= -1
    found = errors(nearest(replace(stored, scales=scales), floats), floats)
    assert found.off < 1e-6 and found.clipped < 1e-6 and found.range_error > 0.01
    assert weights_case(found, tolerances("float32", "cpu", quantized=True), "floats").failures
