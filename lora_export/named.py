"""What a user names: a path, or a hub id. Standard library only: a wrong path is refused before anything is loaded."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from lora_export.errors import InputRefused, nearest

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# Of the letters of two names, in order: one of five missing is 0.89, two exchanged 0.8.
_MISTYPED = 0.78
_CHECK_THE_PATH = "check the path; when the base has moved since training, name it on the command line"
# What people bring in a checkpoint's place, by the file's suffix.
_OTHER_FILES = {
    ".onnx": "name the checkpoint that the graph was made from: weights are read from safetensors",
    ".safetensors": "name the folder that holds it and its config.json",
}


def near(given: str) -> str | None:
    """A question that names a folder or file beside the one that `given` names and that is not there; None without."""
    path = Path(given).expanduser()
    if path.exists() or not path.parent.is_dir():
        return None
    return nearest(path.name, sorted(other.name for other in path.parent.iterdir() if not other.name.startswith(".")))


def refuse_missing(given: str, *, kind: str) -> None:
    """Refuse what is neither there nor spelled like a hub id, and what is nearly the name of something there.

    Raises:
        InputRefused: It is named, with the nearest name beside it.
    """
    if not Path(given).expanduser().exists() and (not _HUB_ID.fullmatch(given) or _is_mistyped(given)):
        refuse_no_folder(given, kind=kind)


def _is_mistyped(given: str) -> bool:
    """Whether a letter or two part `given` from what is there: `adapters/topcs`, and no other model of one owner."""
    path = Path(given).expanduser()
    others = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    alike = difflib.get_close_matches(path.name, others, n=len(others) or 1, cutoff=_MISTYPED)
    return any(abs(len(other) - len(path.name)) <= 2 and _digits(other) == _digits(path.name) for other in alike)


def _digits(name: str) -> str:
    return "".join(filter(str.isdigit, name))


def refuse_no_folder(given: str, *, kind: str) -> None:
    """Refuse what is no folder where a folder is asked for.

    Raises:
        InputRefused: Always.
    """
    path = Path(given).expanduser()
    raise InputRefused(
        f"The {kind} is not a folder",
        where=given,
        expected=f"a folder holding the {kind}, or a hub id such as owner/name",
        found="a file" if path.exists() else "nothing at this path",
        next_step=_OTHER_FILES.get(path.suffix.lower() if path.is_file() else "", near(given) or _CHECK_THE_PATH),
    )


def is_hub_id(given: str) -> bool:
    """Whether `given` is spelled like one: `owner/name`, optionally `@revision`."""
    return _HUB_ID.fullmatch(given) is not None
