"""Nothing is copied between CPU and GPU at every run: a copy waits for the GPU, and then no CUDA graph is captured."""

from __future__ import annotations

import onnx
import pytest
from cuda_placement import copies


@pytest.mark.parametrize(
    "export", ["llama-cuda", "llama-cuda-base", "llama-dynamic", "llama-f16", "bert-dynamic", "vit-dynamic"]
)
def test_no_value_is_copied_at_every_run(export, exports):
    assert copies(exports[export] / "model.onnx") == set()


def test_the_reckoning_finds_copies(tmp_path):
    """A length, which is on the CPU, is added to what is on the GPU; and a bound is on the GPU."""
    graph = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]>
        g (int64[b, n] mask, int64 k) => (int64[b, n] y, int64[b, m] z) {
            axes = Constant<value = int64[1] {1}>()
            last = Constant<value = int64[1] {9}>()
            length = Shape<start = 1, end = 2>(mask)
            negative = Neg(mask)
            y = Add(negative, length)
            shape = Constant<value = int64[1] {1}>()
            first = Reshape(k, shape)
            z = Slice(mask, first, last, axes)
        }""")
    onnx.save(graph, tmp_path / "model.onnx")
    assert copies(tmp_path / "model.onnx") == {"length for Add", "first for Slice"}
