"""LoRA adapters whose modules had other names when they were trained, under Transformers 4: written with today's.

Transformers renames a checkpoint's tensors when it loads them (ViT's `encoder.layer.0.attention.attention.query` is
`layers.0.attention.q_proj`). PEFT does not look for an adapter's modules under these names: it finds no target, or
leaves pairs unloaded in silence. Here a module's new name is the one that Transformers gives to its weight.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lora_export.adapters.folder import CONFIG, WEIGHTS, AdapterFolder, open_adapter
from lora_export.adapters.foreign import SOURCE, source_hashes
from lora_export.adapters.peft_writer import PREFIX, write_config
from lora_export.base.checkpoint import Checkpoint, Located
from lora_export.base.conversion import renamed_paths
from lora_export.base.tasks import Task
from lora_export.base.weightless import build_weightless, is_conv1d
from lora_export.carried import carried_files
from lora_export.compat import borrow
from lora_export.errors import InputRefused, some_of
from lora_export.folders import workplace

# Options that name modules, and so are written anew or must not be set.
_BY_MODULE = ("target_modules", "rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform",
              "layers_pattern", "r", "lora_alpha")  # fmt: skip
_NAMES_OTHERS = ("target_parameters", "trainable_token_indices", "layer_replication")
_PROVENANCE = ("peft_type", "peft_version", "auto_mapping", "inference_mode")


def with_todays_names(folder: AdapterFolder, model: torch.nn.Module) -> AdapterFolder:
    """`folder`, or, where the modules that it names are called otherwise in the weightless `model`, a copy that names
    those; it lasts as long as this process.

    Raises:
        InputRefused: The names are those of Transformers 4, and the adapter has more than pairs and whole modules.
    """
    if folder.config.get("peft_type") != "LORA":
        return folder
    modules = {key: module for key in folder.shapes if (module := _module_of(key)) is not None}
    there = {name for name, _ in model.named_modules()}
    strange = {module for module in modules.values() if module not in there}
    renamed = {old: new for old, new in renamed_paths(model, strange).items() if new in there}
    if not renamed:
        return folder
    others = [name for name in _NAMES_OTHERS if folder.config.get(name)]
    state = model.state_dict()
    whole = {key for key in folder.shapes if key not in modules and key.removeprefix(PREFIX) in state}
    left = sorted((strange - renamed.keys()) | (folder.shapes.keys() - modules.keys() - whole))
    if others or left or len(set(renamed.values())) < len(renamed):
        old, new = next(iter(sorted(renamed.items())))
        raise InputRefused(
            "The adapter was trained under Transformers 4, which called modules of this base otherwise",
            where=str(folder.path),
            expected=f"{new}, for example, as they are named now",
            found=f"{old}; and what is not renamed here: " + some_of([*others, *left], 4),
            next_step="load it with Transformers 4, merge it, and export that as a base without adapters",
        )
    return _written(folder, modules, renamed, model=model)


def folder_with_todays_names(path: Path, base: Path, task: str) -> Path:
    """The same for an adapter in folder `path` on the base in folder `base`, for readers of folders."""
    checkpoint = Checkpoint.open(Located(base, str(base)))
    most = checkpoint.most_parameters
    model = build_weightless(Task(task), checkpoint.load_config(), "float32", most_parameters=most)
    return with_todays_names(open_adapter(path, str(path), "a"), model).path


def _module_of(key: str) -> str | None:
    """The module whose pair the tensor `key` belongs to; None for what is no part of a pair."""
    path, _, part = key.removeprefix(PREFIX).partition(".lora_")
    return path if key.startswith(PREFIX) and part else None


def _written(
    folder: AdapterFolder, modules: Mapping[str, str], renamed: Mapping[str, str], *, model: torch.nn.Module
) -> AdapterFolder:
    target = Path(tempfile.mkdtemp(dir=workplace())) / folder.name
    target.mkdir()
    tensors = {}
    for key, tensor in load_file(folder.path / WEIGHTS).items():
        old = modules.get(key, "")  # a head that is saved whole keeps its name
        tensors[PREFIX + renamed.get(old, old) + key.removeprefix(PREFIX + old)] = tensor
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    ranks, alphas = _ranks_and_alphas(folder.config, sorted(set(modules.values())))
    everything = [name for name, _ in model.named_modules()]
    changed = {renamed.get(old, old): old for old in ranks}
    rest = {name: value for name, value in folder.config.items() if name not in (*_BY_MODULE, *_PROVENANCE)}
    rest["fan_in_fan_out"] = any(is_conv1d(model.get_submodule(new)) for new in changed)
    write_config(
        target,
        {new: ranks[old] for new, old in changed.items()},
        {new: alphas[old] for new, old in changed.items()},
        everything=everything,
        options={name: value for name, value in rest.items() if value is not None},
    )
    _carry(folder.path, target)
    config = json.loads((target / CONFIG).read_text(encoding="utf-8"))
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return AdapterFolder(folder.name, target, folder.given, config, shapes)


def _ranks_and_alphas(config: Mapping, modules: Iterable[str]) -> tuple[dict[str, int], dict[str, float]]:
    """What PEFT resolves for each module, under the name that the config's patterns were written for."""
    pattern_of = borrow("get_pattern_key")
    ranks, alphas = (dict(config.get(key) or {}) for key in ("rank_pattern", "alpha_pattern"))
    rank = {m: ranks.get(pattern_of(list(ranks), m), config.get("r", 8)) for m in modules}
    alpha = {m: alphas.get(pattern_of(list(alphas), m), config.get("lora_alpha", 8)) for m in modules}
    return rank, alpha


def _carry(source: Path, target: Path) -> None:
    """What stands beside the weights, and the hashes of the user's own files."""
    for file in [*carried_files(source), *source.glob("config.json")]:
        shutil.copyfile(file, target / file.name)
    (target / SOURCE).write_text(json.dumps(source_hashes(source), sort_keys=True), encoding="utf-8")
