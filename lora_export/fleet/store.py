"""An address that fsspec reads and writes: files by their names below it."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.errors import EnvironmentUnusable, LoraExportError, told

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# What a run brings before its manifest has it, see `brought.py`.
PARTIAL = ".fleet.partial"


@dataclass(frozen=True)
class Store:
    """One address.

    Attributes:
        system, root: fsspec's file system and the path in it.
        is_local: Whether it is a folder of this machine, where names are exchanged and a copy is not whole at once.
    """

    address: str
    system: AbstractFileSystem
    root: str
    is_local: bool

    @classmethod
    def of(cls, address: str) -> Store:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        system, root = fsspec.core.url_to_fs(address)
        return cls(address, system, root.rstrip("/"), isinstance(system, LocalFileSystem))

    def at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by name, as the store has them now. What a console makes of a folder is no file."""
        self.system.invalidate_cache()
        found = {str(path): info.get("size") or 0 for path, info in self.system.find(self.root, detail=True).items()}
        return {path.removeprefix(f"{self.root}/"): size for path, size in found.items() if not path.endswith("/")}

    def exists(self, name: str) -> bool:
        self.system.invalidate_cache()
        return self.system.exists(self.at(name))

    def read(self, name: str) -> bytes:
        return self.system.cat_file(self.at(name))

    def write(self, name: str, content: bytes) -> None:
        self._in_folder(name, lambda: self.system.pipe_file(self.at(name), content))

    def create(self, name: str, content: bytes) -> None:
        """Write a file that is not there.

        Raises:
            FileExistsError: It is. Of two that create it at once, a store that writes on a condition refuses one.
        """
        if self.exists(name):
            raise FileExistsError(name)
        try:
            self._in_folder(name, lambda: self._create(self.at(name), content))
        except (NotImplementedError, TypeError):  # a store that cannot
            self.write(name, content)

    def _create(self, path: str, content: bytes) -> None:
        if not self.is_local:
            self.system.pipe_file(path, content, mode="create")
            return
        with self.system.open(path, "xb") as file:
            file.write(content)

    def get(self, name: str, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.system.get_file(self.at(name), str(file))

    def put(self, file: Path, name: str) -> None:
        """Copy a file there; stores of objects do so whole or not at all, and here it is."""
        if not self.is_local:
            self._in_folder(name, lambda: self.system.put_file(str(file), self.at(name)))
            return
        part = f"{PARTIAL}/part/{uuid.uuid4().hex}"
        self._in_folder(part, lambda: self.system.put_file(str(file), self.at(part)))
        self.move(part, name)

    def move(self, name: str, place: str) -> None:
        """Give a file another name, in the place of what has it: at once where that is a name, else by a copy there."""
        if "mv" in vars(type(self.system)):
            self._in_folder(place, lambda: self.system.mv(self.at(name), self.at(place)))
        else:
            self.system.cp_file(self.at(name), self.at(place))
            self.system.rm_file(self.at(name))

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self.system.rm_file(self.at(name))

    def remove_below(self, folder: str) -> None:
        self.system.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self.system.rm(self.at(folder), recursive=True)

    def _in_folder(self, name: str, write: Callable[[], None]) -> None:
        """Write `name`; where its folder is missing, and the store has folders, make that first."""
        try:
            write()
        except FileNotFoundError:
            self._make_folder(self.at(name).rpartition("/")[0])
            write()

    def _make_folder(self, path: str) -> None:
        """Make a folder and those that it is in, but for the outermost: of a store of objects that is a bucket."""
        parent = path.rpartition("/")[0]
        if parent and not self.system.isdir(path):
            self._make_folder(parent)
            with contextlib.suppress(FileExistsError):
                self.system.mkdir(path, create_parents=False)

    @contextlib.contextmanager
    def errors_told(self) -> Iterator[None]:
        """Whatever a store raises says where, and what to look at.

        Raises:
            EnvironmentUnusable: In place of it.
        """
        with errors_told(self.address):
            yield


@contextlib.contextmanager
def errors_told(address: str) -> Iterator[None]:
    """As `Store.errors_told`, of an address that is yet to be opened."""
    try:
        yield
    except LoraExportError:
        raise
    except Exception as error:  # each store has errors of its own
        raise EnvironmentUnusable(
            "The output's address cannot be read or written",
            where=address,
            found=told(error),
            next_step="look at the address and its credentials; s3:// needs s3fs, gs:// gcsfs, az:// adlfs",
        ) from error
