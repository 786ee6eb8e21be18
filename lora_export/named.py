"""What a user names: a path, or a hub id. Standard library only: a wrong path is refused before anything is loaded."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from lora_export.errors import InputRefused, closest, some_of
from lora_export.reading import is_folder, is_there

# What `inspect` takes.
ANY = "export, adapter or base"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# Of the letters of two names, in order: one of five missing is 0.89, two exchanged 0.8.
_MISTYPED = 0.78
# To ask whether a path was meant: `k.pem` and `kq.py` are 0.6.
_ALIKE = 0.7
# Of a path in a message: what was given may be a whole text.
_MOST_SHOWN = 200
_SHOWN_BESIDE, _SHOWN_OF_IT = 4, 8
# Folders of a folder that are looked into.
_MOST_LOOKED_INTO = 1000
# What to do about a path that nothing lies at, and nothing spelled alike beside it, by what was asked for.
_EXPORTED, _TRAINED = "the folder named with -o when exporting", "the folder that PEFT's save_pretrained wrote"
_OTHERWISE = {
    "base": "check the path; when the base has moved since training, name it on the command line",
    "adapter": f"give {_TRAINED}",
    "base or adapter": f"give the base's folder, or {_TRAINED}",
    "export": f"give {_EXPORTED}",
    ANY: f"give {_EXPORTED}, {_TRAINED}, or a base's",
}
# What people bring in a checkpoint's place, by the file's suffix.
_OTHER_FILES = {
    ".onnx": "name the checkpoint that the graph was made from: weights are read from safetensors",
    ".safetensors": "name the folder that holds it and its config.json",
}


def expanded(given: str | Path) -> Path:
    """`given` with `~` as the home directory; as it is where there is no such user."""
    try:
        return Path(given).expanduser()
    except RuntimeError:
        return Path(given)


def near(given: str | Path) -> str | None:
    """A question that names a path which is there and is spelled like `given`, which is not; None without.

    One part of the path may be mistyped: of `adaptres/topic` it is `adapters/topic`.
    """
    path = expanded(given)
    if is_there(path):
        return None
    wrong = next(each for each in (*reversed(path.parents), path) if not is_there(each))
    found = closest(wrong.name, _names_in(wrong.parent, hidden=wrong.name.startswith(".")), alike=_ALIKE)
    meant = None if found is None else wrong.with_name(found) / path.relative_to(wrong)
    return f"did you mean {str(meant)!r}?" if meant is not None and is_there(meant) else None


def _names_in(folder: Path, *, hidden: bool) -> list[str]:
    try:
        names = sorted(each.name for each in folder.iterdir()) if is_folder(folder) else []
    except PermissionError:  # a folder that may be entered and not listed
        names = []
    return [name for name in names if hidden or not name.startswith(".")]


def what_to_do(given: str | Path, kind: str) -> str:
    """The next step for a path at which there is no `kind`: the path that may have been meant, else what to give."""
    return near(given) or _OTHERWISE.get(kind, "check the path")


def no_such(kind: str, given: str | Path, *, expected: str | None = None) -> InputRefused:
    """The refusal of a path that nothing lies at, to be raised.

    Args:
        kind: What was to lie there, in words.
    """
    return InputRefused(
        f"There is no such {kind}",
        where=str(given)[:_MOST_SHOWN],
        expected=expected,
        found=_what_lies_at(given),
        next_step=what_to_do(given, kind),
    )


def _what_lies_at(given: str | Path) -> str:
    path = expanded(given)
    if not is_there(path):
        return "nothing at this path"
    return "a folder" if is_folder(path) else "a file"


def require_there(kind: str, given: str | Path | None) -> None:
    """Refuse a path that nothing lies at, before anything is loaded; None is no path.

    Raises:
        InputRefused: See `no_such`.
    """
    if given is not None and not is_there(expanded(given)):
        raise no_such(kind, given)


def holds_no(kind: str, folder: Path, *files: str, expected: str) -> InputRefused:
    """The refusal of what is no `kind`, each of which has one of `files`; it names the folders in it that are."""
    if not is_there(folder):
        return no_such(kind, folder)
    inside = _names_in(folder, hidden=True)
    found = [str(folder / each) for each in inside[:_MOST_LOOKED_INTO] if not each.startswith(".")
             if any(is_there(folder / each / name) for name in files)]  # fmt: skip
    return InputRefused(
        f"The folder holds no {kind}",
        where=str(folder),
        expected=expected,
        found=some_of(inside, _SHOWN_OF_IT) or ("an empty folder" if folder.is_dir() else "a file"),
        next_step=f"give one in it: {some_of(found, _SHOWN_BESIDE)}" if found else what_to_do(folder, kind),
    )


def refuse_missing(given: str, *, kind: str) -> None:
    """Refuse what is neither there nor spelled like a hub id, and what is nearly the name of something there.

    Raises:
        InputRefused: It is named, with the nearest name beside it.
    """
    if not expanded(given).exists() and (not _HUB_ID.fullmatch(given) or _is_mistyped(given)):
        refuse_no_folder(given, kind=kind)


def _is_mistyped(given: str) -> bool:
    """Whether a letter or two part `given` from what is there: `adapters/topcs`, and no other model of one owner."""
    path = expanded(given)
    others = _names_in(path.parent, hidden=True)
    alike = difflib.get_close_matches(path.name, others, n=len(others) or 1, cutoff=_MISTYPED)
    return any(abs(len(other) - len(path.name)) <= 2 and _digits(other) == _digits(path.name) for other in alike)


def _digits(name: str) -> str:
    return "".join(filter(str.isdigit, name))


def refuse_no_folder(given: str, *, kind: str) -> None:
    """Refuse what is no folder where a folder is asked for.

    Raises:
        InputRefused: Always.
    """
    path = expanded(given)
    other = _OTHER_FILES.get(path.suffix.lower()) if path.is_file() else None
    raise InputRefused(
        f"The {kind} is not a folder",
        where=given,
        expected=f"a folder holding the {kind}, or a hub id such as owner/name",
        found=_what_lies_at(given),
        next_step=other or what_to_do(given, kind),
    )


def hub_out_of_reach(given: str) -> str:
    """The next step where the hub does not answer: `given` may also be the path of a folder that is not there."""
    folder = expanded(given).parent
    names = _names_in(folder, hidden=False)
    here = f"check the path, as {folder} holds {some_of(names, _SHOWN_BESIDE)}" if names else "give a folder"
    return near(given) or f"{here}; or set HF_HOME to a cache of the hub that holds it"


def is_hub_id(given: str) -> bool:
    """Whether `given` is spelled like one: `owner/name`, optionally `@revision`."""
    return _HUB_ID.fullmatch(given) is not None
