"""Where ONNX Runtime's CUDA provider would put a graph's integers, reckoned without a GPU.

The rule is `GetCpuPreferredNodes` (onnxruntime/core/framework/fallback_cpu_capability.cc): a shape is on the CPU, and so is
what is computed of values on the CPU and small constants only, unless the operator reads them there as they are (Slice's
bounds, Range's operands). What one side makes and the other reads is copied at every run, and no CUDA graph is captured.
It gave the copies that an H200 had (`ci/benchmarks/results/gpu-provider.json`, placement).
"""

from __future__ import annotations

from pathlib import Path

import onnx

# The operands that CUDA's kernels read on the CPU.
_READ_ON_CPU = {
    "Slice": {1, 2, 3, 4}, "Reshape": {1}, "Expand": {1}, "Range": {0, 1, 2}, "TopK": {1}, "Unsqueeze": {1},
    "Squeeze": {1}, "ReduceSum": {1}, "ReduceMax": {1}, "ReduceMean": {1}, "ConstantOfShape": {0}, "Tile": {1},
    "CumSum": {1}, "Split": {1}, "GroupQueryAttention": {6}, "Pad": {1, 3},
}  # fmt: skip
_MADE_ON_CPU = ("Shape", "Size")


def copies(path: Path) -> set[str]:
    """The values of a graph that are copied between CPU and GPU, with the operator that reads them there."""
    graph = onnx.load(str(path), load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type != "Constant"]
    constants = {each.name for each in graph.initializer}
    constants |= {name for node in graph.node if node.op_type == "Constant" for name in node.output} | {""}
    given = {each.name for each in graph.input} - constants
    on_cpu = {name for node in nodes if node.op_type in _MADE_ON_CPU for name in node.output}
    found = set()
    for node in nodes:
        if node.op_type in _MADE_ON_CPU:
            continue
        read = {name: _READ_ON_CPU.get(node.op_type, ()) for name in node.input if name not in constants}
        places = [(index, name) for index, name in enumerate(node.input) if name not in constants]
        follows = any(name in on_cpu for _, name in places) and all(
            name in given or (name in on_cpu and index not in read[name]) for index, name in places
        )
        if follows:
            on_cpu.update(node.output)
        for index, name in places:
            is_wanted_on_cpu = follows or index in read[name]
            if is_wanted_on_cpu != (name in on_cpu or (follows and name in given)):
                found.add(f"{name} for {node.op_type}")
    return found
