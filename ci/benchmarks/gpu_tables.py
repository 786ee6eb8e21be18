"""Write the tables of docs/gpu.md from the results of `ci/gpu`.

python ci/benchmarks/gpu_tables.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from readme_tables import write_into_readme
from results import RESULTS, table

_NOTHING = "–"


def tables() -> str:
    """All tables as Markdown; what has no result yet is said to be owed."""
    parts = [_where(), _parity(), *_table1(), *_decode(), _encoders(), _swaps(), *_captured(), *_attention(), _pairs()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _read(name: str) -> dict:
    return json.loads((RESULTS / f"gpu-{name}.json").read_text(encoding="utf-8"))


def _all(*names: str) -> list[dict]:
    return [_read(name) for name in names if (RESULTS / f"gpu-{name}.json").exists()]


def _where() -> str:
    found = _read("provider")["environment"]
    driver = found["nvidia_smi"][-1].split(", ")[1]
    versions = found["versions"]
    return (
        f"Device {found['device']}, driver {driver}, ONNX Runtime {versions['onnxruntime']}, "
        f"PyTorch {versions['torch']}, Transformers {versions['transformers']}, PEFT {versions['peft']}; "
        f"{found['started_at'][:10]}."
    )


def _made(result: dict) -> str:
    """When a result was taken, and of which commit's exports."""
    started, commit = result["environment"]["started_at"], result["bundle_commit"]
    return f"\n\nTaken on {started[:10]}, of exports of commit {commit[:7]}."


def _parity() -> str:
    rows = []
    for result in _all("parity"):
        for name, check in result["checks"].items():
            report = check["report"]
            if report is None:
                rows.append((name, f"exit {check['exit_code']}", _NOTHING, _NOTHING))
                continue
            cases, error = len(report["cases"]), max(_values(report, "error"), default=None)
            rounding = max(_values(report, "rounding"), default=None)
            shown = [_NOTHING if value is None else f"{value:.2g}" for value in (error, rounding)]
            rows.append((name, f"{report['verdict']}, {cases} cases", *shown))
    rows = list({row[0]: row for row in rows}.values())
    columns = ("`check` on CUDA", "verdict", "largest relative error", "largest ÷ PyTorch's rounding")
    made = "".join(map(_made, _all("parity")))
    return f"### Parity with unmerged PEFT{made}\n\n" + table(columns, sorted(rows))


def _values(report: dict, measure: str) -> Iterator[float]:
    for case in report["cases"]:
        for each in case["measures"]:
            if each["name"] == measure and each["value"] is not None:
                yield each["value"]


def _ratio(race: dict, variant: str, reference: str) -> str:
    for entry in race["ratios"]:
        if (entry["variant"], entry["reference"]) == (variant, reference):
            return f"{entry['median']:.2f} ({entry['low']:.2f} to {entry['high']:.2f})"
    return _NOTHING


def _races(title: str, columns: Sequence[tuple[str, str]], races: Sequence[dict], label, reference: str) -> str:
    """One row a race: the reference's milliseconds, then the ratios of the named variants to it."""
    rows = []
    for race in races:
        ms = race["median_ms"].get(reference)
        if ms is not None:
            rows.append((label(race), f"{ms:.2f}", *(_ratio(race, name, reference) for _, name in columns)))
    if not rows:
        return ""
    return f"{title}\n\n" + table(("", f"{reference}, ms", *(shown for shown, _ in columns)), rows)


def _table1() -> list[str]:
    def label(race: dict) -> str:
        return f"{race['dtype']}, {race['batch']} × {race['sequence']}"

    title = "### The LoRA paper's table 1: GPT-2 medium, r = 8, ratios to the base"
    columns = [
        ("base again", "base again"),
        ("merged", "merged"),
        ("attention, one adapter", "attention, one adapter"),
        ("attention, another a row", "attention, another in each row"),
        ("all linears, one adapter", "all, one adapter"),
        ("all linears, another a row", "all, another in each row"),
        ("PEFT in PyTorch, attention", "PyTorch, attention, PEFT"),
        ("PyTorch, merged", "PyTorch, attention, merged"),
    ]
    columns += [(f"the paper's Adapter-{kind}", f"Adapter-{kind}") for kind in "LH"]
    captured = [
        ("attention, one adapter", "attention, one adapter, CUDA graph"),
        ("all linears, one adapter", "all, one adapter, CUDA graph"),
        ("the paper's Adapter-L", "Adapter-L, CUDA graph"),
    ]
    parts = [_races(title + _made(result), columns, result["races"], label, "base") for result in _all("table1")]
    for result in _all("table1", "table1-cuda-graph"):
        parts.append(_races("With a CUDA graph:", captured, result["races"], label, "base, CUDA graph"))
    return parts


