"""Runs of restored exports side by side: everything bound on the device, with and without a CUDA graph.

Only ratios of one race are compared; the samples are those of `lora_export.bench.latency`.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort

from lora_export.artifact import read_manifest
from lora_export.bench.intervals import paired_ratio
from lora_export.bench.latency import SAMPLE_SECONDS, Timing, take_blocks
from lora_export.bench.results import Variant
from lora_export.bench.workloads import random_inputs
from lora_export.contract import GraphContract
from lora_export.runtime.arrays import numpy_dtype, to_ort_value
from lora_export.runtime.cache import with_room, written_in_place
from lora_export.runtime.session import open_session

Values = Mapping[str, ort.OrtValue]
Run = Callable[[], None]


def adapter_arrays(contract: GraphContract, rows: int, rank: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random A and B for every module: `[rows, in, rank]` and `[rows, rank, out]`; rank 0 for no adapter.

    A pair that modules share has the rank of all of them.
    """
    rng, found = np.random.default_rng(seed), {}
    for entry in contract.adapter_inputs:
        own = rank * len(entry.modules)
        dims = [size if isinstance(size, int) else rows if axis == 0 else own for axis, size in enumerate(entry.dims)]
        found[entry.name] = (rng.standard_normal(dims, np.float32) * 0.02).astype(numpy_dtype(entry.dtype))
    return found


def bound(session: ort.InferenceSession, inputs: Values, outputs: Values) -> Run:
    """A run with everything bound, which it holds as `inputs` and `outputs`; returns when the device is done."""
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, value)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    run.inputs, run.outputs = inputs, outputs
    return run


@contextlib.contextmanager
def noted(failed: dict, name: str) -> Iterator[None]:
    """Note under `name` what ONNX Runtime, or our own refusal to run off the GPU, raises; anything else passes."""
    try:
        yield
    except Exception as error:
        known = type(error).__module__.startswith(("onnxruntime", "lora_export"))
        if not known and not isinstance(error, RuntimeError):  # what a bound run raises
            raise
        failed[name] = f"{type(error).__name__}: {str(error)[:500]}"


@dataclass
class Device:
    """A device, and one output buffer there for all graphs with that output."""

    provider: str
    outputs: dict[tuple, ort.OrtValue] = field(default_factory=dict)

    def values(self, arrays: Mapping[str, np.ndarray]) -> dict[str, ort.OrtValue]:
        return {name: to_ort_value(array, self.provider) for name, array in arrays.items()}

    def bound_run(
        self, session: ort.InferenceSession, feeds: Values, shapes: Mapping[str, tuple], written: Values | None = None
    ) -> Run:
        """A run with `feeds` and this device's output buffers bound; returns when the device is done.

        Args:
            shapes: `(dimensions, element type)` of each output.
            written: The outputs that have buffers already.
        """
        names = {value.name for value in (*session.get_inputs(), *session.get_overridable_initializers())}
        outputs = dict(written or {})
        for name in (output.name for output in session.get_outputs() if output.name not in outputs):
            key = (name, *shapes[name])
            if key not in self.outputs:
                self.outputs[key] = ort.OrtValue.ortvalue_from_shape_and_type(*shapes[name], self.provider, 0)
            outputs[name] = self.outputs[key]
        return bound(session, {name: value for name, value in feeds.items() if name in names}, outputs)


def output_shapes(contract: GraphContract, sizes: Mapping[str, int]) -> dict[str, tuple]:
    """`(dimensions, element type)` of each output for the sizes of the contract's axes.

    `past_sequence_length + sequence_length` is an axis whose size is that of its terms together.
    """
    found = {}
    for spec in contract.outputs:
        terms = [str(size).split(" + ") for size in spec.dims]
        dims = tuple(sum(int(term) if term.isdigit() else sizes[term] for term in each) for each in terms)
        element = 16 if spec.dtype == "bfloat16" else np.dtype(spec.dtype).type
        found[spec.name] = (dims, element)
    return found


