"""Where a fleet goes: into a folder, or from there to an address."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Place(Protocol):
    """Where a fleet goes.

    Attributes:
        folder: The folder that it is made in.
    """

    folder: Path

    def appear(self, folder: Path, files: Mapping[str, str]) -> None:
        """Take up files (sha256 by name) of `folder`, which stay as they are until `arrived`."""

    def arrived(self) -> None:
        """Wait until all of them are there."""

    def published(self, files: Mapping[str, Path]) -> Mapping[str, Path | str]:
        """Make the fleet that is in `folder` that of the place; where `files` of it are then."""


@dataclass(frozen=True)
class Here:
    """A fleet's own folder, which appears at once."""

    folder: Path

    def appear(self, folder: Path, files: Mapping[str, str]) -> None:
        pass

    def arrived(self) -> None:
        pass

    def published(self, files: Mapping[str, Path]) -> Mapping[str, Path]:
        return files
