"""Exports without their weights, and how to make the weights again on a machine that has neither network nor PyTorch.

    BUNDLE/exports/<name>/…       the exported folder but for its data files
    BUNDLE/exports/<name>/weights.json   of each data file: its bytes, and how each tensor is made
    BUNDLE/sources/…              base and adapters of the real exports, as they are
    BUNDLE/tensors.bin            tensors of real exports that no source holds

A tensor of a real export is a tensor of a source, as it is or transposed, in another dtype if need be; or a slice of
`tensors.bin`. Whatever is written as such gives the same bytes again: that was tried when the bundle was made. A tensor
of a random export is drawn from a seed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto
from safetensors import safe_open

from lora_export.runtime.arrays import numpy_dtype

_DTYPES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
_DRAWN = 1 << 22


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a data file: where it lies, what it is, and how it is made.

    Attributes:
        offset, length: Bytes in the data file.
        source: "random", "tensors.bin", or a safetensors file under `sources/`.
        tensor: Its name there; of `tensors.bin`, nothing.
        start: Its first byte in `tensors.bin`.
        stored_as: The dtype there.
        transposed: Whether the source holds `[out, in]` and the graph `[in, out]`.
    """

    name: str
    offset: int
    length: int
    shape: tuple[int, ...]
    dtype: str
    source: str = "random"
    tensor: str = ""
    start: int = 0
    stored_as: str = ""
    transposed: bool = False


def external_tensors(graph: Path) -> dict[str, list[StoredTensor]]:
    """The tensors of a graph that lie in data files, by data file; `graph` is a model.onnx."""
    model = onnx.load(str(graph), load_external_data=False)
    found: dict[str, list[StoredTensor]] = {}
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            dtype = _DTYPES.get(tensor.data_type) or onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
            at, length = int(place.get("offset", 0)), int(place["length"])
            found.setdefault(place["location"], []).append(
                StoredTensor(tensor.name, at, length, tuple(tensor.dims), dtype)
            )
    return found


class Writer:
    """Packs exports into a bundle, and looks for each real tensor in the sources that were added before."""

    def __init__(self, bundle: Path) -> None:
        self._bundle = bundle
        (bundle / "exports").mkdir(parents=True, exist_ok=True)
        (bundle / "sources").mkdir(exist_ok=True)
        self._by_digest: dict[tuple[str, bytes], StoredTensor] = {}
        self._tensors = (bundle / "tensors.bin").open("wb")

    def close(self) -> None:
        self._tensors.close()

    def add_source(self, folder: Path, name: str) -> None:
        """A base's or an adapter's folder, as `sources/<name>`; its float tensors can be referred to."""
        shutil.copytree(folder, self._bundle / "sources" / name, dirs_exist_ok=True)
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "numpy") as opened:
                for tensor in opened.keys():  # noqa: SIM118 not a mapping
                    array = opened.get_tensor(tensor)
                    known = StoredTensor("", 0, 0, (), "", f"{name}/{file.name}", tensor, 0, array.dtype.name)
                    self._remember(array, known)

    def _remember(self, array: np.ndarray, known: StoredTensor) -> None:
        if array.dtype.name not in ("float32", "float16"):
            return
        for dtype in ("float32", "float16", "bfloat16"):
            cast = array.astype(numpy_dtype(dtype))
            self._by_digest.setdefault((dtype, _digest(cast)), known)
            if array.ndim == 2:
                turned = StoredTensor(**{**asdict(known), "transposed": not known.transposed})
                self._by_digest.setdefault((dtype, _digest(np.ascontiguousarray(cast.T))), turned)

    def add_export(self, folder: Path, name: str, *, real: bool) -> None:
        """An exported folder, as `exports/<name>`."""
        out = self._bundle / "exports" / name
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.data", "reports"))
        weights: dict[str, dict] = {}
        for graph in sorted(folder.glob("*.onnx")):
            for data, tensors in external_tensors(graph).items():
                entry = weights.setdefault(data, {"bytes": (folder / data).stat().st_size, "tensors": []})
                made = [self._found(folder / data, tensor) if real else tensor for tensor in tensors]
                entry["tensors"] += [asdict(tensor) for tensor in made]
        if not real and (out / "lora_export.json").exists():
            _drop_adapters(out)
        (out / "weights.json").write_text(json.dumps(weights, indent=0))

    def _found(self, data: Path, tensor: StoredTensor) -> StoredTensor:
        dtype = numpy_dtype(tensor.dtype)
        array = np.fromfile(data, dtype, tensor.length // dtype.itemsize, offset=tensor.offset).reshape(tensor.shape)
        known = self._by_digest.get((tensor.dtype, _digest(array)))
        if known is None:
            known = StoredTensor("", 0, 0, (), "", "tensors.bin", "", self._tensors.tell(), tensor.dtype)
            self._tensors.write(array.tobytes())
            self._remember(array, known)
            self._by_digest[tensor.dtype, _digest(array)] = known
        place = {field: getattr(known, field) for field in ("source", "tensor", "start", "stored_as", "transposed")}
        return StoredTensor(**{**asdict(tensor), **place})


def _drop_adapters(folder: Path) -> None:
    """Random adapters are drawn on the GPU's machine too."""
    shutil.rmtree(folder / "adapters", ignore_errors=True)
    manifest = json.loads((folder / "lora_export.json").read_text())
    manifest["adapters"] = []
    (folder / "lora_export.json").write_text(json.dumps(manifest))


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data).digest()


