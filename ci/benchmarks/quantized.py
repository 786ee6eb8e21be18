"""Benchmark: an int4 base with float adapters, beside the float32 export and the int4 graph of GenAI's model builder.

    python ci/benchmarks/quantized.py llama smollm2 --work /tmp/quantized --tokenizer FOLDER --builder FOLDER \\
        --smollm2 FOLDER

For a random Llama shape (8 layers, 1024 wide) and SmolLM2-135M, both in blocks of 32, symmetric, at accuracy level 4:
decoding one row on a past of 256 tokens, merged and dynamic with one adapter (r = 8, all linears); the bytes of the
weights; the time and memory of an export, ours without and with a cached graph. All in one run; latencies are ratios of
paired blocks. "again" is a second session of the builder's graph: its interval is the noise.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from gpu.peers import builder_command, decoder_run
from gpu.timing import Device, adapter_arrays, race, ratio_lines
from processes import run_measured
from random_models import LlamaShape, write_adapter, write_llama
from readme_tables import write_into_readme
from results import RESULTS, Target, heading, host_kind, provenance, table, target_table, write_json

from lora_export.artifact import read_manifest
from lora_export.export.plan import Request
from lora_export.pipeline import ExportOptions, export
from lora_export.quantization import Quantization
from lora_export.runtime.session import open_session

_LLAMA = LlamaShape(8, 1024, 2816, heads=16, kv_heads=4, head_dim=64, vocab=32000, dtype="float32")
_SMOLLM2 = LlamaShape(30, 576, 1536, heads=9, kv_heads=3, head_dim=64, vocab=49152, dtype="float32")
_SHAPES = {"llama": _LLAMA, "smollm2": _SMOLLM2}
_RANK, _SHAPE = 8, (1, 1, 256)
_INT4 = Quantization()
# Limits: int4 ÷ float32, ÷ builder; an adapter ÷ none; bytes but embeddings ÷ float32; memory of an export ÷ builder.
_OF_FLOATS, _OF_BUILDER, _OF_ADAPTER, _OF_BYTES, _OF_MEMORY = 0.6, 1.0, 1.10, 0.2, 0.25


@dataclass(frozen=True)
class Given:
    """What the command line says.

    Attributes:
        work: For models and exports; what is there is reused.
        tokenizer: A folder with any tokenizer, which the builder wants.
        builder: The folder of GenAI's builder.py.
        smollm2: SmolLM2-135M in float32, as `samples/smollm2.py` converts it.
    """

    work: Path
    tokenizer: Path
    builder: Path
    smollm2: Path | None
    blocks: int


def measured(given: Given, model: str) -> dict:
    shape = _SHAPES[model]
    base = write_llama(given.work / model, shape) if model == "llama" else given.smollm2
    linears = shape.linears()
    how = {"rank": _RANK, "base": base, "task_type": "CAUSAL_LM", "seed": 1, "fan_in_fan_out": False}
    adapter = write_adapter(given.work / f"{model}-all", linears, **how)
    exports = _exports(given, model, base, adapter)
    folders = {"floats": ("merge", None), "int4": ("merge", _INT4), "dynamic": ("dynamic", _INT4)}
    paths = {name: _exported(base, adapter, *how, given.work / f"{model}-{name}") for name, how in folders.items()}
    paths["builder"] = given.work / f"{model}-builder"
    return {
        "model": model,
        "export": exports,
        "settings": {name: _settings(paths[name]) for name in ("int4", "builder")},
        "bytes": {name: _bytes(path) for name, path in paths.items()},
        "decode": _decode(given, shape, paths),
    }


def _exported(base: Path, adapter: Path, mode: str, how: Quantization | None, out: Path) -> Path:
    if not (out / "lora_export.json").exists():
        request = Request(str(base), ((str(adapter), None),), mode, None, "float32", "cpu", quantization=how)
        export(request, ExportOptions(out, overwrite=True))
    return out


def _exports(given: Given, model: str, base: Path, adapter: Path) -> dict:
    """Seconds and peak anonymous bytes."""
    out, cache, built = given.work / f"{model}-out", given.work / "cache", given.work / f"{model}-builder"
    command = Path(sys.executable).with_name("lora-export")
    ours = [str(command), "merge", str(base), str(adapter), "-o", str(out), "--overwrite", "--provider", "cpu"]
    ours += ["--quantize", "int4", "--dtype", "float32"]
    theirs = builder_command(base, given.tokenizer, built, given.builder, "float32", "cpu")
    theirs[theirs.index("-p") + 1] = "int4"
    environment = os.environ | {"LORA_EXPORT_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    shutil.rmtree(cache, ignore_errors=True)
    shutil.rmtree(built, ignore_errors=True)
    found = {}
    for name, job in (("builder", theirs), ("cold", ours), ("cached", ours)):
        usage = run_measured(job, environment)
        found[name] = {"seconds": usage.seconds, "peak_bytes": usage.peak_bytes}
        print(model, name, f"{usage.seconds:.1f} s, {usage.peak_bytes / 1e9:.2f} GB", flush=True)
    return found


def _nodes(folder: Path) -> list[onnx.NodeProto]:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return [node for node in graph.node if node.op_type == "MatMulNBits"]


def _settings(folder: Path) -> dict:
    """What the quantized products of a graph have in common, and how many there are."""
    nodes = _nodes(folder)
    names = ("bits", "block_size", "accuracy_level")
    values = {name: sorted({a.i for node in nodes for a in node.attribute if a.name == name}) for name in names}
    return values | {"products": len(nodes), "with_zeros": sum(len(n.input) > 3 and bool(n.input[3]) for n in nodes)}


def _bytes(folder: Path) -> dict[str, int]:
    """Of all weights, and of what an embedding is looked up in."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    of = {t.name: int(next((e.value for e in t.external_data if e.key == "length"), 0)) for t in graph.initializer}
    tables = {node.input[0] for node in graph.node if node.op_type in ("Gather", "GatherBlockQuantized")}
    return {"all": sum(of.values()), "tables": sum(size for name, size in of.items() if name in tables)}


