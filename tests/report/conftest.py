"""Hand-built reports: a passing and a failing check, a gated and an ungated bench, with names that need escaping."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from lora_export.bench.results import (
    BenchReport,
    Difference,
    Memory,
    ProviderOperators,
    Ratio,
    Swap,
    Variant,
    WarmUp,
    Workload,
)
from lora_export.check.divergence_results import ComparedValue, Divergence, LayerErrors, Reproduction
from lora_export.check.judge.tolerances import tolerances
from lora_export.check.results import BothSides, CheckReport, Measured, ParityCase, Rounding
from lora_export.extract.results import ExtractReport, LeftOut, ModuleResult, WholeResult
from lora_export.fleet.outcomes import AdapterOutcome, FleetReport, Outcome
from lora_export.verdict import Environment, Subject, Verdict

LIMITS = tolerances("float32", "cpu", {"kl": 1e-6}).recorded
HOSTILE = "<script>alert('x')</script> & \"a|b\""


@pytest.fixture
def hostile() -> str:
    return HOSTILE


@pytest.fixture
def environment() -> Environment:
    return Environment(
        provider="cpu",
        provider_reason="no GPU was found",
        device="CPU",
        cpu="AMD EPYC 7763 64-Core Processor",
        n_cores=2,
        python="3.11.7",
        platform="Linux-6.1-x86_64",
        versions={"onnxruntime": "1.23.0", "peft": "0.17.1", "torch": "2.8.0+cpu", "lora-export": "0.1.0"},
        settings={"intra_op_num_threads": "2", "graph_optimization_level": "all"},
        started_at="2025-11-23T18:40:12Z",
    )


@pytest.fixture
def subject() -> Subject:
    return Subject(
        folder="out/topic-kind",
        kind="dynamic",
        task="text-classification",
        dtype="float32",
        base="sentence-transformers/all-MiniLM-L6-v2",
        fused_for="cpu",
        adapters=("topic", "kind", HOSTILE),
        graph_sha256="9f2c" * 16,
        n_bytes={
            "model.onnx": 812_345,
            "model.onnx.data": 90_523_776,
            "adapters/topic.onnx_adapter": 1_204_224,
            "lora_export.json": 912,
        },
    )


def _case(name: str, group: str = "adapter", reference: str = "PEFT with the adapter active", **changes) -> ParityCase:
    """A passing case with all measures but `rounding` and `perplexity`; a change named after a measure is its value,
    None to leave it out."""
    values = {"error": 3.0e-07, "kl": 2.1e-12, "top1": 1.0, "effect": 2.8e06, "effect_share": 1.0}
    limits = {"error": 1e-4, "kl": 1e-6, "top1": 0.999, "effect": 100.0, "effect_share": 1e-4,
              "rounding": 2.0, "perplexity": 1e-4}  # fmt: skip
    values |= {name: changes.pop(name) for name in list(changes) if name in limits}
    measures = tuple(Measured.of(name, value, limits[name]) for name, value in values.items() if value is not None)
    figures = {"largest_error": 1.5e-06, "largest_effect": 4.2} | changes
    return ParityCase(name, group, reference, 256, measures, **figures)


WIDER = Rounding(1.1e-07, 1.3e-07, 9.0e-07, 1.2e-06, 3e-13, 4e-13, 1.0, 0.9998, 12.345678)


def _precise(case: ParityCase) -> ParityCase:
    """With what a run at a wider dtype and a language model's data add."""
    return replace(case, rounding=WIDER, perplexity=BothSides(12.345679, 12.345681))


def _value(module: str, place: int, error: float, what: str = "output", shape: tuple[int, ...] = (1, 7, 32)):
    names = (f"value_{place}", f"node_{place}", "MatMul")
    return ComparedValue("model", module, what, *names, shape, (1, 7, 32), error, error / 4, not error < 1e-3)


