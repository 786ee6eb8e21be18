"""Folders that sentence-transformers saved, releases 2 to 6: where their Transformer lies, and what follows it.

`modules.json` lists modules by class and folder. Its Transformer is a base or an adapter, in the folder itself or in
one below it (`0_Transformer`). Pooling, Dense and Normalize follow; their classes moved between packages, and pooling
was written as a flag for each way before it was one name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

import numpy as np
import torch

from lora_export.base.stored import SafetensorsFiles, refuse_pickles
from lora_export.errors import InputRefused
from lora_export.reading import is_file, is_folder, json_of, read_json
from lora_export.sentence import MODULES, PROMPTS, TEXT_SETTINGS, Activation, Dense, Pooling, SentenceEmbedding

_PACKAGE = "sentence_transformers."
TRANSFORMER, _POOLING, _DENSE, _NORMALIZE, _DROPOUT = "Transformer", "Pooling", "Dense", "Normalize", "Dropout"
# What a module reads and writes, where its config does not say so.
_EMBEDDING = "sentence_embedding"
# In the order in which sentence-transformers puts them one behind the other.
_FLAGS = {
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_max_tokens": Pooling.MAX,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_mean_sqrt_len_tokens": Pooling.MEAN_SQRT_LEN,
    "pooling_mode_weightedmean_tokens": Pooling.WEIGHTED_MEAN,
    "pooling_mode_lasttoken": Pooling.LAST_TOKEN,
}
_INSTEAD = "name the pooling with --pooling, such as --pooling mean, or leave it to the host with --pooling none"


@dataclass(frozen=True)
class SentenceHead:
    """What makes an embedding of a model's states, read from a folder or named.

    Attributes:
        root: The folder with `modules.json`; None where it was named.
        files: All files that say it, and what hosts must do to texts.
    """

    embedding: SentenceEmbedding
    root: Path | None = None
    files: tuple[Path, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Of its linear layers in float32."""
        layers = [each for each in self.embedding.layers if each is not None]
        return sum(4 * each.out_features * (each.in_features + each.bias) for each in layers)

    def weights(self) -> tuple[dict[str, np.ndarray], ...]:
        """`weight` `[out, in]` and `bias` `[out]` of each linear layer, in float32."""
        files = [path for path in self.files if path.suffix == ".safetensors"]
        found = []
        for file in files:
            stored = SafetensorsFiles.open([file])
            names = {name.removeprefix("linear."): name for name in stored.tensors}
            found.append({key: stored.read(name).to(torch.float32).numpy() for key, name in names.items()})
        return tuple(found)


def transformer_in(folder: Path) -> Path:
    """Where the Transformer of a sentence-transformers folder lies; any other folder itself."""
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return folder
    path = _transformer_path(folder)
    below = folder / path if path else folder
    return below if path and is_folder(below) else folder


def sentence_root(folder: Path) -> Path | None:
    """The sentence-transformers folder that `folder`, of a base or adapter, is or is the Transformer of."""
    if (folder / MODULES).is_file():
        return folder
    return folder.parent if _transformer_path(folder.parent) == folder.name else None