def _decode(given: Given, shape: LlamaShape, paths: Mapping[str, Path]) -> dict:
    sessions = {name: open_session(path / "model.onnx", "cpu", stop_spinning=True) for name, path in paths.items()}
    sessions["again"] = open_session(paths["builder"] / "model.onnx", "cpu", stop_spinning=True)
    adapters = {"dynamic": adapter_arrays(read_manifest(paths["dynamic"]).contract, 1, _RANK)}
    device, size = Device("cpu"), {"head_size": shape.head_dim, "slots": _SHAPE[1] + _SHAPE[2]}
    runs = {
        name: decoder_run(session, device, _SHAPE, shape.vocab, adapters=adapters.get(name), **size)
        for name, session in sessions.items()
    }
    pairs = [("int4", "floats"), ("int4", "builder"), ("dynamic", "int4"), ("again", "builder")]
    result = race(runs, pairs, given.blocks)
    print(*ratio_lines(result), sep="\n", flush=True)
    return result


def targets(found: Sequence[dict]) -> list[Target]:
    rows = []
    limits = {("int4", "floats"): _OF_FLOATS, ("int4", "builder"): _OF_BUILDER, ("dynamic", "int4"): _OF_ADAPTER}
    words = {
        "int4": "int4, merged",
        "floats": "float32",
        "builder": "the builder's int4",
        "dynamic": "int4, one adapter",
    }
    for each in found:
        for ratio in each["decode"]["ratios"]:
            pair = ratio["variant"], ratio["reference"]
            if pair in limits:
                limit = limits[pair]
                verdict = "pass" if ratio["high"] <= limit else "fail" if ratio["low"] > limit else "ambiguous"
                name = f"{each['model']}, decode: {words[pair[0]]} ÷ {words[pair[1]]}"
                detail = f"{ratio['low']:.3f} to {ratio['high']:.3f}"
                rows.append(Target(name, ratio["median"], limit, detail, verdict))
        of = each["bytes"]
        value = (of["int4"]["all"] - of["int4"]["tables"]) / of["floats"]["all"]
        rows.append(_plain(f"{each['model']}: bytes of int4 without embeddings ÷ float32", value, _OF_BYTES))
        for name, what, limit in (
            ("cold", "seconds", 1.0),
            ("cached", "seconds", 1.0),
            ("cold", "peak_bytes", _OF_MEMORY),
        ):
            value = each["export"][name][what] / each["export"]["builder"][what]
            rows.append(_plain(f"{each['model']}, export {name}: {what} ÷ the builder's int4", value, limit))
    return rows


def _plain(name: str, value: float, limit: float) -> Target:
    return Target(name, value, limit, "one run", "pass" if value <= limit else "fail")


def report(result: Mapping) -> str:
    where = table(("part", "measured on"), [("all", heading(result["environment"]))])
    return f"{where}\n\n{target_table(targets(result['found']))}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=tuple(_SHAPES))
    parser.add_argument("--work", type=Path, required=True, help="for models and exports; what is there is reused")
    parser.add_argument("--tokenizer", type=Path, required=True, help="any tokenizer, which the builder wants")
    parser.add_argument("--builder", type=Path, required=True, help="the folder of ONNX Runtime GenAI's builder.py")
    parser.add_argument("--smollm2", type=Path, help="SmolLM2-135M in float32 (samples/smollm2.py)")
    parser.add_argument("--blocks", type=int, default=12)
    arguments = parser.parse_args()
    given = Given(arguments.work, arguments.tokenizer, arguments.builder, arguments.smollm2, arguments.blocks)
    given.work.mkdir(parents=True, exist_ok=True)
    environment = provenance()
    found = [measured(given, model) for model in arguments.models]
    result = {"environment": environment, "found": found}
    write_json(RESULTS / f"quantized-{host_kind()}.json", result)
    write_into_readme("quantized", report(result))
    print(report(result))


if __name__ == "__main__":
    main()
