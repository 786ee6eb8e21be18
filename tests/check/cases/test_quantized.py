"""A quantized export passes where its graph, its integers and its adapters are right, and says what it costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import damage
import numpy as np
import onnx
import pytest
import torch
from catalogue import EXPORTS, INT4, export_to
from onnx import numpy_helper
from safetensors.numpy import load_file

from lora_export.artifact import read_manifest
from lora_export.check.cases.quantized import weight_cases
from lora_export.check.context import CheckOptions, CheckRequest
from lora_export.check.reference.on_integers import rounded
from lora_export.check.results import COST, CheckReport, ParityCase
from lora_export.check.run import begin_check
from lora_export.errors import UsageProblem
from lora_export.export.plan import Request
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import ExportOptions, add_adapter, check, export, remove_adapters
from lora_export.verdict import Verdict

DOWN = "model.layers.1.mlp.down_proj.weight"


def checked(folder: Path, **options: object) -> CheckReport:
    return check(folder, SourceOverrides(), CheckOptions(provider="cpu", n_rows=8, **options))[0]


def failed(report: CheckReport) -> list[tuple[str, str]]:
    return [(case.group, case.name) for case in report.cases if case.failures]


def of_group(report: CheckReport, group: str) -> list[ParityCase]:
    return [case for case in report.cases if case.group == group]


@pytest.mark.parametrize(
    "name", ["llama-int4-merged", "llama-f16-int8", "gpt2-int8-merged", "llama-k-quant", "llama-hqq-merged"]
)
def test_sound_quantized_exports_pass_and_say_what_they_cost(name, exports, own):
    report = checked(own(exports[name]))
    assert report.verdict is Verdict.PASS, failed(report)
    (weights,) = of_group(report, "weights")
    assert bool(of_group(report, "deployed")) == (read_manifest(exports[name]).quantization.accuracy_level == 4)
    assert weights.n_rows == len(read_manifest(exports[name]).quantization.weights) > 4
    for case in of_group(report, "deployed"):
        assert 0.5 < case.value("rounding") < 1.2
        assert case.value("error") > 1e-4 > 10 * weights.value("weights")
        assert weights.value("clipping") < 1e-4
    costs = of_group(report, COST)
    n_adapters = len(read_manifest(exports[name]).adapters)
    assert len(costs) == (1 if "merged" in name else n_adapters + 1)
    for case in costs:
        assert 0 < case.value("cost_kl") < 0.5 and case.value("cost_top1") < 1
        assert {measured.limit for measured in case.measures} == {None}
        assert case.name == "base" or 0.8 < case.value("cost_effect") < 1.2


def test_a_merged_export_costs_are_put_beside_and_limits_of_the_cost_are_gates(exports, own):
    folder = own(exports["llama-int4"])
    report = checked(folder, merged=exports["llama-int4-merged"], tolerances={"cost_kl": 1e-6, "cost_effect": 0.5})
    names = [case.name for case in of_group(report, COST)]
    assert names == [
        "chat, quantized, then adapted", "code, quantized, then adapted", "chat, merged, then quantized", "base",
    ]  # fmt: skip
    assert {group for group, _ in failed(report)} == {COST} and len(failed(report)) == 4
    assert "nats; at most 1e-06 was asked for" in of_group(report, COST)[0].failures[0]
    assert not any("effect" in failure for case in report.cases for failure in case.failures)


def test_an_export_of_floats_has_no_limits_of_integers(exports, own):
    with pytest.raises(UsageProblem, match="a measure that there is not"):
        checked(own(exports["llama-merged"]), tolerances={"cost_kl": 1e-3})


def _in_place(name: str, change):
    return lambda folder: damage.stored(folder, name, change)


def _one_scale(scales: np.ndarray) -> np.ndarray:
    scales[3, 1] *= 1.02
    return scales


def _one_zero(zeros: np.ndarray) -> np.ndarray:
    zeros[3, 1] += 0.3
    return zeros


def _swapped(packed: np.ndarray) -> np.ndarray:
    return (packed >> 4) | (packed << 4)


def _off_by_one(packed: np.ndarray) -> np.ndarray:
    """One number of one weight, one step further."""
    low = packed[5, 1, 3] & 15
    packed[5, 1, 3] = (packed[5, 1, 3] & 0xF0) | (low + 1 if low < 15 else low - 1)
    return packed


def _without_zeros(folder: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if f"{DOWN}_Q4" in node.input)
        node.input[3] = ""

    damage.graph(folder, change)


def _quantize_adapter(folder: Path) -> None:
    """A pair rounded to 4 bits, a scale for all of each tensor."""

    def change(tensors: damage.Tensors) -> None:
        for name, tensor in tensors.items():
            step = np.abs(tensor).max() / 7
            tensors[name] = (np.round(tensor / step) * step).astype(tensor.dtype)

    damage.adapter(folder, "chat.onnx_adapter", change)


def _other_weights(folder: Path) -> None:
    """As if another layer's integers and scales had been written."""
    for part in ("_Q4", "_scales"):
        other = damage.weight_of(folder, DOWN.replace("layers.1", "layers.0") + part)
        damage.stored(folder, DOWN + part, lambda _, other=other: other)


def _other_order(folder: Path) -> None:
    """Of one product, scales that belong to other blocks."""

    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if f"{DOWN}_Q4" in node.input)
        scales = next(t for t in model.graph.initializer if t.name == f"{DOWN}_scales")
        values = numpy_helper.to_array(scales, base_dir=str(folder))
        scales.ClearField("external_data")
        scales.data_location = onnx.TensorProto.DEFAULT
        scales.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[:, ::-1]), scales.name))
        assert node.input[2] == scales.name

    damage.graph(folder, change)