def module_folders(root: Path) -> dict[str, str]:
    """The classes of the modules in the `modules.json` of `root` by their folder in it, "" for itself; none without
    one, and without folders further below or elsewhere."""
    try:
        modules = json_of((root / MODULES).read_text(encoding="utf-8"))
        found = {m["path"].rstrip("/"): _class_of(m) for m in modules if m["type"].startswith(_PACKAGE)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {path: kind for path, kind in found.items() if Path(path).name == path and path != ".."}


def is_setting_of(name: str, kind: str) -> bool:
    """Whether a file of this name is read of the folder of a module of class `kind`."""
    of_kind = {_DENSE: ("model.safetensors",), TRANSFORMER: (MODULES, PROMPTS)}.get(kind, ())
    return name in ("config.json", *of_kind) or (kind == TRANSFORMER and any(map(Path(name).match, TEXT_SETTINGS)))


def _transformer_path(root: Path) -> str | None:
    """The path of the Transformer in the `modules.json` of `root`; None without one."""
    found = [path for path, kind in module_folders(root).items() if kind == TRANSFORMER]
    return found[0] if len(found) == 1 else None


def _class_of(module: Mapping) -> str:
    return module["type"].rpartition(".")[2]


def read_head(root: Path, source: str | None) -> SentenceHead:
    """What follows the Transformer of the sentence-transformers folder `root`.

    Args:
        source: See `SentenceEmbedding.source`.

    Raises:
        InputRefused: A module, or an option of one, that is not part of a graph here; it is named.
    """
    modules = _modules(root)
    kinds = [_class_of(module) for module in modules]
    if kinds[:2] != [TRANSFORMER, _POOLING]:
        _refuse("A module of the sentence-transformers folder cannot be part of the graph", root / MODULES,
                expected="Transformer, Pooling, and any of Dense and Normalize", found=", ".join(kinds))  # fmt: skip
    _require_last_states(root)
    pooling, files = _pooling(root / modules[1]["path"]), [root / MODULES, root / modules[1]["path"] / "config.json"]
    layers: list[Dense | None] = []
    for module, kind in zip(modules[2:], kinds[2:], strict=True):
        if kind == _NORMALIZE:
            files += _plain_config(root / module["path"], "Normalize")
            layers.append(None)
        elif kind == _DROPOUT:
            continue  # in training only
        elif kind == _DENSE:
            place = root / module["path"]
            layers.append(_dense(place))
            files += [place / "config.json", place / "model.safetensors"]
        else:
            _refuse("A module of the sentence-transformers folder cannot be part of the graph", root / MODULES,
                    expected="Transformer, Pooling, and any of Dense and Normalize", found=module["type"])  # fmt: skip
    prompts = filter(Path.is_file, [root / PROMPTS])
    files += [*_settings_files(root)[:1], *prompts]
    return SentenceHead(SentenceEmbedding(pooling, tuple(layers), source), root, tuple(files))


def _modules(root: Path) -> list[Mapping]:
    try:
        modules = json_of((root / MODULES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputRefused(f"{MODULES} is not valid JSON", where=str(root / MODULES), found=str(error)) from error
    is_list = isinstance(modules, list) and all(
        isinstance(m, dict) and isinstance(m.get("type"), str) and isinstance(m.get("path"), str) for m in modules
    )
    if not is_list:
        _refuse(
            f"{MODULES} does not list modules",
            root / MODULES,
            expected="objects with a type and a path",
            found=repr(modules)[:99],
        )
    for module in modules:
        if not module["type"].startswith(_PACKAGE):
            _refuse("A module of the sentence-transformers folder needs code of its own, which is never run",
                    root / MODULES, expected=f"a class of {_PACKAGE}", found=module["type"])  # fmt: skip
        if Path(module["path"]).is_absolute() or ".." in Path(module["path"]).parts:
            _refuse(
                "A module lies outside its folder",
                root / MODULES,
                expected="a path in the folder",
                found=module["path"],
            )
    return modules


def transformer_settings(root: Path) -> dict:
    """What a sentence-transformers folder says of its Transformer beside the model's own config."""
    files = _settings_files(root)
    return read_json(files[0]) if files else {}


def _settings_files(root: Path) -> list[Path]:
    """The files that may hold the settings of a Transformer; the first is the one that does."""
    places = dict.fromkeys((transformer_in(root), root))
    return [path for place in places for name in TEXT_SETTINGS for path in sorted(place.glob(name))]


def files_read(folder: Path, head: SentenceHead | None) -> tuple[Path, tuple[Path, ...]]:
    """The path of a Transformer's `folder` below its sentence-transformers folder, and what is read of that: all that
    says how it embeds (`head`), or where the Transformer lies; nothing of other folders."""
    root = sentence_root(folder) if head is None else head.root
    if root is None or (head is None and root == folder):
        return Path(), ()
    place = folder if folder.is_relative_to(root) else transformer_in(root)  # a folder that was made of the Transformer
    return place.relative_to(root), (root / MODULES,) if head is None else head.files


def says_embedding(files: Collection[str]) -> bool:
    """Whether what was read of a source says how it embeds: beside `modules.json` a pooling, a folder of which the
    config is all there is."""
    folders = [PurePosixPath(file).parent for file in files]
    configs = [path.parent for path in map(PurePosixPath, files) if path.name == "config.json" and len(path.parts) > 1]
    return MODULES in files and any(folders.count(folder) == 1 for folder in configs)


def _require_last_states(root: Path) -> None:
    """Refuse a Transformer whose Pooling gets something else than the model's last hidden states."""
    modalities = transformer_settings(root).get("modality_config")
    text = modalities.get("text") if isinstance(modalities, dict) else None
    plain = {"method": "forward", "method_output_name": "last_hidden_state"}
    found = text if isinstance(text, dict) else plain
    if any(found.get(name, wanted) != wanted for name, wanted in plain.items()):
        _refuse("What the Transformer gives to its Pooling cannot be part of the graph", f"{root}: modality_config",
                expected=repr(plain), found=repr(found)[:200])  # fmt: skip


def _pooling(place: Path) -> tuple[Pooling, ...]:
    """The ways to pool that the config of a Pooling names."""
    fields, file = read_json(place / "config.json"), place / "config.json"
    if fields.get("include_prompt", True) is not True:
        _refuse(
            "Pooling that leaves a prompt's tokens out cannot be part of a graph, which is not told how many they are",
            f"{file}: include_prompt",
            expected="true",
            found=repr(fields["include_prompt"]),
        )
    if "pooling_mode" in fields:
        named = fields["pooling_mode"]
        names = [named] if isinstance(named, str) else named
    else:
        names = [way for flag, way in _FLAGS.items() if fields.get(flag)]
        unknown = sorted(name for name in fields if name.startswith("pooling_mode_") and name not in _FLAGS)
        names += [name for name in unknown if fields[name]]
        if names and "pooling_mode_mean_tokens" not in fields:  # true in releases before 6
            _refuse("The config does not say whether states are averaged", f"{file}: pooling_mode_mean_tokens",
                    expected="true or false", found="nothing")  # fmt: skip
        names = names or [Pooling.MEAN]
    known = isinstance(names, list) and names and all(name in tuple(Pooling) for name in names)
    if not known:
        _refuse("The way to pool cannot be part of the graph", file, expected=", ".join(Pooling), found=repr(names))
    return tuple(map(Pooling, names))


def _plain_config(place: Path, kind: str) -> list[Path]:
    """The config of a module, if it has one; refused where it works on something else than the embedding."""
    config = place / "config.json"
    fields = read_json(config) if is_file(config) else {}
    plain_values = {"module_input_name": _EMBEDDING, "module_output_name": _EMBEDDING, "use_residual": False}
    for name, plain in plain_values.items():
        if fields.get(name) not in (None, plain):
            _refuse(f"A {kind} of this kind cannot be part of the graph", f"{config}: {name}", expected=repr(plain),
                    found=repr(fields[name]))  # fmt: skip
    return [config] if is_file(config) else []


def _dense(place: Path) -> Dense:
    """A linear layer, its weights looked at."""
    fields, config = read_json(place / "config.json"), place / "config.json"
    _plain_config(place, "Dense")
    named = str(fields.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = named.rpartition(".")[2]
    if not named.startswith("torch.nn.") or activation not in tuple(Activation):
        _refuse("The activation of a Dense cannot be part of the graph", f"{config}: activation_function",
                expected=", ".join(Activation), found=named)  # fmt: skip
    file = place / "model.safetensors"
    if not is_file(file):
        refuse_pickles(place, "Dense")
        _refuse(
            "A Dense has no weights",
            place,
            expected=file.name,
            found=", ".join(sorted(p.name for p in place.iterdir())),
        )
    shapes = {name: info.shape for name, info in SafetensorsFiles.open([file]).tensors.items()}
    sizes, bias = (fields.get("out_features"), fields.get("in_features")), fields.get("bias", True)
    wanted = {"linear.weight": sizes} | ({"linear.bias": sizes[:1]} if bias else {})
    if shapes != wanted:
        _refuse("The weights of a Dense are not what its config says", file, expected=str(wanted), found=str(shapes))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Dense(sizes[1], sizes[0], bool(bias), Activation(activation), digest)


def _refuse(what: str, where: Path | str, *, expected: str, found: str) -> NoReturn:
    raise InputRefused(what, where=str(where), expected=expected, found=found, next_step=_INSTEAD)
