"""Questions about ONNX Runtime's CUDA provider that decide the dynamic graph's design, answered by running them.

1. Do rank-0 operands work (`[1, in, 0]` by `[1, 0, out]`) in MatMul, and in Gemm?
2. What does a `[1, in, rank]` operand cost against a 2-D one?
3. Does Python's `LoraAdapter` copy its weights from host to device at every run, and what does that cost?
4. Does a replayed CUDA graph use an adapter that was written in place?
5. Which operators of an exported graph run off the GPU, and what is copied between host and device?
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from gpu.bundle import restore
from gpu.stage import Stage
from gpu.timing import Device, adapter_arrays, noted, output_shapes
from lora_export.artifact import read_manifest
from lora_export.bench.workloads import random_inputs
from lora_export.runtime.session import open_session, placement

_IN, _OUT, _RANK, _TOKENS, _BATCH = 1024, 1024, 8, 128, 4


def graph(op_type: str, a_dims: list, b_dims: list, x_dims: list, dtype: ir.DataType) -> ir.Model:
    """`y = (x op A) op B` with A and B as inputs."""

    def value(name: str, dims: list) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims))

    x, a, b = value("x", x_dims), value("a", a_dims), value("b", b_dims)
    low = ir.node(op_type, [x, a])
    high = ir.node(op_type, [low.outputs[0], b])
    high.outputs[0].name, high.outputs[0].dtype = "y", dtype
    built = ir.Graph([x, a, b], high.outputs, nodes=[low, high], opset_imports={"": 20}, name="question")
    return ir.Model(built, ir_version=10)


def session_of(model: ir.Model, provider: str) -> ort.InferenceSession:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path)
        return open_session(path, provider)


def answer_rank_zero(provider: str) -> dict[str, str]:
    """For each operator and dtype: "zeros" if a rank-0 pair yields zeros, else what happened."""
    found = {}
    for dtype, numpy_dtype in ((ir.DataType.FLOAT, np.float32), (ir.DataType.FLOAT16, np.float16)):
        for op_type, lead in (("MatMul", [1]), ("MatMul", []), ("Gemm", [])):
            x_shape = [*([2] if lead else []), 3, _IN]
            a, b = [*lead, _IN, "r"], [*lead, "r", _OUT]
            feeds = {
                "x": np.ones(x_shape, numpy_dtype),
                "a": np.zeros([*lead, _IN, 0], numpy_dtype),
                "b": np.zeros([*lead, 0, _OUT], numpy_dtype),
            }
            name = f"{op_type} {len(a)}-D {np.dtype(numpy_dtype)}"
            try:
                y = session_of(graph(op_type, a, b, x_shape, dtype), provider).run(None, feeds)[0]
                found[name] = "zeros" if not y.any() and y.shape[-1] == _OUT else f"wrong: max {np.abs(y).max()}"
            except Exception as error:
                if not type(error).__module__.startswith("onnxruntime"):
                    raise
                found[name] = f"error: {str(error)[:200]}"
    return found


def median_us(run: Callable[[], None], n: int = 200) -> float:
    """Median microseconds of `run` after a warm-up."""
    for _ in range(20):
        run()
    samples = []
    for _ in range(n):
        start = time.perf_counter()
        run()
        samples.append((time.perf_counter() - start) * 1e6)
    return statistics.median(samples)


def bound(session: ort.InferenceSession, feeds: dict[str, np.ndarray], provider: str) -> Callable[[], None]:
    held = {name: ort.OrtValue.ortvalue_from_numpy(array, provider, 0) for name, array in feeds.items()}
    binding = session.io_binding()
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, provider, 0)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    run.held = held
    return run


def answer_operand_rank(provider: str) -> dict[str, float]:
    """Median microseconds of a pair with 2-D, `[1, …]` and `[batch, …]` operands, and their ratios to 2-D."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((_BATCH, _TOKENS, _IN)).astype(np.float32)
    found = {}
    for label, lead in (("2-D", []), ("[1, in, rank]", [1]), ("[batch, in, rank]", [_BATCH])):
        a = rng.standard_normal([*lead, _IN, _RANK]).astype(np.float32)
        b = rng.standard_normal([*lead, _RANK, _OUT]).astype(np.float32)
        model = graph("MatMul", list(a.shape), list(b.shape), list(x.shape), ir.DataType.FLOAT)
        found[label] = median_us(bound(session_of(model, provider), {"x": x, "a": a, "b": b}, provider))
    return found | {f"{name} / 2-D": value / found["2-D"] for name, value in list(found.items())[1:]}


