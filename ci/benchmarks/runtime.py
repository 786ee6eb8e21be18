"""Benchmark: what LoRA as graph inputs costs at run time on the CPU, against the base alone and the merged graph.

    python ci/benchmarks/runtime.py --work /tmp/bench --minilm .demo/minilm

Each case is exported as base, merged (one adapter) and dynamic (16 adapters), all of r = 8: MiniLM with query and value
adapted (the LoRA paper's choice, and PEFT's default for BERT) and with all linears, a head for each adapter; and a
random Llama shape with all seven linears.
Latencies are paired in ABBA blocks and only ratios are judged. "base again" is a second session of the same graph: how
far its ratio and interval are from 1 is the noise of this measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from random_models import Head, LlamaShape, write_adapter, write_llama
from readme_tables import write_into_readme
from results import RESULTS, Target, heading, host_kind, provenance, table, target_table, write_json

from lora_export.artifact import read_manifest
from lora_export.bench.intervals import verdict
from lora_export.bench.latency import Candidate, Race, measure
from lora_export.bench.plan import candidates, compared_with_base
from lora_export.bench.results import Ratio, Workload
from lora_export.bench.workloads import workload_inputs
from lora_export.export.plan import Request
from lora_export.pipeline import ExportOptions, export
from lora_export.runtime.adapter_session import AdapterSession

_N_ADAPTERS, _RANK, _N_LABELS = 16, 8, 4
_SHAPE = LlamaShape(4, 1024, 2816, heads=16, kv_heads=16, head_dim=64, vocab=32000, dtype="float32")
_QUERY_AND_VALUE = ("attention.self.query", "attention.self.value")
_ALL_LINEARS = (*_QUERY_AND_VALUE, "attention.self.key", "attention.output.dense", "intermediate.dense", "output.dense")
# Allowed ratios to the base: of a merged graph, of one adapter for 4 × 128 tokens, of 16 adapters in 16 rows.
_MERGED, _ONE_ADAPTER, _MIXED_ROWS = (0.98, 1.02), 1.05, 1.08


@dataclass(frozen=True)
class Case:
    """A base with its adapters, and the shapes to time: (batch, sequence, past)."""

    name: str
    description: str
    task: str
    base: Path
    adapters: tuple[Path, ...]
    shapes: tuple[tuple[int, int, int], ...]


def minilm_case(name: str, base: Path, work: Path, modules: Sequence[str]) -> Case:
    """MiniLM as a classifier; its checkpoint has no head, so each random adapter brings one."""
    config = json.loads((base / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    sizes = {"intermediate.dense": (inner, hidden), "output.dense": (hidden, inner)}
    linears = {
        f"bert.encoder.layer.{layer}.{module}": sizes.get(module, (hidden, hidden))
        for layer in range(config["num_hidden_layers"])
        for module in modules
    }
    head = Head("classifier", _N_LABELS, hidden)
    adapters = tuple(
        write_adapter(
            work / name / f"task{i:02}", linears, rank=_RANK, base=base, task_type="SEQ_CLS", seed=i, head=head
        )
        for i in range(_N_ADAPTERS)
    )
    text = f"r = {_RANK} on {len(modules)} modules of each block, {_N_LABELS}-class heads: {', '.join(modules)}"
    return Case(name, text, "text-classification", base, adapters, ((4, 128, 0), (16, 64, 0)))


def llama_case(work: Path) -> Case:
    """A random decoder, four layers of 1024."""
    base = write_llama(work / "llama-4x1024" / "base", _SHAPE)
    adapters = tuple(
        write_adapter(
            base.parent / f"task{i:02}", _SHAPE.linears(), rank=_RANK, base=base, task_type="CAUSAL_LM", seed=i
        )
        for i in range(_N_ADAPTERS)
    )
    text = f"{_SHAPE.layers} layers, hidden {_SHAPE.hidden}, MLP {_SHAPE.mlp}; r = {_RANK} on all seven linears"
    return Case("Llama shape", text, "text-generation", base, adapters, ((4, 128, 0), (16, 32, 0)))


def export_case(case: Case, out: Path) -> dict[str, Path]:
    """Export the base alone, the base with the first adapter merged, and the dynamic graph; folders by candidate."""
    folders = {}
    for name, mode, n_adapters in (("base", "merge", 0), ("merged", "merge", 1), ("export", "dynamic", _N_ADAPTERS)):
        adapters = tuple((str(path), None) for path in case.adapters[:n_adapters])
        request = Request(str(case.base), adapters, mode, case.task, "float32", "cpu")
        folders[name] = out / name
        export(request, ExportOptions(folders[name], overwrite=True, zeros_for_missing_head=not adapters))
    return folders


def measure_case(case: Case, folders: dict[str, Path], blocks: int) -> list[Workload]:
    """Time all variants of `case` together, workload by workload."""
    folders = folders | {"base again": folders["base"]}
    openers = {name: partial(AdapterSession, folder, "cpu", stop_spinning=True) for name, folder in folders.items()}
    manifest = read_manifest(folders["export"])
    vocabulary = json.loads((case.base / "config.json").read_text())["vocab_size"]
    races = []
    for shape in case.shapes:
        found = candidates(manifest, shape[0])
        found.insert(1, Candidate("base again", "another session of the same graph: the noise", "base again"))
        inputs = workload_inputs(manifest.graphs, vocabulary, shape)
        races.append(Race(shape, dict.fromkeys(openers, inputs), found, compared_with_base(found, {})))

    def progress(block: int, total: int) -> None:
        print(f"\r{case.name}: block {block} of {total}", end="", file=sys.stderr, flush=True)

    workloads = measure(openers, races, blocks=blocks, progress=progress)
    print(file=sys.stderr)
    return workloads


def find_targets(case: Case, workloads: Sequence[Workload]) -> list[Target]:
    """The targets of one case; each verdict is on the whole interval of the median ratio."""
    small, wide = workloads
    by_name = {(w, r.variant): r for w in workloads for r in w.ratios}
    found = []
    for workload in workloads:
        ratio = by_name[workload, "merged"]
        found.append(_target(f"{case.name}: merged / base, {workload.name}", ratio, _MERGED[1], lower=_MERGED[0]))
    one, mixed = by_name[small, "dynamic"], by_name[wide, "mixed rows"]
    found.append(_target(f"{case.name}: one adapter / base, {small.name}", one, _ONE_ADAPTER))
    found.append(_target(f"{case.name}: {_N_ADAPTERS} adapters in one batch / base, {wide.name}", mixed, _MIXED_ROWS))
    return found


def _target(name: str, ratio: Ratio, limit: float, *, lower: float | None = None) -> Target:
    judged = verdict(ratio.low, ratio.high, limit)
    if lower is not None and judged != "fail" and ratio.low < lower:
        judged = "fail" if ratio.high < lower else "ambiguous"
    detail = f"{ratio.low:.3f} to {ratio.high:.3f} ({ratio.confidence:.1%})"
    return Target(name, ratio.median, limit, detail, str(judged), lower)


def markdown(environment: dict, measured: Sequence[tuple[Case, Sequence[Workload]]], targets: Sequence[Target]) -> str:
    """The results as Markdown."""
    parts = [heading(environment)]
    for case, workloads in measured:
        rows = []
        for workload in workloads:
            ratios = {ratio.variant: ratio for ratio in workload.ratios}
            for variant in workload.variants:
                ratio = ratios.get(variant.name)
                shown = (f"{ratio.median:.3f}×", f"{ratio.low:.3f} to {ratio.high:.3f}") if ratio else ("1", "–")
                rows.append((f"{workload.name}: {variant.name}", f"{variant.median_ms:.1f}", *shown))
        columns = ("workload: variant", "median ms", "ratio to the base", "95 % interval")
        parts += [f"**{case.name}**, {case.description}.", table(columns, rows)]
    return "\n\n".join([*parts, target_table(targets)])


_SHOWN = {
    "base again": "base again", "merged": "merged", "dynamic": "one adapter",
    "mixed rows": f"{_N_ADAPTERS} adapters, another in each row",
}  # fmt: skip


def runtime_table(result: dict) -> str:
    """The ratios to the base, medians with their intervals."""
    rows = []
    for case in result["cases"]:
        for workload in case["workloads"]:
            ratios = {ratio["variant"]: ratio for ratio in workload["ratios"]}
            found = [ratios.get(name) for name in _SHOWN]
            cells = [f"{r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f})" if r else "–" for r in found]
            rows.append((f"{case['name']}, {workload['name']}", *cells))
    return f"{textwrap.fill(heading(result['environment']), 120)}\n\n{table(('', *_SHOWN.values()), rows)}\n"


def to_json(
    environment: dict, blocks: int, measured: Sequence[tuple[Case, Sequence[Workload]]], targets: Sequence[Target]
) -> dict:
    """The results with all raw samples, as JSON values."""
    cases = [
        {"name": case.name, "description": case.description, "workloads": [asdict(w) | {"name": w.name} for w in found]}
        for case, found in measured
    ]
    head = {"benchmark": "runtime", "environment": environment, "blocks": blocks, "rank": _RANK}
    return head | {"cases": cases, "targets": [asdict(target) for target in targets]}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for models and exports; models there are reused")
    parser.add_argument("--minilm", type=Path, default=Path(".demo/minilm"), help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--blocks", type=int, default=30, help="ABBA blocks for each workload")
    parser.add_argument("--only", choices=("minilm", "llama"), help="time one base, not both")
    parser.add_argument("--out", type=Path, default=RESULTS / f"runtime-{host_kind()}.json")
    return parser.parse_args()


def main() -> int:
    """Export, measure, write the JSON, print the Markdown; 1 if a target failed (ambiguous ones do not fail)."""
    args = _arguments()
    work, environment = args.work.resolve(), provenance()
    minilm = args.minilm.resolve()
    cases = []
    if args.only != "llama":
        cases.append(minilm_case("MiniLM, query and value", minilm, work, _QUERY_AND_VALUE))
        cases.append(minilm_case("MiniLM, all linears", minilm, work, _ALL_LINEARS))
    cases += [] if args.only == "minilm" else [llama_case(work)]
    measured, targets = [], []
    for case in cases:
        workloads = measure_case(case, export_case(case, work / "exports" / case.name), args.blocks)
        measured.append((case, workloads))
        targets += find_targets(case, workloads)
        # After each case: an interrupted run keeps what it has found.
        write_json(args.out, to_json(environment, args.blocks, measured, targets))
    if args.only is None and args.out.parent == RESULTS:
        write_into_readme("runtime", runtime_table(json.loads(args.out.read_text(encoding="utf-8"))))
    print(markdown(environment, measured, targets))
    return int(any(target.verdict == "fail" for target in targets))


if __name__ == "__main__":
    sys.exit(main())
