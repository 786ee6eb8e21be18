"""Identical inputs and versions give identical bytes, whatever the process, its hash seed or the graph cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from catalogue import EXPORTS


def export_in_a_process(name: str, out: Path, cache: Path, seed: int, bases, adapters) -> dict[str, bytes]:
    """Export the catalogue's `name` by the command line; the files by name."""
    spec = EXPORTS[name]
    paths = [bases[spec.base], *(adapters[adapter] for adapter in spec.adapters)]
    command = [sys.executable, "-m", "lora_export.cli.main", spec.mode, *map(str, paths), "-o", str(out)]
    environment = os.environ | {"PYTHONHASHSEED": str(seed), "LORA_EXPORT_CACHE": str(cache)}
    subprocess.run([*command, "--provider", spec.provider, "--quiet"], check=True, timeout=300, env=environment)
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-cuda", "gpt2-merged"])
def test_processes_seeds_and_caches_leave_no_trace(name, bases, adapters, tmp_path):
    cache = tmp_path / "cache"
    cold = export_in_a_process(name, tmp_path / "cold", cache, 1, bases, adapters)
    kept = {path.name: path.read_bytes() for path in cache.iterdir()}
    assert kept, "nothing was cached"
    warm = export_in_a_process(name, tmp_path / "warm", cache, 2, bases, adapters)
    assert {path.name for path in cache.iterdir()} == set(kept), "the cache was not used"
    other = export_in_a_process(name, tmp_path / "other", tmp_path / "another cache", 3, bases, adapters)
    assert set(cold) == set(warm) == set(other)
    for file in cold:
        assert cold[file] == warm[file], f"{file} differs with a warm cache"
        assert cold[file] == other[file], f"{file} differs in another process"
    assert {path.name: path.read_bytes() for path in (tmp_path / "another cache").iterdir()} == kept
