"""Decomposing operator by operator: the same graph as torch.onnx's own way, and its own way for all else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch.onnx._internal.exporter import _fx_passes

from lora_export.base import decompose as module
from lora_export.base.decompose import decompose, decomposed_by_operator


class Casts(torch.nn.Module):
    """Every kind of operator that has a counterpart."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        keep = (mask > 0).to(torch.bool) & (mask < 9) | mask.to(torch.int64).eq(3)
        y = x.to(torch.float64).to("cpu").transpose(0, 1).contiguous().reshape(-1, 2)
        return y.to(torch.float32).reshape(x.shape[1], -1) * keep.to(torch.float32).sum()


class Writes(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[0].add_(1.0)
        return y * 2


class WritesUnseen(torch.nn.Module):
    """As T5's buckets: into what was just computed. With the smaller and the larger of two."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y += torch.min(x, torch.full_like(x, 0.5))
        return y - torch.max(x, -x)


class WritesWhatIsReadLater(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        z = y.view(-1)
        y += 1
        return z + 1


class WritesItsInput(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1.0) * 2


class CastsItsOutput(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 2).to(torch.float32)


class Unregistered(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.log_ndtr(x) + 1


def implemented() -> frozenset:
    from torch.onnx._internal.exporter._decomp import get_onnx_implemented_overloads
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    return frozenset(get_onnx_implemented_overloads(ONNXRegistry.from_torchlib()))


def exported(network: torch.nn.Module, *inputs: torch.Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(network, inputs)


def run(network: torch.nn.Module, *inputs: torch.Tensor) -> np.ndarray:
    program = torch.onnx.export(network, inputs, dynamo=True, verbose=False)
    session = ort.InferenceSession(ir.to_proto(program.model).SerializeToString())
    feeds = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return session.run(None, feeds)[0]


def test_what_has_a_counterpart_is_replaced_one_by_one():
    inputs = torch.randn(4, 6), torch.arange(12)
    program = exported(Casts(), *inputs)
    known = implemented()
    assert decompose(program, known)
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert targets <= known | module._ASSERTIONS
    torch.testing.assert_close(program.module()(*inputs), Casts()(*inputs))


def test_a_write_that_nothing_else_reads_is_a_computation():
    x = torch.randn(3, 2)
    program = exported(WritesUnseen(), x)
    assert any(node.target is torch.ops.aten.add_.Tensor for node in program.graph.nodes)
    known = implemented()
    assert decompose(program, known)
    assert {node.target for node in program.graph.nodes if node.op == "call_function"} <= known
    torch.testing.assert_close(program.module()(x), WritesUnseen()(x))


@pytest.mark.parametrize(
    "network", [Writes(), WritesWhatIsReadLater(), WritesItsInput(), CastsItsOutput(), Unregistered()]
)
def test_all_else_is_left_to_torch(network):
    program = exported(network, torch.randn(3, 2))
    before = str(program.graph)
    assert not decompose(program, implemented())
    assert str(program.graph) == before


@pytest.mark.parametrize("network", [Casts(), Writes(), WritesUnseen(), WritesWhatIsReadLater(), CastsItsOutput()])
def test_the_graph_computes_what_the_module_does(network):
    inputs = (torch.randn(4, 6), torch.arange(12))[: 2 if isinstance(network, Casts) else 1]
    with decomposed_by_operator():
        found = run(network, *inputs)
    np.testing.assert_allclose(found, network(*inputs).numpy(), rtol=1e-6)


def test_torch_is_left_as_it_was():
    original = _fx_passes.decompose_with_registry
    with pytest.raises(ZeroDivisionError), decomposed_by_operator():
        assert _fx_passes.decompose_with_registry is not original
        raise ZeroDivisionError
    assert _fx_passes.decompose_with_registry is original


def test_another_torch_decomposes_as_ever(monkeypatch):
    monkeypatch.delattr(_fx_passes, "decompose_with_registry")
    with decomposed_by_operator():
        assert not hasattr(_fx_passes, "decompose_with_registry")
