"""The base that an adapter records, and whether it is the one that is used: where shapes agree, nothing else tells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lora_export.adapters.folder import CONFIG, AdapterFolder
from lora_export.base.checkpoint import Located, locate
from lora_export.errors import EnvironmentUnusable, InputRefused, LoraExportError

_HUB_FOLDER = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def locate_base(given: str | None, folders: Sequence[AdapterFolder]) -> Located:
    """The base that was named, or the one that the adapters record.

    Raises:
        InputRefused: There is none, or adapters record different ones.
        EnvironmentUnusable: See `locate`.
    """
    if given is not None:
        return locate(given, kind="base")
    recorded = {folder.base for folder in folders}
    if len(recorded) != 1 or None in recorded:
        raise InputRefused(
            "The adapters do not agree on a base" if len(recorded) > 1 else "The adapter does not record its base",
            where=f"{CONFIG}: base_model_name_or_path",
            found=", ".join(f"{folder.name}: {folder.base}" for folder in folders),
            next_step="name the base as the first argument",
        )
    try:
        return locate(_with_revision(recorded.pop(), folders), kind="base")
    except (InputRefused, EnvironmentUnusable) as error:
        raise _from_the_config(error, folders[0]) from error


def _with_revision(base: str, folders: Sequence[AdapterFolder]) -> str:
    """A hub id with the revision that the adapters record, if it is one and the same."""
    revisions = {folder.config.get("revision") for folder in folders}
    revision = revisions.pop() if len(revisions) == 1 else None
    is_id = not Path(base).expanduser().exists() and "@" not in base
    return f"{base}@{revision}" if revision and is_id else base


def _from_the_config(error: LoraExportError, folder: AdapterFolder) -> LoraExportError:
    """`error` about a base that nobody has named on the command line."""
    return type(error)(
        error.what,
        where=f"{folder.path / CONFIG}: base_model_name_or_path = {folder.base!r}",
        expected=error.expected,
        found=error.found,
        next_step="name the base as the first argument: lora-export merge BASE ADAPTER…",
    )


def another_base(folder: AdapterFolder, used: Located) -> str | None:
    """The base that the adapter records, with its revision, if it is not `used` by its name; None if it is, or if it
    records none.

    A path from another machine is the same base if its last part is: `/content/llama` and `models/llama`.
    """
    if folder.base is None:
        return None
    revision = folder.config.get("revision")
    if _names(folder.base) & (_names(used.given) | _names(str(used.path))):
        return f"{folder.base} at revision {revision}" if _is_another(revision, used.revision) else None
    return folder.base if not revision else f"{folder.base} at revision {revision}"


def _names(given: str) -> set[str]:
    """What a path or hub id calls a base: its last part, and in the hub's cache the part that holds its name."""
    parts = [part for part in re.split(r"[/\\]", given.partition("@")[0] if "/" in given else given) if part]
    hub = [found["name"] for part in parts if (found := _HUB_FOLDER.fullmatch(part))]
    return {name.casefold() for name in hub or parts[-1:]}


def _is_another(recorded: object, used: str | None) -> bool:
    """Whether two revisions are known to differ: both are commits, as a branch's name says nothing."""
    commits = [isinstance(revision, str) and _COMMIT.fullmatch(revision) for revision in (recorded, used)]
    return all(commits) and recorded != used


def remark_on(name: str, recorded: str, used: str) -> str:
    """That an adapter is exported on another base than it records, in a sentence."""
    return f"adapter {name!r} records another base, {recorded}; it is exported on {used}, whose shapes fit"
