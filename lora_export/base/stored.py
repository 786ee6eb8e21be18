"""What lies in a base's folder: JSON, and tensors in safetensors files, read one at a time; never a pickle."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch

from lora_export.base.groups import Groups
from lora_export.errors import InputRefused, some_of
from lora_export.folders import OWN_FOLDER
from lora_export.reading import is_file, read_json

# In a folder that stands for a GGUF file: which of its tensors are which parameters.
GGUF_NAMES = "lora_export_gguf.json"
SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class TensorInfo:
    """Header of one stored tensor; `dtype` in safetensors' spelling."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SafetensorsFiles:
    """Tensors across one or more safetensors files, read one at a time from the memory-mapped files.

    Attributes:
        metadata: The free text of each file's header.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[Path, dict[str, str]] = field(default_factory=dict, repr=False, compare=False)
    _open: dict[Path, object] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, files: Iterable[Path]) -> SafetensorsFiles:
        """Read the headers of `files`.

        Raises:
            InputRefused: A file is truncated or not safetensors, or two files hold a tensor of the same name.
        """
        tensors: dict[str, TensorInfo] = {}
        opened: dict[Path, object] = {}
        metadata: dict[Path, dict[str, str]] = {}
        for file in files:
            try:
                opened[file] = handle = safetensors.safe_open(file, framework="pt")
                metadata[file] = handle.metadata() or {}
                names = list(handle.keys())
                for name in names:
                    part = handle.get_slice(name)
                    if name in tensors:
                        raise InputRefused(
                            f"Tensor {name} is stored twice", where=str(file), found=f"also in {tensors[name].file}"
                        )
                    tensors[name] = TensorInfo(file, part.get_dtype(), tuple(part.get_shape()))
            except safetensors.SafetensorError as error:
                raise InputRefused(
                    "The file is truncated or not safetensors",
                    where=str(file),
                    found=str(error),
                    next_step="fetch or save the file again",
                ) from error
        return cls(tensors, metadata, opened)

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` as stored (dtype and shape of its header), backed by the mapped file."""
        info = self.tensors[name]
        return self._open[info.file].get_tensor(name)

    def groups(self, name: str) -> Groups | None:
        """What turns the integers of the weight `name` into its numbers; None where it is not stored so."""
        return None

    def integers(self, name: str) -> torch.Tensor:
        """The unsigned integers `[out, in]` of a weight that has `groups`."""
        raise KeyError(name)


def stands_for_gguf(folder: Path) -> bool:
    """Whether this tool made `folder` for a GGUF file, be it in another process; nobody else's names are taken."""
    return (folder / GGUF_NAMES).is_file() and folder.parent.name.startswith(OWN_FOLDER)


def source_files(folder: Path) -> list[Path]:
    """What a base is known by: its config and its weights; or the GGUF file that the folder stands for.

    Raises:
        InputRefused: See `weight_files`.
    """
    if stands_for_gguf(folder):
        return [folder / read_json(folder / GGUF_NAMES)["file"]]
    return [folder / "config.json", *weight_files(folder)]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a base that Transformers reads: `model.safetensors`, else those that the index names.

    Raises:
        InputRefused: There are none (only pickles, or nothing), or the index names a file that is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]  # also beside an index, which is then one left over
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
        missing = [name for name in names if not _is_inside(name) or not is_file(folder / name)]
        if missing or not names:
            raise InputRefused(
                "The checkpoint's index names files that are not there",
                where=str(index),
                expected="files in the base's folder",
                found=some_of(missing, 6) or "no weight_map",
                next_step="fetch the missing shards",
            )
        return [folder / name for name in names]
    refuse_pickles(folder, "model")
    raise InputRefused(
        "The base has no weights",
        where=str(folder),
        expected="model.safetensors, or model.safetensors.index.json with its shards",
        found=some_of(sorted(p.name for p in folder.iterdir()), 8) or "an empty folder",
    )


def _is_inside(name: str) -> bool:
    """Whether a file's name in an index leads to the base's folder or a folder in it."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts and "\\" not in name


_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def refuse_pickles(path: Path, kind: str) -> None:
    """Raise InputRefused if `path` is a pickle, or a folder that holds weights only as pickles: one can run code when
    it is read."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    pickles = [file.name for file in files if file.suffix in _PICKLES]
    if pickles:
        raise InputRefused(
            f"The {kind}'s weights are pickled; a pickle can run code, so it is never read",
            where=str(path),
            expected="safetensors",
            found=some_of(pickles, 6),
            next_step="load it where you trust it and save it again with save_pretrained, which writes safetensors",
        )