@dataclass(frozen=True)
class Candidate:
    """What is timed: an export, the rows of its adapters (0: the graph has none) and their rank."""

    name: str
    folder: Path
    rows: int = 0
    rank: int = 0
    cuda_graph: bool = False


def candidate_runs(
    candidates: Sequence[Candidate], provider: str, shape: tuple[int, int, int], vocabulary: int, sessions: dict
) -> tuple[dict[str, Run], dict[str, str]]:
    """Runs by name for a batch, new tokens and past; and what kept the others from running.

    Args:
        sessions: Of earlier calls, by folder and capture; extended.
    """
    device, runs, failed = Device(provider), {}, {}
    batch, sequence, past = shape
    for each in candidates:
        contract = read_manifest(each.folder).contract
        sizes = {"batch_size": batch, "sequence_length": sequence, "past_sequence_length": past}
        sizes |= {"total_sequence_length": sequence + past, "num_logits": sequence}
        with noted(failed, each.name):
            # A captured graph replays one shape and one set of buffers, so its session serves one candidate.
            key = (each.folder, (each.name, shape) if each.cuda_graph else None)
            if key not in sessions:
                graph = each.folder / "model.onnx"
                sessions[key] = open_session(graph, provider, stop_spinning=True, cuda_graph=each.cuda_graph)
            inputs = with_room(random_inputs(contract, vocabulary, (batch, sequence, past)), contract)
            if each.rows:
                inputs |= adapter_arrays(contract, each.rows, each.rank)
            feeds = device.values(inputs)
            shapes, written = output_shapes(contract, sizes), written_in_place(contract, feeds)
            run = device.bound_run(sessions[key], feeds, shapes, written)
            run()
            runs[each.name] = run
    return runs, failed


# What one race may last, warm-up left out.
_MOST_SECONDS = 45.0


def race(runs: Mapping[str, Run], pairs: Sequence[tuple[str, str]], blocks: int) -> dict:
    """Time `runs` in ABBA blocks; samples, medians, and the ratios of `pairs` (variant, reference) with intervals.

    Slow runs get fewer blocks, at least 6: with fewer, a median has no interval of 95 %.
    """
    one_of_each = sum(max(_seconds(run), SAMPLE_SECONDS) for run in runs.values())
    blocks = min(blocks, max(6, int(_MOST_SECONDS / (2 * one_of_each))))
    timings = [Timing([], []) for _ in runs]
    for _ in take_blocks(list(runs.values()), blocks, timings):
        pass
    variants = {name: _variant(name, timing) for name, timing in zip(runs, timings, strict=True)}
    ratios = [paired_ratio(variants[v], variants[r], None) for v, r in pairs if v in variants and r in variants]
    return {
        "blocks": blocks,
        "median_ms": {name: statistics.median(each.fastest_ms) for name, each in variants.items()},
        "fastest_ms": {name: each.fastest_ms for name, each in variants.items()},
        "warm_up": {name: [asdict(warm) for warm in each.warm_ups] for name, each in variants.items()},
        "ratios": [
            {
                "variant": each.variant,
                "reference": each.against,
                "median": each.median,
                "low": each.low,
                "high": each.high,
            }
            for each in ratios
        ],
    }


def _variant(name: str, timing: Timing) -> Variant:
    samples, fastest = zip(*timing.samples_ms, strict=True)
    return Variant(name, "", samples, fastest, statistics.median(samples), 0.0, tuple(timing.warm_ups))


def _seconds(run: Run) -> float:
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratio_lines(found: Mapping) -> list[str]:
    """The ratios of a race as lines of text."""
    lines = []
    for entry in found["ratios"]:
        ms = found["median_ms"]
        lines.append(
            f"  {entry['variant']:34} {ms[entry['variant']]:9.3f} ms  {entry['median']:.3f} × {entry['reference']}"
            f" ({ms[entry['reference']]:.3f} ms), {entry['low']:.3f} to {entry['high']:.3f}"
        )
    return lines
