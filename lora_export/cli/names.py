"""Paths and names of the command line, looked at before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lora_export.artifact import read_manifest
from lora_export.errors import UsageProblem
from lora_export.named import expanded, refuse_missing


def moved(out: Path, adapters: Mapping[str | None, str], data: Iterable[str | None] = ()) -> dict[str, str]:
    """Where adapters of the export `out` are now, by name, as `--adapter` says; one without a name is the only one.

    Args:
        data: The adapters that data was given for.

    Raises:
        UsageProblem: The export has no such adapter, or several and a path does not say whose it is.
        InputRefused: There is no export.
    """
    manifest = read_manifest(out)
    names = [record.name for record in manifest.adapters]
    if None in adapters and len(names) != 1:
        raise UsageProblem(
            "--adapter does not say which adapter the path is of",
            expected="NAME=PATH",
            found=adapters[None],
            next_step=f"name one of {', '.join(names)}" if names else "leave it out: the export has no adapter",
        )
    found = {names[0] if name is None else name: path for name, path in adapters.items()}
    for name in (*found, *filter(None, data)):
        manifest.adapter(name)
    return found


def base_and_adapters(
    paths: Sequence[str], names: Sequence[str]
) -> tuple[str | None, tuple[tuple[str, str | None], ...]]:
    """The base (None if the first path is an adapter) and the named adapters.

    Raises:
        UsageProblem: There are more names than adapters.
        InputRefused: A path leads nowhere.
    """
    first = "base" if len(paths) > 1 else "base or adapter"
    for place, path in enumerate(paths):
        refuse_missing(path, kind="adapter" if place else first)
    first_is_adapter = (expanded(paths[0]) / "adapter_config.json").is_file()
    return (None, named(paths, names)) if first_is_adapter else (paths[0], named(paths[1:], names))


def named(adapters: Sequence[str], names: Sequence[str]) -> tuple[tuple[str, str | None], ...]:
    """Adapters with their `--name`, in order; None for those beyond the names.

    Raises:
        UsageProblem: There are more names than adapters.
    """
    if len(names) > len(adapters):
        raise UsageProblem("More --name than adapters", found=f"{len(names)} names for {len(adapters)} adapters")
    return tuple(zip(adapters, [*names, *[None] * (len(adapters) - len(names))], strict=True))
