"""Benchmark: our graphs beside those that others build for the same model, in one run.

    python ci/benchmarks/peers.py decode smollm2 encode export --work /tmp/peers --demo .demo --smollm2 FOLDER

GenAI's model builder is that of .venv-genai (`ci/setup genai`), its `builder.py` run with this Python.

decode  a random Llama shape (8 layers, 1024 wide, 16 query and 4 key heads): merged, dynamic with one adapter, and with
        another in each row (r = 8, all linears), beside the graph of ONNX Runtime GenAI's model builder. All run on one
        ONNX Runtime with one buffer for past and present.
smollm2 the same with SmolLM2-135M's weights, as `samples/smollm2.py` converts them to FOLDER.
encode  MiniLM and the widths of BERT-base, DistilBERT and ViT-base (encoders.py): merged, and dynamic with an adapter
        of all linear modules, of queries and values, and another in each row, beside ONNX Runtime's own optimizer.
export  the time and memory of an export of 8 and of 32 such layers, merged with an adapter, beside the builder's;
        each a process of its own, ours without and with a cached graph. Python's bytecode is kept between them, after
        one run of each that is not counted.

Only ratios of paired blocks are judged. "again" is a second session of the peer's graph: its interval is the noise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from encoders import ENCODERS, checkpoint, optimized, peer_run
from encoders import exports as encoder_exports
from gpu.peers import builder_command, decoder_run, write_builder_graph
from gpu.timing import Candidate, Device, adapter_arrays, candidate_runs, race, ratio_lines
from processes import run_measured, with_bytecode
from random_models import LlamaShape, write_adapter, write_llama
from readme_tables import write_into_readme
from results import RESULTS, Target, heading, host_kind, provenance, table, target_table, write_json

from lora_export.artifact import read_manifest
from lora_export.export.plan import Request
from lora_export.pipeline import ExportOptions, export
from lora_export.runtime.session import open_session

_LLAMA = LlamaShape(8, 1024, 2816, heads=16, kv_heads=4, head_dim=64, vocab=32000, dtype="float32")
_DEEP = replace(_LLAMA, layers=32)
_SMOLLM2 = LlamaShape(30, 576, 1536, heads=9, kv_heads=3, head_dim=64, vocab=49152, dtype="float32")
_RANK = 8
# Rows, new tokens, past.
_DECODE = ((1, 1, 256), (8, 1, 256), (16, 1, 256), (1, 1, 1024), (8, 1, 1024), (16, 1, 1024), (1, 256, 0), (8, 128, 0))
_SMOLLM2_DECODE = tuple(shape for shape in _DECODE if shape[0] <= 8)
_MERGED, _ONE_ADAPTER, _ANOTHER_IN_EACH_ROW = 1.0, 1.05, 1.08
_ONE_ADAPTER_OF_SMOLLM2 = 1.07
_BUILDER = "lib/python*/site-packages/onnxruntime_genai/models"
# Exports are timed this often, one after the other in turn.
_ROUNDS = 3


@dataclass(frozen=True)
class Given:
    """What the command line says.

    Attributes:
        work: For models and exports; what is there is reused.
        demo: What `ci/demo` made: MiniLM, and a tokenizer for the builder.
        builder: The folder of GenAI's builder.py.
        smollm2: The base with SmolLM2's weights; None if it is not measured.
    """

    work: Path
    demo: Path
    builder: Path
    smollm2: Path | None
    blocks: int

    @property
    def tokenizer(self) -> Path:
        return self.demo / "tiny-llama"


def _exported(base: Path, adapter: Path, mode: str, out: Path) -> Path:
    if not (out / "lora_export.json").exists():
        request = Request(str(base), ((str(adapter), None),), mode, None, "float32", "cpu")
        export(request, ExportOptions(out, overwrite=True))
    return out


def _llama(given: Given, shape: LlamaShape) -> tuple[Path, Path]:
    """Base and adapter."""
    base = write_llama(given.work / f"llama-{shape.layers}", shape)
    linears, folder = shape.linears(), given.work / f"llama-{shape.layers}-all"
    adapter = write_adapter(folder, linears, rank=_RANK, base=base, task_type="CAUSAL_LM", seed=1, fan_in_fan_out=False)
    return base, adapter


def decode(given: Given) -> list[dict]:
    return _decoded(given, _LLAMA, *_llama(given, _LLAMA), given.work, "decode", _DECODE)


def smollm2(given: Given) -> list[dict]:
    if given.smollm2 is None:
        raise SystemExit("smollm2: --smollm2 FOLDER is missing (samples/smollm2.py writes it)")
    work = given.work / "smollm2"
    # A copy: the builder wants a tokenizer beside the weights, and gets the model's own.
    base = Path(shutil.copytree(given.smollm2, work / "base", dirs_exist_ok=True))
    linears = _SMOLLM2.linears()
    adapter = write_adapter(
        work / "all", linears, rank=_RANK, base=base, task_type="CAUSAL_LM", seed=1, fan_in_fan_out=False
    )
    own = replace(given, demo=work)
    (work / "tiny-llama").mkdir(exist_ok=True)
    return _decoded(own, _SMOLLM2, base, adapter, work, "SmolLM2-135M", _SMOLLM2_DECODE)


def _decoded(
    given: Given,
    llama: LlamaShape,
    base: Path,
    adapter: Path,
    work: Path,
    name: str,
    shapes: Sequence[tuple[int, int, int]],
) -> list[dict]:
    peer = work / "builder"
    if not (peer / "model.onnx").exists():
        write_builder_graph(base, given.tokenizer, peer, given.builder, "float32", "cpu")
    folders = {mode: _exported(base, adapter, mode, work / mode) for mode in ("merge", "dynamic")}
    paths = {"peer": peer, "again": peer, "merged": folders["merge"], "dynamic": folders["dynamic"]}
    sessions = {name: open_session(path / "model.onnx", "cpu", stop_spinning=True) for name, path in paths.items()}
    contract = read_manifest(folders["dynamic"]).contract
    found = []
    for shape in shapes:
        rows, new, past = shape
        fed = {
            "peer": ("peer", None),
            "again": ("again", None),
            "merged": ("merged", None),
            "one adapter": ("dynamic", adapter_arrays(contract, 1, _RANK)),
        }
        if rows > 1:
            fed["another in each row"] = ("dynamic", adapter_arrays(contract, rows, _RANK))
        size = {"head_size": llama.head_dim, "slots": past + new}
        device = Device("cpu")
        runs = {
            variant: decoder_run(sessions[session], device, shape, llama.vocab, adapters=adapters, **size)
            for variant, (session, adapters) in fed.items()
        }
        found.append(_raced(runs, f"{name}, {rows} × {new} on {past}", given.blocks))
    return found


def encode(given: Given) -> list[dict]:
    found = []
    for encoder in ENCODERS:
        base = checkpoint(encoder, given.demo / "minilm", given.work)
        folders = encoder_exports(encoder, base, given.work)
        graph = optimized(encoder, base, folders["base"], given.work / f"{encoder.name}-optimizer")
        sessions: dict = {}
        peers = {name: open_session(graph, "cpu", stop_spinning=True) for name in ("peer", "again")}
        for rows, tokens in encoder.shapes:
            candidates = [
                Candidate("merged", folders["base"]),
                Candidate("one adapter", folders["all"], 1, _RANK),
                Candidate("one adapter, queries and values", folders["qv"], 1, _RANK),
            ]
            if rows > 1:
                candidates.append(Candidate("another in each row", folders["all"], rows, _RANK))
            runs, failed = candidate_runs(candidates, "cpu", (rows, tokens, 0), 1000, sessions)
            if failed:
                raise RuntimeError(str(failed))
            shape = (rows, tokens)
            runs = {name: peer_run(session, folders["base"], shape) for name, session in peers.items()} | runs
            size = f"{rows} × {tokens}" if tokens else f"{rows} images"
            found.append(_raced(runs, f"{encoder.name}, {size}", given.blocks))
    return found


def _raced(runs: dict, name: str, blocks: int) -> dict:
    result = race(runs, [(each, "peer") for each in runs if each != "peer"], blocks)
    print(name, *ratio_lines(result), sep="\n", flush=True)
    return {"name": name} | result


def exports(given: Given) -> list[dict]:
    """Seconds and peak anonymous bytes of each export, by round."""
    found = []
    for shape in (_LLAMA, _DEEP):
        base, adapter = _llama(given, shape)
        out, cache = given.work / "out", given.work / "cache"
        ours = [
            str(Path(sys.executable).with_name("lora-export")),
            "merge",
            str(base),
            str(adapter),
            "-o",
            str(out),
        ]
        ours += ["--provider", "cpu"]
        theirs = builder_command(base, given.tokenizer, given.work / "built", given.builder, "float32", "cpu")
        samples: dict = {"builder": [], "cold": [], "cached": []}
        offline = os.environ | {"LORA_EXPORT_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
        environment = with_bytecode(offline, given.work / "bytecode")
        for number in range(-1, _ROUNDS):
            shutil.rmtree(cache, ignore_errors=True)
            for name, command in (("builder", theirs), ("cold", ours), ("cached", ours)):
                # Of each, all that the one before wrote: pages that a machine gets anew cost it more than ones it had.
                for written in (given.work / "built", out):
                    shutil.rmtree(written, ignore_errors=True)
                usage = run_measured(command, environment)
                if number < 0:  # compiles what is imported
                    continue
                samples[name].append({"seconds": usage.seconds, "peak_bytes": usage.peak_bytes})
                print(shape.layers, name, f"{usage.seconds:.1f} s, {usage.peak_bytes / 1e9:.2f} GB", flush=True)
        found.append({"layers": shape.layers, "samples": samples})
    return found


def race_targets(races: Sequence[dict]) -> list[Target]:
    limits = {
        "merged": _MERGED,
        "one adapter": _ONE_ADAPTER,
        "one adapter, queries and values": _ONE_ADAPTER,
        "another in each row": _ANOTHER_IN_EACH_ROW,
    }
    found = []
    for each in races:
        for ratio in each["ratios"]:
            if ratio["variant"] not in limits:
                continue
            limit = limits[ratio["variant"]]
            if each["name"].startswith("SmolLM2") and ratio["variant"] == "one adapter":
                limit = _ONE_ADAPTER_OF_SMOLLM2
            verdict = "pass" if ratio["high"] <= limit else "fail" if ratio["low"] > limit else "ambiguous"
            detail = f"{ratio['low']:.3f} to {ratio['high']:.3f}"
            found.append(Target(f"{each['name']}: {ratio['variant']} ÷ peer", ratio["median"], limit, detail, verdict))
    return found


def export_targets(found: Sequence[dict]) -> list[Target]:
    def median(samples: dict, name: str, what: str) -> float:
        return statistics.median(sample[what] for sample in samples[name])

    targets = []
    for entry in found:
        samples, layers = entry["samples"], entry["layers"]
        for name, what, limit in (("cold", "seconds", 1.0), ("cached", "seconds", 0.6), ("cold", "peak_bytes", 0.25)):
            value = median(samples, name, what) / median(samples, "builder", what)
            verdict = "pass" if value <= limit else "fail"
            targets.append(
                Target(f"export {layers} layers, {name}: {what} ÷ builder", value, limit, f"{_ROUNDS} rounds", verdict)
            )
    return targets


def peers_table(result: Mapping[str, dict]) -> str:
    """Where and on which commit each part was measured, and its targets."""
    parts = [part for part in ("decode", "smollm2", "encode", "export") if part in result]
    where = [(part, heading(result[part]["environment"])) for part in parts]
    targets: list[Target] = []
    for part in parts:
        found = result[part]["found"]
        targets += export_targets(found) if part == "export" else race_targets(found)
    return f"{table(('part', 'measured on'), where)}\n\n{target_table(targets)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("decode", "smollm2", "encode", "export"))
    parser.add_argument("--work", type=Path, required=True, help="for models and exports; what is there is reused")
    parser.add_argument("--demo", type=Path, default=Path(".demo"))
    parser.add_argument("--builder", type=Path, help="the folder of ONNX Runtime GenAI's builder.py [.venv-genai's]")
    parser.add_argument("--smollm2", type=Path, help="SmolLM2-135M in float32, as samples/smollm2.py writes it")
    parser.add_argument("--blocks", type=int, default=12)
    arguments = parser.parse_args()
    builder = arguments.builder or next(Path(".venv-genai").glob(_BUILDER), None)
    if builder is None:
        parser.error("there is no .venv-genai: run ci/setup genai, or name --builder FOLDER")
    given = Given(arguments.work, arguments.demo, builder.resolve(), arguments.smollm2, arguments.blocks)
    given.work.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"peers-{host_kind()}.json"
    result: dict = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for part in arguments.parts:
        environment = provenance()
        found = {"decode": decode, "smollm2": smollm2, "encode": encode, "export": exports}[part](given)
        result[part] = {"environment": environment, "found": found}
        write_json(path, result)
    write_into_readme("peers", peers_table(result))
    print(peers_table(result))


if __name__ == "__main__":
    main()