def _layers() -> tuple[LayerErrors, ...]:
    """Twelve modules of two adapters and the base, some exact; one adapter's names need escaping."""
    paths = [f"encoder.layer.{n // 4}.{['attention.query', 'mlp.up', 'mlp.down', 'norm'][n % 4]}" for n in range(12)]
    return tuple(
        LayerErrors(
            name,
            "row 3 of 16, which has the largest error, alone",
            tuple(_value(path, n, scale * n * 1e-7) for n, path in enumerate(paths)),
            not_seen=("router",) if name == "topic" else (),
        )
        for name, scale in (("topic", 1.0), (HOSTILE, 2.0), ("base", 0.5))
    )


def _divergence() -> Divergence:
    compared = (
        _value("layer.0.query", 0, 1e-6, "input"),
        _value("layer.0.query", 1, math.inf, "lora_A", (1, 7, 0)),
        _value("layer.0.query", 2, 0.3),
        _value("", 3, 0.82, "logits"),
    )
    return Divergence(
        "swapped <b>names</b>",
        "row 5 of 16, which has the largest error, alone",
        1e-4,
        "layer.0.query: MatMul node_1 is the first node that differs from PyTorch: its shape is another.",
        "model", "layer.0.query", "node_1", "MatMul", "value_1", ("value_0", HOSTILE), ("value_0",), 1, compared,
        Reproduction("reports/reproduce.py", "reports/reproduce.npz", "logits", 0.82, 1e-4),
    )  # fmt: skip


@pytest.fixture
def passing_check(subject: Subject, environment: Environment) -> CheckReport:
    without = {"effect": None, "effect_share": None, "largest_effect": None}
    cases = (
        _case("base", "base", "the base in PyTorch", error=2e-07, largest_error=9.5e-07, **without),
        _precise(_case("topic", rounding=1.18, perplexity=1.6e-07, accuracy=BothSides(0.941, 0.941))),
        _case("kind", error=4.8e-07, largest_error=2.4e-06, effect=5.5e05, largest_effect=1.31, top1=0.99996),
        _case(HOSTILE, error=0.0, largest_error=0.0, effect=math.inf),
        _case("mixed rows", "rows", error=6.2e-05, largest_error=3.3e-05, effect=1.3e05),
        _case("topic → kind → topic → none", "sequence", kl=None, top1=None),
    )
    data = ("topics.jsonl, 256 rows", "random token ids, seed 7")
    skipped = ("Decoding: the task has no cache.",)
    return CheckReport(subject, environment, data, cases, LIMITS, skipped, seconds=41.26, layers=_layers())


@pytest.fixture
def failing_check(passing_check: CheckReport, subject: Subject, environment: Environment) -> CheckReport:
    swapped = _case(
        "swapped <b>names</b>", error=0.82, largest_error=0.82, effect=1.34, largest_effect=1.1, top1=0.61,
        accuracy=BothSides(0.941, 0.508),
        failures=("The relative error 8.2e-01 exceeds 1.0e-04.", "The effect is only 1.3 times the error; 100 are needed."),
    )  # fmt: skip
    broken = _case(
        "half precision", error=math.nan, largest_error=math.nan, kl=math.inf, effect=math.nan, largest_effect=math.inf,
        failures=("ONNX Runtime returned NaN in 12 of 256 rows.",),
    )  # fmt: skip
    cases = (*passing_check.cases, swapped, broken)
    layers = (*passing_check.layers, LayerErrors("broken", "row 2 of 8", (_value("layer.0", 0, math.nan),)))
    return CheckReport(subject, environment, (), cases, LIMITS, (), 131.0, layers, _divergence())


@pytest.fixture
def gpu_check(passing_check: CheckReport, environment: Environment, subject: Subject) -> CheckReport:
    on_gpu = replace(environment, provider="cuda", provider_reason="asked for", device="NVIDIA H100")
    return replace(passing_check, environment=on_gpu, subject=replace(subject, fused_for="cuda"))


@pytest.fixture
def stopped_check(passing_check: CheckReport) -> CheckReport:
    return replace(passing_check, cases=passing_check.cases[:2], stopped="RuntimeError: the <b>session</b> fell over")


@pytest.fixture
def stopped_bench(gated_bench: BenchReport) -> BenchReport:
    first = replace(gated_bench.workloads[0], ratios=gated_bench.workloads[0].ratios[:1])
    return replace(gated_bench, workloads=(first,), memory=(), stopped="MemoryError")


