"""Adapters that are loaded while the server runs: which files may be, and what is checked of them.

1. The file lies in the folder that the server was given, links followed.
2. The manifest of the export that it lies in lists it, and it has the hash that stands there. The bytes that were
   hashed are the bytes that are loaded, whatever happens to the file meanwhile. Of an encoder-decoder's adapter, which
   has a file for each graph, one is named, and all are read likewise.
3. That export is of the same base, by the hashes of its files, with the same quantization and padding token.
4. Its tensors are those of this graph's inputs, and finite.

Not checked: who wrote the folder. Whoever can write there decides what is served.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from lora_export.artifact import MANIFEST, AdapterRecord, Manifest, read_manifest
from lora_export.errors import InputRefused, UsageProblem
from lora_export.folders import own_temporary_folder
from lora_export.runtime.end_tokens import has_adapter_settings
from lora_export.runtime.tokenizer import TOKENIZER_FILES
from lora_export.sentence import transformer_files
from lora_export.serve.models import Models, Served
from lora_export.serve.names import require_free_name
from lora_export.serve.problems import Problem, one_line

_SETTINGS = (*TOKENIZER_FILES, "generation_config.json")


@dataclass(frozen=True)
class RuntimeAdapters:
    """Loads adapters from `folder` into `models`.

    Attributes:
        most_bytes: Of one file.
    """

    models: Models
    folder: Path
    most_bytes: int

    def load(self, name: str, path: str, *, in_place: bool) -> str:
        """Serve the adapter of the file `path` as `name`; the file's sha256.

        Raises:
            Problem: The name or the file is refused.
        """
        require_free_name(name, self.models.base)
        file = self._inside(path)
        try:
            export, manifest, record = self._record_of(file, path)
            tensors, hashes = {}, {}
            for graph, name_in_export in record.files.items():
                part = self._inside(str(export / name_in_export))
                content = self._read(part, name_in_export)
                hashes[part] = found = hashlib.sha256(content).hexdigest()
                if found != manifest.files.get(name_in_export):
                    of = repr(path) if part == file else f"{name_in_export!r}, of the adapter {path!r},"
                    raise _refused(f"The file {of} is not the one that was exported: its sha256 is {found}", "hash")
                tensors[graph] = self._tensors(content, graph)
        except (InputRefused, UsageProblem) as error:
            raise _refused(f"The adapter {path!r} is refused: {one_line(error)}", "contract") from error
        root = file.relative_to(self.folder).as_posix()
        served = Served(record, self._place(export, manifest, record), root, int(time.time()))
        try:
            self.models.put(name, served, tensors, in_place=in_place)
        except InputRefused as error:  # the tensors of its graphs do not belong together
            raise _refused(f"The adapter {path!r} is refused: {one_line(error)}", "contract") from error
        return hashes[file]

    def _inside(self, path: str) -> Path:
        try:
            file = (self.folder / path).resolve(strict=True)
        except (OSError, ValueError):
            file = None
        # The same for a file that is not there and one that is outside: neither is the client's to know.
        if file is None or not file.is_relative_to(self.folder):
            raise Problem(
                403, f"There is no file {path[:200]!r} in the folder of --allow-runtime-adapters", param="lora_path",
                code="outside",
            )  # fmt: skip
        if not file.is_file():
            raise _refused(
                f"{path[:200]!r} is no file; a PEFT folder becomes an .onnx_adapter file with `lora-export add`", "path"
            )
        return file

    def _record_of(self, file: Path, path: str) -> tuple[Path, Manifest, AdapterRecord]:
        """The export that a file lies in, its manifest, and what that says of the file."""
        parents = [folder for folder in file.parents if folder.is_relative_to(self.folder)]
        export = next((folder for folder in parents if (folder / MANIFEST).is_file()), None)
        if export is None:
            raise _refused(f"{path!r} lies in no export, so no hash of it is known; see `lora-export add`", "hash")
        manifest = read_manifest(export)
        name = _name_in(export, file)
        record = next((record for record in manifest.adapters if name in record.files.values()), None)
        if record is None or name not in manifest.files:
            raise _refused(f"The manifest of its export has no adapter file {name!r}", "hash")
        if transformer_files(manifest.base.files) != transformer_files(self.models.manifest.base.files):
            raise _refused(f"The adapter {path!r} was exported for another base: its files have other hashes", "base")
        if unknown := set(record.files) - set(self.models.manifest.graphs):
            raise _refused(f"The adapter {path!r} was made for another graph: {', '.join(sorted(unknown))}", "base")
        for field in ("quantization", "pad_token_id"):
            found, expected = getattr(manifest, field), getattr(self.models.manifest, field)
            if found != expected:
                raise _refused(
                    f"The adapter {path!r} was exported with another {field}: {found}, where this export has "
                    f"{expected}",
                    "base",
                )
        return export, manifest, record

    def _read(self, file: Path, path: str) -> bytes:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > self.most_bytes:
                raise _refused(f"{path!r} is no regular file of at most {self.most_bytes:,} bytes", "size")
            return opened.read(self.most_bytes + 1)

    def _tensors(self, content: bytes, graph: str):
        with own_temporary_folder() as folder:
            copy = folder / "copy.onnx_adapter"
            copy.write_bytes(content)
            try:
                return self.models.read(copy, graph)
            except InputRefused as error:
                where = (error.where or "").replace(str(copy), "").lstrip(": ") or None
                raise InputRefused(
                    error.what, where=where, expected=error.expected, found=error.found, next_step=error.next_step
                ) from error

    def _place(self, export: Path, manifest: Manifest, record: AdapterRecord) -> Path:
        """The folder of the adapter's tokenizer and settings: this export's own, where all of them are the same.

        They are not where an adapter brought those of one export only: they end texts otherwise (`end_tokens_in`).
        """
        of_export = record.preprocessing in (None, ".")
        same = of_export and _settings(manifest) == _settings(self.models.manifest)
        same = same and has_adapter_settings(manifest) == has_adapter_settings(self.models.manifest)
        return self.models.folder if same else export / (record.preprocessing or ".")


def _settings(manifest: Manifest) -> dict[str, str]:
    """The hashes of an export's own tokenizer, template and generation settings, by file."""
    return {name: found for name, found in manifest.files.items() if name in _SETTINGS}


def _name_in(export: Path, file: Path) -> str:
    return file.relative_to(export).as_posix()


def _refused(message: str, code: str) -> Problem:
    return Problem(400, message, param="lora_path", code=code)
