"""The base that an adapter records, and whether it is the one that is used: where shapes agree, nothing else tells."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lora_export.adapters.folder import CONFIG, AdapterFolder
from lora_export.base.checkpoint import Located, locate
from lora_export.errors import EnvironmentUnusable, InputRefused, LoraExportError
from lora_export.named import expanded

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
    is_id = not expanded(base).exists() and "@" not in base
    return f"{base}@{revision}" if revision and is_id else base


def _from_the_config(error: LoraExportError, folder: AdapterFolder) -> LoraExportError:
    """`error` about a base that nobody has named on the command line."""
    return type(error)(
        error.what,
        where=f"{folder.path / CONFIG}: base_model_name_or_path = {folder.base!r}",
        expected=error.expected,
        found=error.found,
        next_step="name the base as the first argument: lora-export COMMAND BASE ADAPTER…",
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


# What PEFT writes into the card of an adapter that was trained on a quantized base, and how such bases are named.
_CARD = re.compile(r"quantization config was used during training:\s*\n(?P<settings>(?:- .+\n?)+)")
_NAMED = re.compile(r"[-_.](bnb[-_]4bit|bnb[-_]8bit|4bit|8bit|gptq|awq|nf4|fp8|int4|int8)\b", re.IGNORECASE)
_MOST_OF_A_CARD = 1 << 20


def quantized_training(folder: AdapterFolder) -> str | None:
    """The quantized base that an adapter says it was trained on (QLoRA), in words; None if it says nothing of it.

    Its card says so where PEFT wrote it, else the name of the base.
    """
    card = folder.path / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace")[:_MOST_OF_A_CARD] if card.is_file() else ""
    if (found := _CARD.search(text)) is not None:
        settings = dict(line[2:].split(": ", 1) for line in found["settings"].splitlines() if ": " in line)
        given = {name: settings.get(name) for name in ("quant_method", "load_in_4bit", "bnb_4bit_quant_type")}
        bits = "4-bit" if given["load_in_4bit"] == "True" else "8-bit" if settings.get("load_in_8bit") == "True" else ""
        kind = given["bnb_4bit_quant_type"] if bits == "4-bit" else None
        method = given["quant_method"] or "bitsandbytes"
        words = " ".join(
            filter(None, [method.rpartition(".")[2].lower().replace("bits_and_bytes", "bitsandbytes"), bits])
        )
        return f"{words} ({kind})" if kind else words
    named = _NAMED.search(folder.base or "")
    return None if named is None else f"{named[1]}, by the name of its base"


def remark_on_training(name: str, quantized: str) -> str:
    """That an adapter of a quantized base is exported on one of floats, in a sentence with the way out."""
    return (
        f"adapter {name!r} was trained on quantized weights ({quantized}) and is exported on others, which it does not "
        "correct: for what was trained, name the quantized base (its checkpoint is read), or quantize this one in the "
        "same way and save it"
    )
