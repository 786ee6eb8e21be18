"""The list of a fleet's adapters: a CSV, JSON lines or Parquet file, or a folder of adapters.

Columns `path` (a folder, a hub id, or an address that fsspec reads, such as `s3://bucket/adapter`), and where wanted
`name` (else the last part of the path), `revision` (of a hub id) and `data` (texts to check it on). Relative paths
begin at the list's folder.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_export.adapters.folder import CONFIG
from lora_export.errors import EnvironmentUnusable, InputRefused, UsageProblem, some_of
from lora_export.reading import is_there, json_of

_COLUMNS = ("path", "name", "revision", "data")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")


@dataclass(frozen=True)
class Entry:
    """One adapter of the list.

    Attributes:
        given: Its folder, hub id (`id@revision`) or address.
        data: A file of texts to compare it on; None for those that all are compared on.
        where: Its place in the list, for messages.
    """

    name: str
    given: str
    where: str
    data: str | None = None

    @property
    def is_address(self) -> bool:
        """Whether fsspec reads it."""
        return is_address(self.given)


def is_address(place: object) -> bool:
    """Whether fsspec reads or writes `place`, a text such as `s3://bucket/served`; a path is none."""
    return isinstance(place, str) and _ADDRESS.match(place) is not None


def read_roster(source: Path) -> tuple[Entry, ...]:
    """The adapters of `source`, in its order.

    Raises:
        InputRefused: There is no such list, it is empty, or an entry lacks a path or has no usable name.
        UsageProblem: Two entries have one name.
        EnvironmentUnusable: It is a Parquet file and pyarrow is not installed.
    """
    if source.is_dir():
        folders = sorted(path for path in source.iterdir() if (path / CONFIG).is_file())
        rows = [(str(path), {"path": str(path.resolve())}) for path in folders]
    elif source.is_file():
        rows = list(_rows(source))
    else:
        raise InputRefused("There is no such list of adapters", where=str(source), expected="a file or a folder")
    if not rows:
        raise InputRefused(
            "The list holds no adapters",
            where=str(source),
            expected="folders with adapter_config.json" if source.is_dir() else "a row for each adapter",
        )
    entries = tuple(_entry(where, row, source) for where, row in rows)
    _refuse_equal_names(entries)
    return entries


def _rows(source: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Each row with its place."""
    try:
        if source.suffix == ".csv":
            with source.open(encoding="utf-8", newline="") as file:
                yield from ((f"{source}:{n}", row) for n, row in enumerate(csv.DictReader(file), 2))
        elif source.suffix in (".jsonl", ".ndjson"):
            lines = enumerate(source.read_text(encoding="utf-8").splitlines(), 1)
            yield from ((f"{source}:{n}", json_of(line)) for n, line in lines if line.strip())
        elif source.suffix == ".parquet":
            yield from ((f"{source}: row {n}", row) for n, row in enumerate(_parquet_rows(source)))
        else:
            raise InputRefused(
                "The list of adapters has a suffix that is not read",
                where=str(source),
                expected=".csv, .jsonl, .parquet, or a folder of adapters",
            )
    except (ValueError, csv.Error) as error:
        raise InputRefused("The list of adapters cannot be read", where=str(source), found=str(error)) from error


def _parquet_rows(source: Path) -> Sequence[Mapping[str, object]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise EnvironmentUnusable(
            "A Parquet list needs pyarrow", where=str(source), next_step="pip install pyarrow, or give a CSV"
        ) from error
    return parquet.read_table(source).to_pylist()


def _entry(where: str, row: object, source: Path) -> Entry:
    fields = row if isinstance(row, Mapping) else {}
    unknown = [str(name) for name in fields if name not in _COLUMNS]
    wrong = [
        name for name in _COLUMNS if not isinstance(fields.get(name), str | None) or "\0" in (fields.get(name) or "")
    ]
    path = fields.get("path")
    if unknown or wrong or not isinstance(path, str) or not path.strip():
        raise InputRefused(
            "A row of the list is no adapter",
            where=where,
            expected="path, and where wanted name, revision and data, each a text",
            found=f"unknown: {some_of(unknown, 4)}" if unknown else repr(row)[:200],
        )
    path = path.strip()
    name = fields.get("name") or path.rstrip("/").rpartition("/")[2].removesuffix(".safetensors")
    if not _NAME.fullmatch(name):
        raise InputRefused(
            "An adapter's name becomes a file name",
            where=where,
            expected="letters, digits, '.', '_' and '-'",
            found=repr(name),
            next_step="give it a name in the list's column `name`",
        )
    beside = source.parent / path
    given = str(beside.resolve()) if not _ADDRESS.match(path) and is_there(beside) else path
    if fields.get("revision"):
        given = f"{given}@{fields['revision']}"
    data = fields.get("data") or None
    return Entry(name, given, where, str((source.parent / data).resolve()) if data else None)


def _is_text(value: object) -> bool:
    """Whether it is one that a file's name may have, or nothing."""
    return value is None or (isinstance(value, str) and "\0" not in value)


def _refuse_equal_names(entries: Sequence[Entry]) -> None:
    places = defaultdict(list)
    for entry in entries:
        places[entry.name].append(entry.where)
    twice = {name: where for name, where in places.items() if len(where) > 1}
    if twice:
        raise UsageProblem(
            "Adapters of the list have the same name",
            where=some_of([f"{name} ({', '.join(where)})" for name, where in twice.items()], 4),
            next_step="give each a name of its own in the column `name`",
        )
