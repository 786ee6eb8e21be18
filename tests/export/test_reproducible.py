"""Identical inputs and versions give identical bytes, whatever the process, its hash seed or the graph cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from catalogue import EXPORTS

NAMES = ("llama-cuda", "gpt2-merged")
# Calls the command line with each of a list of arguments, then prints what was imported.
CALLS = """
import json, sys
from lora_export.cli.main import main
for arguments in json.loads(sys.argv[1]):
    main(arguments, standalone_mode=False)
print("imported:", *sys.modules)
"""
# What an export needs none of if its graph is kept, though planning and tracing need all of them.
FOR_A_GRAPH = {"transformers", "peft", "accelerate", "scipy", "onnxscript", "torch._dynamo", "torch.onnx._internal"}


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def export_in_a_process(out: Path, cache: Path, seed: int, bases, adapters) -> tuple[dict[str, bytes], set[str]]:
    """Export the catalogue's `NAMES` by the command line, in one process; the files by path, and what it imported."""
    calls = []
    for name in NAMES:
        spec = EXPORTS[name]
        paths = [bases[spec.base], *(adapters[adapter] for adapter in spec.adapters)]
        options = ["-o", str(out / name), "--provider", spec.provider, "--quiet"]
        calls.append([spec.mode, *map(str, paths), *options])
    environment = os.environ | {"PYTHONHASHSEED": str(seed), "LORA_EXPORT_CACHE": str(cache)}
    command = [sys.executable, "-c", CALLS, json.dumps(calls)]
    done = subprocess.run(command, check=True, timeout=300, env=environment, capture_output=True, text=True)
    return files_in(out), set(done.stdout.rpartition("imported: ")[2].split())


def test_processes_seeds_and_caches_leave_no_trace(bases, adapters, exports, graph_cache, tmp_path):
    """Two processes with seeds of their own, the second with the first's cache; and this one, with the run's cache."""
    cache = tmp_path / "cache"
    cold, imported = export_in_a_process(tmp_path / "cold", cache, 1, bases, adapters)
    kept = files_in(cache)
    assert kept, "nothing was cached"
    assert FOR_A_GRAPH - imported == set(), "not a module that a trace needs"
    warm, imported = export_in_a_process(tmp_path / "warm", cache, 2, bases, adapters)
    assert set(files_in(cache)) == set(kept), "the cache was not used"
    assert FOR_A_GRAPH & imported == set(), "an export whose graph is kept imports what it does not need"
    other = {f"{name}/{file}": data for name in NAMES for file, data in files_in(exports[name]).items()}
    assert set(cold) == set(warm) == set(other)
    for file in cold:
        assert cold[file] == warm[file], f"{file} differs with a warm cache"
        assert cold[file] == other[file], f"{file} differs in another process"
    graphs = {file: data for file, data in kept.items() if file.endswith(".onnx")}
    assert {file: (graph_cache / file).read_bytes() for file in graphs} == graphs
