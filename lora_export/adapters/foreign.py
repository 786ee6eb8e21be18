"""Where an adapter that the user named is, and, if PEFT did not save it, a PEFT folder made of it.

The one place that joins `adapters.dialects` with a base. Everything downstream sees PEFT folders only; what the user
gave stays what is recorded and hashed (`source_hashes`).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch

from lora_export.adapters.dialects import Dialect, ForeignAdapter, convert, group, recognise, refuse_unreadable
from lora_export.adapters.folder import require_floats
from lora_export.adapters.header import HeaderOptions
from lora_export.adapters.module_names import Place
from lora_export.artifact import sha256_of
from lora_export.base.checkpoint import Checkpoint, locate
from lora_export.base.stored import SafetensorsFiles
from lora_export.base.tasks import resolve_task
from lora_export.base.weightless import build_weightless, is_conv1d
from lora_export.carried import carried_files
from lora_export.errors import InputRefused, some_of
from lora_export.folders import workplace
from lora_export.named import expanded
from lora_export.reading import read_json

SOURCE = "lora_export_source.json"
_PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")


def locate_adapter(given: str) -> Path:
    """The folder, or the single file, that `given` names.

    Raises:
        InputRefused: There is none, or it is a file that cannot be an adapter.
        EnvironmentUnusable: See `locate`.
    """
    path = expanded(given)
    if path.is_file():
        refuse_unreadable(path)
        return path.resolve()
    return locate(given, kind="adapter").path


def peft_folder(given: str, base: str | None, task: str | None) -> Path:
    """The PEFT folder of the adapter `given`: its own, or one made of it that lasts as long as this process.

    Args:
        base: The base, or None to take the one that the adapter records (MLX does).
        task: The task whose model the names are resolved on; None for the base's own.

    Raises:
        InputRefused: It is of no known format, or not every tensor of it has its place on the base.
    """
    path = locate_adapter(given)
    adapter = read_foreign(path)
    if adapter is None:
        return path
    base = base or adapter.mlx.get("model")
    if not isinstance(base, str):
        raise InputRefused(
            f"The adapter (format: {adapter.dialect}) does not record its base",
            where=str(path),
            next_step="name the base as the first argument",
        )
    checkpoint = Checkpoint.open(locate(base, kind="base"))
    places, prefix = _places(checkpoint, task)
    folder = Path(tempfile.mkdtemp(dir=workplace())) / name_of(path)
    convert(adapter, places, prefix, base=base, folder=folder)
    _carry(path, adapter, folder)
    return folder


def name_of(path: Path) -> str:
    """What an adapter is called unless the user names it: its folder, or its file without the ending."""
    return path.stem if path.is_file() else path.name


def source_hashes(folder: Path) -> dict[str, str]:
    """sha256 of the user's own files, of which `folder` was made, or of the PEFT files and the model config in it."""
    if (folder / SOURCE).is_file():
        return read_json(folder / SOURCE)
    return {name: sha256_of(folder / name) for name in (*_PEFT_FILES, *_labels_in(folder))}


def _labels_in(folder: Path) -> list[str]:
    """The config of an adapter's model beside it, which says its labels and its padding token, if there is one."""
    return ["config.json"] if (folder / "config.json").is_file() else []


def read_foreign(path: Path) -> ForeignAdapter | None:
    """The adapter at `path` if another tool than PEFT wrote it, else None.

    Raises:
        InputRefused: It is a file of no known format, GGUF, a full fine-tune of MLX, quantized, or not whole.
    """
    file, settings = _weights_and_settings(path)
    if file is None:
        return None
    files = SafetensorsFiles.open([file])
    dialect = recognise(list(files.tensors))
    if dialect is None:
        if path.is_file():
            raise InputRefused(
                "The file is no LoRA adapter of a known format",
                where=str(path),
                expected="a PEFT folder, or keys as " + ", ".join(Dialect) + " write them",
                found=some_of(list(files.tensors), 3) or "no tensor",
                next_step="give the adapter's folder; a full fine-tune becomes an adapter with `lora-export extract`",
            )
        return None
    require_floats({name: info.dtype for name, info in files.tensors.items()}, file)
    header = HeaderOptions.of(file, files.metadata[file])
    header.require_enough()
    return group(dialect, {name: files.read(name) for name in files.tensors}, settings, header=header)


def _weights_and_settings(path: Path) -> tuple[Path | None, dict]:
    """The weight file that PEFT did not write, if there is one, and MLX's settings."""
    if path.is_file():
        return path, {}
    config, mlx = path / _PEFT_FILES[0], path / "adapters.safetensors"
    if mlx.is_file() and config.is_file():
        settings = read_json(config)
        if settings.get("fine_tune_type") == "full":
            raise InputRefused(
                "MLX trained all weights here (fine_tune_type full); this is no adapter",
                where=str(path),
                next_step="fuse it with mlx_lm.fuse and make an adapter of it with `lora-export extract`",
            )
        return mlx, settings
    if config.is_file():
        return None, {}
    found = sorted(path.glob("*.safetensors"))
    if not found and (gguf := next(path.glob("*.gguf"), None)) is not None:
        refuse_unreadable(gguf)
    if len(found) > 1 and (path / "config.json").is_file():
        return None, {}  # a base, in shards
    if len(found) > 1:
        raise InputRefused(
            "The folder holds several files that may be the adapter",
            where=str(path),
            found=some_of([file.name for file in found], 6),
            next_step="give the file itself",
        )
    return (found[0] if found else None), {}


def _places(checkpoint: Checkpoint, task: str | None) -> tuple[dict[str, Place], str]:
    resolved = resolve_task(task, checkpoint.config, {}, where=str(checkpoint.path))
    most = checkpoint.most_parameters
    model = build_weightless(resolved, checkpoint.load_config(), "float32", most_parameters=most)
    places = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            places[path] = Place(path, "Linear", module.in_features, module.out_features)
        elif isinstance(module, torch.nn.Embedding):
            places[path] = Place(path, "Embedding", module.num_embeddings, module.embedding_dim)
        elif is_conv1d(module):
            places[path] = Place(path, "Conv1D", *module.weight.shape)
    return places, model.base_model_prefix


def _carry(path: Path, adapter: ForeignAdapter, folder: Path) -> None:
    """What PEFT's readers and the provenance need beside the weights: licences, labels, the hashes of the original."""
    source = path.parent if path.is_file() else path
    files = [adapter.file] + ([source / _PEFT_FILES[0]] if adapter.dialect is Dialect.MLX else [])
    if path.is_dir():
        labels = [path / name for name in _labels_in(path)]
        files += labels
        for file in (*carried_files(path), *labels):
            shutil.copyfile(file, folder / file.name)
    hashes = {file.name: sha256_of(file) for file in files}
    (folder / SOURCE).write_text(json.dumps(hashes, sort_keys=True), encoding="utf-8")
