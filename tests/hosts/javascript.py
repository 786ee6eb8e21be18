"""JavaScript's side of a test: node with what `ci/setup hosts` installed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

SAMPLES = Path(__file__).parents[2] / "samples"
HERE = Path(__file__).parent
needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not (SAMPLES / "node_modules").is_dir(),
    reason="node or its packages are not here: run ci/setup hosts",
)


def node(script: Path, *arguments: object, code: int = 0) -> str:
    """What `script` prints; of a script that fails with `code`, what it says of it."""
    command = ["node", str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def described(array: np.ndarray) -> dict:
    """An array as `feeds.mjs` takes it."""
    return {"type": array.dtype.name, "dims": list(array.shape), "data": array.ravel().tolist()}


def run_cases(folder: Path, cases: Sequence[Mapping], out: Path, package: str = "") -> list[dict]:
    """What `feeds.mjs` found for `cases`: arrays in `feeds` and `outputs`, or an `error`."""
    out.with_suffix(".cases").write_text(json.dumps(cases))
    node(HERE / "feeds.mjs", folder, out.with_suffix(".cases"), out, package)
    data = out.with_suffix(".bin").read_bytes()

    def array(tensor: Mapping) -> np.ndarray:
        return np.frombuffer(data[tensor["at"] : tensor["at"] + tensor["n"]], tensor["type"]).reshape(tensor["dims"])

    found = json.loads(out.with_suffix(".json").read_text())
    for case in found:
        for key in ("feeds", "outputs"):
            case[key] = {name: array(tensor) for name, tensor in (case.get(key) or {}).items()}
    return found