def answer_adapter_copies(provider: str) -> dict[str, float]:
    """Median microseconds with `LoraAdapter` and with the same tensors bound on the device (64 pairs)."""
    n_pairs = 64
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 16, _IN]))
    inputs, nodes, arrays, current = [x], [], {}, x
    for index in range(n_pairs):
        for side, dims in (("a", [1, _IN, "r"]), ("b", [1, "r", _IN])):
            name = f"{side}{index}"
            value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(dims))
            value.const_value = ir.tensor(np.zeros([0 if d == "r" else d for d in dims], np.float32), name=name)
            arrays[name] = rng.standard_normal([_RANK if d == "r" else d for d in dims]).astype(np.float32) * 0.01
            inputs.append(value)
            nodes.append(ir.node("MatMul", [current, value]))
            current = nodes[-1].outputs[0]
    current.name, current.dtype = "y", ir.DataType.FLOAT
    built = ir.Graph(inputs, [current], nodes=nodes, initializers=inputs[1:], opset_imports={"": 20}, name="copies")
    session = session_of(ir.Model(built, ir_version=10), provider)
    x_array = np.ones((1, 16, _IN), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.onnx_adapter"
        packed = ort.AdapterFormat()
        packed.set_adapter_version(1)
        packed.set_model_version(1)
        packed.set_parameters({n: ort.OrtValue.ortvalue_from_numpy(v) for n, v in arrays.items()})
        packed.export_adapter(str(path))
        adapter = ort.LoraAdapter()
        adapter.Load(str(path))
        options = ort.RunOptions()
        options.add_active_adapter(adapter)
        active = median_us(lambda: session.run(None, {"x": x_array}, options), 50)
    on_device = median_us(bound(session, {"x": x_array} | arrays, provider), 50)
    return {"LoraAdapter": active, "bound": on_device, "LoraAdapter / bound": active / on_device}


def answer_placement(stage: Stage) -> dict[str, dict]:
    """Of each export: operators by provider, and the copies between host and device that ONNX Runtime adds."""
    found, failed = {}, {}
    for folder in sorted((stage.bundle / "exports").iterdir()):
        graph = restore(stage.bundle, folder.name, stage.work) / "model.onnx"
        written = stage.work / "optimized.onnx"
        with noted(failed, folder.name):
            session = open_session(graph, stage.provider, optimized=written)
            placed = {name: dict(count) for name, count in placement(session).items()}
            nodes = Counter(node.op_type for node in onnx.load(str(written), load_external_data=False).graph.node)
            copies = {op: n for op, n in nodes.items() if op.startswith("Memcpy")}
            found[folder.name] = placed | {"copies": copies}
        for file in stage.work.glob("optimized.onnx*"):
            file.unlink()
    return found | {name: {"error": why} for name, why in failed.items()}


def answer_cuda_graph(stage: Stage) -> dict[str, float | str]:
    """Does a replayed CUDA graph use an adapter that was written in place? Largest differences to a plain session:
    before and after the swap, and between the two adapters."""
    folder = restore(stage.bundle, "encoder-dynamic-float16", stage.work)
    contract = read_manifest(folder).contract
    device = Device(stage.provider)
    inputs = device.values(random_inputs(contract, 1000, (2, 16, 0)))
    first, second = (adapter_arrays(contract, 1, 8, seed) for seed in (1, 2))
    shapes = output_shapes(contract, {"batch_size": 2, "sequence_length": 16})
    plain = open_session(folder / "model.onnx", stage.provider)
    captured = open_session(folder / "model.onnx", stage.provider, cuda_graph=stage.provider == "cuda")
    name = plain.get_outputs()[0].name

    def output(session: ort.InferenceSession, adapters: Mapping[str, ort.OrtValue]) -> np.ndarray:
        run = device.bound_run(session, {**inputs, **adapters}, shapes)
        run()
        return run.outputs[name].numpy().astype(np.float32)

    expected = [output(plain, device.values(arrays)) for arrays in (first, second)]
    held = device.values(first)
    run = device.bound_run(captured, {**inputs, **held}, shapes)
    for _ in range(3):
        run()
    before = run.outputs[name].numpy().astype(np.float32)
    for each, value in held.items():
        value.update_inplace(second[each])
    run()
    after = run.outputs[name].numpy().astype(np.float32)
    return {
        "before the swap": float(np.abs(before - expected[0]).max()),
        "after the swap": float(np.abs(after - expected[1]).max()),
        "between the adapters": float(np.abs(expected[1] - expected[0]).max()),
    }


def run(stage: Stage) -> dict:
    """Answer all questions; each answer is saved as it comes."""
    answers: dict = {}

    def answered(name: str, answer: Callable[[], object]) -> None:
        with noted(answers, name):
            answers[name] = answer()
        stage.say(name, [json.dumps(answers[name], ensure_ascii=False)[:1500]])
        stage.save({"answers": answers})

    answered("rank 0", lambda: answer_rank_zero(stage.provider))
    answered("operand rank, µs", lambda: answer_operand_rank(stage.provider))
    answered("adapter copies, µs", lambda: answer_adapter_copies(stage.provider))
    answered("CUDA graph", lambda: answer_cuda_graph(stage))
    answered("placement", lambda: answer_placement(stage))
    return {"answers": answers}
