"""What other tools write: the ONNX file in a folder, and ONNX Runtime GenAI's settings beside it."""

from __future__ import annotations

from pathlib import Path

from lora_export.errors import InputRefused, some_of
from lora_export.named import no_such
from lora_export.reading import is_file, is_folder, read_json_if_there

GENAI_CONFIG = "genai_config.json"
_MODEL = "model.onnx"
_SHOWN = 6


def find_graph(path: Path, *, or_else: str = "") -> Path:
    """The ONNX file at `path`: itself; of a folder the one that GenAI's settings name, `model.onnx`, or its only one.

    Args:
        or_else: What else would have done, for the message.

    Raises:
        InputRefused: There is none, or more than one.
    """
    if path.is_file():
        return path
    named: object = json_beside(path / _MODEL, GENAI_CONFIG)
    for key in ("model", "decoder", "filename"):
        named = named.get(key) if isinstance(named, dict) else None
    for name in (named, _MODEL):
        if isinstance(name, str) and is_file(path / name):
            return path / name
    if not is_folder(path):
        raise no_such("graph", path, expected=f"a folder with {or_else}{_MODEL}, or a file that ends in .onnx")
    found = sorted(path.glob("*.onnx"))
    if len(found) == 1:
        return found[0]
    raise InputRefused(
        "The folder holds more than one graph" if found else "There is no graph in the folder",
        where=str(path),
        expected=f"{or_else}{_MODEL}, or one file that ends in .onnx",
        found=some_of([file.name for file in found], _SHOWN) or "none",
        next_step="name the .onnx file itself" if found else "give the folder or the file that the other tool wrote",
    )


def json_beside(graph: Path, name: str) -> dict:
    """The fields of the file `name` beside `graph`; none where there is no such file.

    Raises:
        InputRefused: It is no JSON object.
    """
    return read_json_if_there(graph.parent / name)
