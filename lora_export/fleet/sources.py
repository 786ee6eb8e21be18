"""The adapters of a list, fetched and opened: headers and hashes, no tensors."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.adapters.folder import AdapterFolder, open_adapter
from lora_export.adapters.foreign import peft_folder, source_hashes
from lora_export.artifact import sha256_of
from lora_export.base.sentence_folder import TRANSFORMER, is_setting_of, module_folders
from lora_export.carried import carried_files, is_carried
from lora_export.errors import EnvironmentUnusable, InputRefused, LoraExportError, of_the_system, told
from lora_export.fleet.outcomes import AdapterOutcome, Outcome
from lora_export.fleet.roster import Entry
from lora_export.fleet.survey import kind_of
from lora_export.progress import Progress

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_FETCHED = ("adapter_config.json", "adapter_model.safetensors", "config.json", "README.md")
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What this machine is short of, whichever adapter is read.
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
_NO_PATH = (errno.ELOOP, errno.ENAMETOOLONG)
# What a store says of the address; all else is of the store, and none of its adapters is refused for that.
_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, ValueError)


@dataclass(frozen=True)
class Opened:
    """An adapter whose headers were read.

    Attributes:
        kind: See `survey.kind_of`.
        hashes: sha256 of its files by name.
        carried: Likewise of what it brings beside them: tokenizer, settings, labels, licences.
        data_sha256: Of the texts that it alone is compared on; None for the usual ones.
    """

    entry: Entry
    folder: AdapterFolder
    kind: str
    hashes: Mapping[str, str]
    carried: Mapping[str, str]
    data_sha256: str | None


def open_all(
    entries: Sequence[Entry], base: str, task: str | None, *, fetched: Path, progress: Progress
) -> tuple[list[Opened], list[AdapterOutcome]]:
    """Every adapter's headers and hashes, and the outcome of those that have none: refused, or broken where a disk
    or the hub does not give them.

    Args:
        fetched: The folder for what lies at an address.

    Raises:
        EnvironmentUnusable: A store cannot be asked.
        OSError: This machine is short of memory, disk or open files.
    """
    opened, refused = [], []
    for done, entry in enumerate(entries):
        progress("reading headers", done, len(entries))
        try:
            path = peft_folder(_fetch(entry, fetched / entry.name) if entry.is_address else entry.given, base, task)
            folder = open_adapter(path, entry.given, entry.name)
            data = None if entry.data is None else sha256_of(Path(entry.data))
            beside = [*carried_files(path), *filter(Path.is_file, [path / "config.json"])]
            carried = {file.name: sha256_of(file) for file in beside}
            opened.append(Opened(entry, folder, kind_of(folder), source_hashes(path), carried, data))
        except LoraExportError as error:
            is_of_this_machine = isinstance(error, EnvironmentUnusable)
            if is_of_this_machine and entry.is_address:
                raise
            found = refusal(entry.name, entry.given, error)
            refused.append(replace(found, outcome=Outcome.BROKEN) if is_of_this_machine else found)
        except OSError as raised:
            error = of_the_system(raised) or raised
            if error.errno in (*_FULL, *_SHORT):
                raise error from raised
            outcome = Outcome.REFUSED if isinstance(error, _NOT_THERE) or error.errno in _NO_PATH else Outcome.BROKEN
            refused.append(AdapterOutcome(entry.name, entry.given, outcome, reason=f"{entry.where}: {error}"))
    return opened, refused


def refusal(name: str, given: str, error: LoraExportError, **figures: object) -> AdapterOutcome:
    """The outcome of an adapter that cannot be exported."""
    detail = {field: value for field, value in error.to_dict().items() if value is not None}
    reason = f"{error.what} ({error.where})" if error.where else error.what
    return AdapterOutcome(name, given, Outcome.REFUSED, reason=reason, detail=detail, **figures)


def _fetch(entry: Entry, target: Path) -> str:
    """Copy an adapter's files from its address into folder `target`."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(entry.given)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        _fetch_files(system, path, target, kind=TRANSFORMER)
        for folder, kind in module_folders(target).items():
            if folder:
                (target / folder).mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # a module without settings; a store keeps no empty folder
                    _fetch_files(system, f"{path}/{folder}", target / folder, kind=kind)
    except Exception as error:  # each store has errors of its own
        if isinstance(error, OSError) and error.errno in _FULL:
            raise
        if isinstance(error, _NOT_THERE):
            raise InputRefused("The adapter cannot be fetched", where=entry.given, found=told(error)) from error
        raise EnvironmentUnusable(
            "The store of an adapter cannot be asked",
            where=entry.given,
            found=told(error),
            next_step="look at the network and your credentials; s3:// needs s3fs, gs:// gcsfs, az:// adlfs",
        ) from error
    return str(target)


def _fetch_files(system: AbstractFileSystem, path: str, target: Path, *, kind: str) -> None:
    """Copy what an adapter's folder holds, or that of another module of sentence-transformers of class `kind`."""
    for file in system.ls(path, detail=False):
        name = file.rpartition("/")[2]
        if is_setting_of(name, kind) or (kind == TRANSFORMER and (name in _FETCHED or is_carried(name))):
            system.get_file(file, str(target / name))