@pytest.fixture
def empty_check(subject: Subject, environment: Environment) -> CheckReport:
    return CheckReport(subject, environment, (), (), LIMITS, (), seconds=0.4)


def _variant(name: str, centre: float, n: int, seed: int, description: str = "") -> Variant:
    noise = random.Random(seed)
    samples = tuple(centre * (1 + 0.03 * noise.expovariate(1)) for _ in range(n))
    median = sorted(samples)[n // 2]
    return Variant(
        name, description or f"the {name} graph", samples, samples, median, 8000 / median, (WarmUp(40, 0.2, True),) * 4
    )


def _ratio(variant: str, low: float, median: float, high: float, allowance: float | None, verdict: Verdict) -> Ratio:
    return Ratio(variant, "merged", median, low, high, 0.9611, (median,) * 21, allowance, verdict)


@pytest.fixture
def gated_bench(subject: Subject, environment: Environment) -> BenchReport:
    """One ratio of each verdict; one variant with a straggler far beyond the rest."""
    merged = _variant("merged", 11.9, 300, 1)
    dynamic = _variant("dynamic", 12.2, 300, 2, description="adapter given as inputs")
    slow = Variant("mixed rows", "one adapter a row", (*_variant("", 12.9, 60, 3).samples_ms, 480.0), (), 13.1, 610.0)
    first = Workload(8, 128, 0, (_variant("base", 11.8, 300, 4), merged, dynamic, slow), (
        _ratio("dynamic", 1.012, 1.031, 1.048, 1.05, Verdict.PASS),
        _ratio("mixed rows", 1.021, 1.049, 1.083, 1.05, Verdict.AMBIGUOUS),
        _ratio("base", 0.981, 0.992, 1.001, None, Verdict.NOT_GATED),
    ))  # fmt: skip
    second = Workload(1, 1, 512, (_variant("merged", 0.84, 40, 5), _variant(HOSTILE, 0.97, 40, 6)), (
        _ratio(HOSTILE, 1.122, 1.154, 1.181, 1.05, Verdict.FAIL),
    ))  # fmt: skip
    memory = (
        Memory("merged", "process", 212.4, 250.0, Verdict.PASS),
        Memory("dynamic", "process", 231.9, None, Verdict.NOT_GATED),
        Memory(HOSTILE, "process", math.nan, None, Verdict.NOT_GATED),
    )
    swaps = (
        Swap("bound", (12.0, 12.34, 13.1), 12.34, 12.0, 13.1, 0.75, 50.0, Verdict.PASS),
        Swap("loaded", (1790.0, 1830.0, 1950.0), 1830.0, 1790.0, 1950.0, 0.75, None, Verdict.NOT_GATED),
    )
    kinds = {"MatMul": 74, "Add": 60, "SkipLayerNormalization": 24, "Gather": 5, "Shape": 4, HOSTILE: 1}
    placements = (
        ProviderOperators("base", "model", "CUDAExecutionProvider", kinds),
        ProviderOperators("base", "model", "CPUExecutionProvider", {"Shape": 3}),
        ProviderOperators("export", "model", "CUDAExecutionProvider", {"MatMul": 146, "Add": 132}),
    )
    notes = ("Both cores were shared with other processes.", f"A note with {HOSTILE}")
    return BenchReport(subject, environment, (first, second), swaps, memory, placements, notes, seconds=83.5)


@pytest.fixture
def noisy_bench(gated_bench: BenchReport) -> BenchReport:
    """Ratios whose intervals are wide."""
    ratio = replace(_ratio("dynamic", 0.96, 1.002, 1.085, None, Verdict.NOT_GATED), block_ratios=(1.002,) * 8)
    return replace(gated_bench, workloads=(replace(gated_bench.workloads[0], ratios=(ratio, ratio)),))


@pytest.fixture
def compared_bench(gated_bench: BenchReport, subject: Subject) -> BenchReport:
    """Another export beside it, with a ratio that fails; a swap that fails and a memory that fails."""
    workload = gated_bench.workloads[0]
    against = Ratio("dynamic", "against", 1.06, 1.04, 1.08, 0.9611, (1.06,) * 21, 1.02, Verdict.FAIL)
    variants = (*workload.variants, _variant("against", 11.5, 300, 8))
    workload = replace(workload, variants=variants, ratios=(*workload.ratios[:2], against))
    swap = replace(gated_bench.swaps[0], allowance_us=10.0, verdict=Verdict.FAIL)
    memory = Memory("dynamic", "device", 912.0, 900.0, Verdict.FAIL)
    other = replace(subject, folder="yesterday/topic-kind", adapters=("topic",), graph_sha256="aa11" * 16)
    differences = (
        Difference("8 × 128 tokens", "base", ("logits",), 2.1, 0.3, None, Verdict.NOT_GATED),
        Difference("8 × 128 tokens", "dynamic", ("logits",), 1.5e-6, 2e-7, 1e-7, Verdict.FAIL),
        Difference("8 × 128 tokens", "pooled", (), None, None, 1e-7, Verdict.FAIL),
    )
    return replace(
        gated_bench, workloads=(workload,), swaps=(swap,), memory=(memory,), against=other, differences=differences
    )


@pytest.fixture
def ungated_bench(subject: Subject, environment: Environment) -> BenchReport:
    """Images, no swap, no memory, no notes, and a variant without runs."""
    none = Variant("none", "never ran", (), (), math.nan, math.nan)
    workload = Workload(4, 0, 0, (_variant("merged", 25.0, 12, 7), none), ())
    return BenchReport(subject, environment, (workload,), (), (), (), (), seconds=5.0)


@pytest.fixture
def mixed_fleet(environment: Environment) -> FleetReport:
    """An adapter of each outcome, one of them known from an earlier run, with reasons as long as they come."""
    served = AdapterOutcome(
        "topic", "customers/topic", Outcome.SERVED, seconds=1.3, n_bytes=1_204_224, n_rows=8, largest_error=3.1e-6,
        largest_effect=1.5,
    )  # fmt: skip
    why = "Adapter 'kind' was trained on a base of other sizes: encoder.layer.11.attention.self.query.weight"
    refused = AdapterOutcome(HOSTILE, "customers/kind", Outcome.REFUSED, reason=why, detail={"what": why}, seconds=0.2)
    failed = replace(served, name="language", outcome=Outcome.FAILED, reason="1 of 8 rows differs", largest_error=0.4)
    broken = AdapterOutcome("a-name-without-a-space" * 6, "x", Outcome.BROKEN, reason="killed by signal 9", attempts=2)
    return FleetReport(
        source="customers.csv", folder="served", base="all-MiniLM-L6-v2", task="text-classification", n_workers=2,
        n_kinds=3, adapters=(served, replace(served, name="again", reused=True), refused, failed, broken),
        environment=environment, seconds=83.5, seconds_packing=4.1,
    )  # fmt: skip


@pytest.fixture
def extraction() -> ExtractReport:
    """Two pairs, a module saved whole, a parameter left out."""
    curve = (1.0, 0.6, 0.3, 0.1, 0.05)
    path = "encoder.layer.{}.attention.self.query"
    modules = tuple(
        ModuleResult(path.format(n), "linear", (384, 384), 4, 384, 2.0 + n, 0.05, curve, n == 0) for n in range(2)
    )
    hashes = {which: {"model.safetensors": "9f2c" * 16} for which in ("base", "fine-tune")}
    return ExtractReport(
        folder="adapters/mine", asked="rank 4", task="text-classification", base="all-MiniLM-L6-v2", tuned=HOSTILE,
        sha256=hashes, modules=modules, wholes=(WholeResult("classifier", "classification head", 1155),),
        left_out=(LeftOut("embeddings.word_embeddings.weight", "embeddings", 0.01),), notes=("A note.",), biases=True,
        n_equal=90, n_tensors=103, n_parameters=6144, n_parameters_tuned=22_713_216, n_bytes=24_576,
        n_bytes_tuned=90_852_864, versions={"torch": "2.8.0+cpu"}, started_at="2025-11-23T18:40:12Z", seconds=12.5,
    )  # fmt: skip