def _decode() -> list[str]:
    def label(race: dict) -> str:
        rows = f"{race['rows']} row{'s' if race['rows'] > 1 else ''}"
        return f"{rows}, {race['new']} new on {race['past']}"

    columns = [
        (shown, variant)
        for variant, shown in [
            ("base", "base"),
            ("merged", "merged"),
            ("one adapter", "one adapter"),
            ("another in each row", "another in each row"),
            ("base, CUDA graph", "base, CUDA graph"),
            ("one adapter, CUDA graph", "one adapter, CUDA graph"),
            ("builder, shared cache, CUDA graph", "GenAI's builder, CUDA graph"),
            ("base, int4", "base, int4"),
            ("one adapter, int4", "one adapter on int4"),
            ("PyTorch, PEFT", "PEFT in PyTorch"),
        ]
    ]
    title = (
        "### A decoder's step: 1.24 B Llama shape, float16, all linears, r = 16{}\n\n"
        "Ratios to the graph of GenAI's builder with a shared cache, without a CUDA graph:"
    )
    own = [
        ("merged", "merged"),
        ("no adapter", "no adapter"),
        ("one adapter", "one adapter"),
        ("another in each row", "another in each row"),
    ]
    captured = [("base", "base"), ("one adapter", "one adapter, CUDA graph")]
    parts = []
    for result in _all("decode"):
        parts.append(_races(title.format(_made(result)), columns, result["races"], label, "builder, shared cache"))
        parts.append(_races("Ratios to our own base:", own, result["races"], label, "base"))
        parts.append(_races("With a CUDA graph:", captured, result["races"], label, "base, CUDA graph"))
    return parts


def _encoders() -> str:
    columns = [
        ("base", "base"),
        ("one adapter", "one adapter"),
        ("another in each row", "another in each row"),
        ("base, CUDA graph", "base, CUDA graph"),
        ("one adapter, CUDA graph", "one adapter, CUDA graph"),
    ]
    title = "### An encoder beside ONNX Runtime's own optimizer: MiniLM, all linears, r = 8, ratios to that graph"
    found = _read("peers")
    return _races(
        title + _made(found),
        columns,
        found["races"],
        lambda r: f"{r['dtype']}, {r['batch']} × {r['sequence']}",
        "optimizer",
    )


def _swaps() -> str:
    found = _read("swaps")
    rows = [(name, f"{us / 1e3:.2f}") for name, us in found["median_us"].items()]
    each = f"{found['tensors']} tensors, {found['bytes_of_an_adapter'] / 1e6:.0f} MB"
    title = f"### Changing adapters of the Llama shape: {each} each, 32 rows{_made(found)}"
    return f"{title}\n\n" + table(("", "ms"), rows)


def _captured() -> list[str]:
    """`AdapterSession.run` without and with `cuda_graph`, where a GPU has run it."""
    parts = []
    for found in _all("captured"):
        ways = ("one adapter", "another adapter at every run", "an adapter for each row")
        columns = [f"{way}, {how}" for way in ways for how in ("plain", "CUDA graph")]
        rows = []
        for name, result in found["encoder"].items():
            times = [result.get(f"{how}, {way}, µs") for way in ways for how in ("plain", "CUDA graph")]
            shown = [_NOTHING if us is None else f"{us / 1e3:.2f}" for us in times]
            rows.append((name, *shown, f"{result['largest difference']:.2g}"))
        title = "### AdapterSession with a CUDA graph: an encoder (MiniLM, float16), ms a run"
        parts.append(f"{title}\n\n" + table(("", *columns, "largest difference"), rows))
        keys = ("plain, a step, ms", "CUDA graph, a step, ms", "largest difference", "same tokens, share")
        steps = [(name, *(f"{result[key]:.2g}" for key in keys)) for name, result in found["steps"].items()]
        title = "AdapterSession with a CUDA graph: steps of the Llama shape, one adapter, swapped half way:"
        parts.append(f"{title}\n\n" + table(("", "plain, ms", "CUDA graph, ms", *keys[2:]), steps))
    return parts


def _attention() -> list[str]:
    columns = [(name, name) for name in ("Attention 23, mask", "Attention 23, causal")]
    columns += [(name, name) for name in ("GQA, separate cache", "GQA, shared cache")]
    title = "### One attention, 32 query and 8 key heads of size 64, ratios to today's MatMul, Softmax, MatMul"

    def label(race: dict) -> str:
        return f"{race['dtype']}, {race['rows']} rows, {race['new']} new on {race['past']}"

    return [_races(title, columns, result["races"], label, "expanded") for result in _all("attention")]


def _pairs() -> str:
    races = _read("pairs")["races"]

    def label(race: dict) -> str:
        return f"{race['batch']} × {race['sequence']}{', CUDA graph' if race['cuda_graph'] else ''}"

    one = [("MatMul, MatMul, Add", "MatMul, MatMul, Add"), ("Gemm", "Gemm"), ("folded at every run", "folded")]
    three = [("three pairs", "three pairs"), ("one packed pair", "packed pair")]
    title = "### A linear of 1024 → 1024 with a pair, r = 8, float16, 24 in a row, ratios to the linear alone"
    return "\n\n".join(
        [
            _races(title, one, races, label, "base"),
            _races("Three linears that share an input:", three, races, label, "packed base"),
        ]
    )


if __name__ == "__main__":
    write_into_readme("gpu_tables", tables())
