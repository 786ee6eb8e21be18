"""A script of a page that shows a difference with onnxruntime and numpy alone, and the arrays that it needs."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping

import numpy as np

from lora_export.artifact import REPORTS
from lora_export.check.divergence_results import ARRAYS, SCRIPT, Divergence, Reproduction
from lora_export.check.judge.measures import output_scale
from lora_export.check.locate.probe import SeenGraph
from lora_export.contract import graph_file
from lora_export.runtime.session import PROVIDERS

_TEMPLATE = '''\
"""{title}

Needs onnxruntime and numpy. Prints the largest difference between this graph and PyTorch on one row, and exits with 1
if it is above the tolerance. {arrays} beside this file holds all that the graph is fed (`feed:<input>`, adapters
included), PyTorch's result for the row (`expected`) and which of its numbers count (`counts`).

{finding}
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

HERE = Path(__file__).resolve().parent
GRAPH = {graph}
PROVIDERS = {providers}
OUTPUT = {output!r}
BATCH, ROW = {n_rows}, {index}  # rows that are fed, and the one that is compared
TOLERANCE = {tolerance!r}  # {unit}

arrays = np.load(HERE / "{arrays}")
feeds = {{name.removeprefix("feed:"): arrays[name] for name in arrays.files if name.startswith("feed:")}}
expected, counts = arrays["expected"], arrays["counts"]

options = ort.SessionOptions()
options.log_severity_level = 3
session = ort.InferenceSession(str(GRAPH), options, providers=PROVIDERS)
found = session.run([OUTPUT], feeds)[0].astype(np.float64)

found = found[ROW : ROW + 1] if len(found) == BATCH else found
found = found[..., : expected.shape[-1]]  # without the classes that a wider head of another row adds
if found.shape != expected.shape:
    sys.exit(f"{{OUTPUT}}: {{list(found.shape)}} exported, {{list(expected.shape)}} in PyTorch")
difference = np.where(counts, np.abs(found - expected), 0.0)
largest = np.inf if np.isnan(difference).any() else difference.max()
print(f"{{OUTPUT}}: largest difference {{largest:.6e}}, tolerance {{TOLERANCE:.6e}}")
if largest > TOLERANCE:
    place = np.unravel_index(np.argmax(np.nan_to_num(difference, nan=np.inf)), difference.shape)
    print(f"at {{[int(i) for i in place]}}: {{found[place]:.6e}} exported, {{expected[place]:.6e}} in PyTorch")
    sys.exit(1)
'''


def reproduction(
    graph: SeenGraph, divergence: Divergence, limit: float, *, is_this_export: bool
) -> tuple[Reproduction, Mapping[str, bytes]] | None:
    """What the script shows, and the contents of both files by name; None where NumPy cannot hold the arrays (bfloat16)
    or the reference has no output of this graph.

    Args:
        limit: What the difference may be, over the largest expected value or 1.
        is_this_export: Whether the graph is that of the export whose reports the files are for.
    """
    if not graph.outputs or any(array.dtype.name == "bfloat16" for array in graph.run.feeds.values()):
        return None
    row, output = graph.run.row, max(graph.outputs, key=lambda o: (o.error != o.error, o.error)).value
    expected = row.of_reference(graph.expected[output])
    counts = np.zeros(expected.shape, bool)
    counts.reshape(-1)[row.real_of(np.arange(expected.size).reshape(expected.shape)).reshape(-1)] = True
    scale = output_scale(expected[counts])
    file = graph_file(graph.stem)
    folder = graph.run.session.folder.resolve()
    text = _TEMPLATE.format(
        title=_line(f"{divergence.case} on {graph.stem}: a difference from PyTorch, found by `lora-export check`."),
        finding="\n".join(textwrap.wrap(_line(divergence.sentence), 116)),
        arrays=ARRAYS,
        graph=f'HERE.parent / "{file}"' if is_this_export else f"Path({str(folder / file)!r})",
        providers=repr(_providers(graph.run.session.provider)),
        output=output,
        n_rows=row.n_rows,
        index=row.index,
        tolerance=limit * scale,
        unit=f"{limit:g} of the largest expected value, or of 1",
    )
    error = float(_error(graph.found[output], expected, counts, n_rows=row.n_rows, index=row.index))
    arrays = {f"feed:{name}": array for name, array in graph.run.feeds.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, expected=expected.astype(np.float64), counts=counts)
    shown = Reproduction(f"{REPORTS}/{SCRIPT}", f"{REPORTS}/{ARRAYS}", output, error, limit * scale)
    return shown, {SCRIPT: text.encode(), ARRAYS: buffer.getvalue()}


def _providers(provider: str) -> list:
    return [PROVIDERS["cpu"]] if provider == "cpu" else [(PROVIDERS["cuda"], {"use_tf32": "0"}), PROVIDERS["cpu"]]


def _line(text: str) -> str:
    """One line that ends no docstring."""
    return " ".join(text.replace("\\", "/").replace('"""', "'''").split())


def _error(found: np.ndarray, expected: np.ndarray, counts: np.ndarray, *, n_rows: int, index: int) -> float:
    found = (found[index : index + 1] if len(found) == n_rows else found)[..., : expected.shape[-1]]
    if found.shape != expected.shape:
        return float("inf")
    difference = np.abs(found.astype(np.float64) - expected)[counts]
    return float("nan") if np.isnan(difference).any() else float(difference.max(initial=0))