def restore(bundle: Path, name: str, out: Path, seed: int = 0) -> Path:
    """The export `name` with its weights, in `out/<name>`; left as it is if it is there."""
    target = out / name
    if (target / "weights.json").exists():
        return target
    partial = out / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(bundle / "exports" / name, partial)
    for data, entry in json.loads((partial / "weights.json").read_text()).items():
        with (partial / data).open("wb") as file:
            file.truncate(entry["bytes"])
            for raw in entry["tensors"]:
                tensor = StoredTensor(**raw)
                file.seek(tensor.offset)
                for chunk in _bytes_of(bundle, tensor, seed):
                    file.write(chunk)
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)
    return target


def _bytes_of(bundle: Path, tensor: StoredTensor, seed: int) -> Iterator[bytes | memoryview]:
    if tensor.source == "random":
        yield from _drawn(tensor, seed)
        return
    if tensor.source == "tensors.bin":
        stored = numpy_dtype(tensor.stored_as)
        n = tensor.length // numpy_dtype(tensor.dtype).itemsize
        array = np.fromfile(bundle / "tensors.bin", stored, n, offset=tensor.start)
        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
        array = array.reshape(shape)
    else:
        with safe_open(bundle / "sources" / tensor.source, "numpy") as opened:
            array = opened.get_tensor(tensor.tensor)
    if tensor.transposed:
        array = array.T
    yield np.ascontiguousarray(array.astype(numpy_dtype(tensor.dtype))).tobytes()


_tiles: dict[tuple[str, int, float], np.ndarray] = {}


def _drawn(tensor: StoredTensor, seed: int) -> Iterator[memoryview]:
    """Normal numbers of standard deviation 0.02, around 1 for the weight of a norm; zeros for integers."""
    dtype = numpy_dtype(tensor.dtype)
    if dtype.kind in "iub":
        yield memoryview(bytes(tensor.length))
        return
    centre = float(len(tensor.shape) == 1 and tensor.name.endswith("weight"))
    key = (tensor.dtype, seed, centre)
    if key not in _tiles:
        rng = np.random.default_rng(seed)
        _tiles[key] = (rng.standard_normal(_DRAWN, np.float32) * 0.02 + centre).astype(dtype)
    tile, left = _tiles[key], tensor.length // dtype.itemsize
    start = int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:4], "little") % _DRAWN
    while left:
        part = tile[start : start + left]
        yield memoryview(part.view(np.uint8))
        left, start = left - len(part), 0


def sizes(bundle: Path) -> Mapping[str, int]:
    """Bytes of what a bundle holds, by its parts."""
    return {
        part.name: sum(
            file.stat().st_size for file in ([part] if part.is_file() else part.rglob("*")) if file.is_file()
        )
        for part in sorted(bundle.iterdir())
    }