OF_WEIGHTS = {
    "a scale of one block": _in_place(f"{DOWN}_scales", _one_scale),
    "nibbles in the other order": _in_place(f"{DOWN}_Q4", _swapped),
    "another layer's": _other_weights,
    "scales in the other order": _other_order,
    "zeros dropped": _without_zeros,
    "a scale of k-quant": _in_place(f"{DOWN}_scales", _one_scale),
    "a zero of hqq": _in_place(f"{DOWN}_zero_points", _one_zero),
}
# Where not the dynamic one.
DAMAGED = {
    "zeros dropped": "llama-int4-merged", "a scale of k-quant": "llama-k-quant", "a zero of hqq": "llama-hqq-merged",
}  # fmt: skip


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_damaged_integers_are_caught(name, exports, own, bases):
    """By the case of the weights, here alone: the graph agrees with whatever the file has."""
    folder = own(exports[DAMAGED.get(name, "llama-int4")])
    OF_WEIGHTS[name](folder)
    located = {record.name: Path(record.source.given) for record in read_manifest(folder).adapters}
    request = CheckRequest(folder, bases["llama"], located, "cpu", {})
    begun = begin_check(request)
    weight_cases(begun.examination)
    (case,) = begun.examination.cases
    assert DOWN in case.failures[0]


def test_one_wrong_number_fails_the_check(exports, own):
    folder = own(exports["llama-int4-merged"])
    damage.stored(folder, f"{DOWN}_Q4", _off_by_one)
    report = checked(folder)
    assert report.verdict is Verdict.FAIL and failed(report) == [("weights", "quantized weights")]


def _at_fifteen(folder: Path, floats: np.ndarray) -> None:
    """Every zero of one weight at the end of the grid, and of that grid the nearest integers."""
    scales = damage.weight_of(folder, f"{DOWN}_scales").astype(np.float64)
    place = np.round(floats / np.repeat(scales, 32, axis=1)[:, : floats.shape[1]] + 15)
    integers = np.clip(place, 0, 15).astype(np.uint8)
    integers = np.pad(integers, ((0, 0), (0, -integers.shape[1] % 32)))
    packed = integers[:, ::2] | (integers[:, 1::2] << 4)
    damage.stored(folder, f"{DOWN}_Q4", lambda before: packed.reshape(before.shape))
    damage.stored(folder, f"{DOWN}_zero_points", lambda before: np.full_like(before, 0xFF))


def test_wrong_zeros_throughout_fail_the_check(exports, own, bases):
    """All that else reads the file takes its numbers as it has them, and each is the best that its zero allows."""
    folder = own(exports["llama-int4-merged"])
    floats = load_file(bases["llama"] / "model.safetensors")[DOWN]  # the adapter leaves it as it is
    _at_fifteen(folder, floats.astype(np.float64))
    report = checked(folder)
    assert report.verdict is Verdict.FAIL and failed(report) == [("weights", "quantized weights")]
    (weights,) = of_group(report, "weights")
    assert weights.value("weights") < 1e-6 and weights.value("scales") < 1e-6 and weights.value("clipping") > 0.3
    (failure,) = weights.failures
    assert "a block's grid does not reach a weight" in failure and DOWN in failure


def test_a_quantized_adapter_fails_the_check(exports, own):
    folder = own(exports["llama-int4"])
    _quantize_adapter(folder)
    assert ("adapter", "chat") in failed(checked(folder))


def test_a_merged_export_without_its_adapter_is_caught(exports, own, bases, tmp_path):
    """The file's integers are then the base's, and the graph agrees with them."""
    how = Request(str(bases["llama"]), (), "merge", provider="cpu", quantization=read_manifest(
        exports["llama-int4-merged"]).quantization)  # fmt: skip
    export(how, ExportOptions(tmp_path / "base"))
    folder = own(exports["llama-int4-merged"])
    for file in ("model.onnx", "model.onnx.data"):
        (folder / file).write_bytes((tmp_path / "base" / file).read_bytes())
    report = checked(folder)
    assert ("weights", "quantized weights") in failed(report)


def test_every_kind_of_adapter_is_right_on_a_quantized_base_and_so_is_one_that_is_added(
    exports, bases, adapters, tmp_path
):
    """Pairs, DoRA, whose norm is of the dequantized weights, biases, tokens, a head, a gate."""
    how = replace(INT4, keep=("lm_head",), accuracy_level=0)
    spec = replace(EXPORTS["llama-kinds"], quantization=how)
    export_to(tmp_path / "out", spec, bases, adapters)
    add_adapter(tmp_path / "out", [(str(adapters["gains"]), "again")])
    first, second = (damage.tensors_of(tmp_path / f"out/adapters/{name}.onnx_adapter") for name in ("gains", "again"))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    remove_adapters(tmp_path / "out", ["again", "chat"])
    report = checked(tmp_path / "out")
    assert report.verdict is Verdict.PASS, failed(report)
    assert not of_group(report, "deployed")  # at that level nothing rounds


def test_activations_are_rounded_by_block():
    x = torch.tensor([[127.0, 1.4, -3.6, 0.0, 0.5, 0.25, 0.0, 0.0, 9.0]])
    found = rounded(x, 4)
    assert torch.equal(found[0, :4], torch.tensor([127.0, 1.0, -4.0, 0.0]))
    assert torch.allclose(found[0, 4:6], torch.tensor([0.5, 64 * 0.5 / 127])) and found[0, 8] == 9
    assert torch.equal(rounded(torch.zeros(2, 8), 4), torch.zeros(2, 8))
