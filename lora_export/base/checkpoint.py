"""A base checkpoint on disk: its folder, its config, and what it holds of a model's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_export.base.config import read_config, refuse_unsafe_or_unknown, require_headers
from lora_export.base.conversion import Converted, stored_parameters
from lora_export.base.gguf_file import gguf_files, gguf_folder
from lora_export.base.quantized import in_floats, refuse_other_dtypes, refuse_quantized
from lora_export.base.sentence_folder import transformer_in
from lora_export.base.stored import SAFETENSORS_DTYPES, SafetensorsFiles, weight_files
from lora_export.errors import EnvironmentUnusable, InputRefused
from lora_export.named import expanded, hub_out_of_reach, is_hub_id, near, refuse_no_folder
from lora_export.reading import read_json, read_json_if_there

_LONGEST_SIDE = 1 << 14  # of an image, in pixels
# What a base folder contributes to an export: weights, configuration, tokenizer, processor, licences.
_WANTED_FROM_HUB = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "README.md")


@dataclass(frozen=True)
class Located:
    """A folder on this machine, and how the user named it (path, or hub id with its revision)."""

    path: Path
    given: str
    revision: str | None = None


def locate(given: str, *, kind: str) -> Located:
    """The folder that `given` names: a folder, a hub id (`owner/name`, optionally `@revision`), or of a GGUF file one
    that stands for it.

    Raises:
        InputRefused: There is neither a folder nor such a hub id; or a GGUF file that is not read.
        EnvironmentUnusable: The hub cannot be reached and its cache does not hold the id.
    """
    path = expanded(given)
    if path.is_dir():
        return Located(transformer_in(path.resolve()), given)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return Located(gguf_folder(path.resolve()), given)
    if path.exists() or not is_hub_id(given):
        refuse_no_folder(given, kind=kind)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo_id, _, revision = given.partition("@")
    try:
        folder = Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=list(_WANTED_FROM_HUB)))
    except (LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, HfHubHTTPError):
            raise InputRefused(
                f"The hub has no such {kind}, or it needs a login",
                where=given,
                found=str(error),
                next_step=near(given) or "check the id; `hf auth login` opens those that need a login",
            ) from error
        raise EnvironmentUnusable(
            f"The {kind} is not a folder here and the hub cannot be reached",
            where=given,
            found=f"nothing at this path, and from the hub: {str(error).splitlines()[0]}",
            next_step=hub_out_of_reach(given),
        ) from error
    except HFValidationError as error:
        raise InputRefused(f"The {kind} is neither a folder nor a hub id", where=given, found=str(error)) from error
    return Located(transformer_in(folder), repo_id, folder.name)


@dataclass(frozen=True)
class Checkpoint:
    """A base folder: `config.json`, safetensors (sharded or not), tokenizer and licence files.

    Attributes:
        config: `config.json`, what it says of a quantization aside.
        files: Its tensors, quantized weights in floats.
        quantization: How weights are stored, in words; None for floats.
    """

    located: Located
    config: dict
    files: SafetensorsFiles
    quantization: str | None = None

    @classmethod
    def open(cls, located: Located, *, is_known: bool = False) -> Checkpoint:
        """Open the base at `located`, reading headers only.

        Args:
            is_known: Transformers knows the architecture of this very config: it was asked before.

        Raises:
            InputRefused: No config, only pickled weights, a truncated or missing shard, weights quantized in a way that
                is not read, numbers in the config that do not fit the headers, or a model that needs remote code.
        """
        if (located.path / "adapter_config.json").is_file() and not (located.path / "config.json").is_file():
            raise InputRefused(
                "The base is an adapter",
                where=str(located.path),
                expected="config.json and safetensors",
                found="adapter_config.json",
                next_step="name the base first, then the adapters: lora-export COMMAND BASE ADAPTER…",
            )
        config = read_json(located.path / "config.json")
        if not is_known:
            refuse_unsafe_or_unknown(config, located.path)
        if (of_gguf := gguf_files(located.path)) is not None:
            return cls(located, config, *of_gguf)
        files = SafetensorsFiles.open(weight_files(located.path))
        plain, restored, method = in_floats(config, files)
        if restored is None:
            refuse_quantized(config, files, located.path)
        else:
            refuse_quantized(plain, restored, located.path)
        require_headers(plain, restored or files, located.path)
        return cls(located, plain, restored or files, method)

    @property
    def path(self) -> Path:
        return self.located.path

    @property
    def dtype(self) -> str:
        """The dtype most of the checkpoint's bytes are stored in, one of float32, float16, bfloat16.

        Raises:
            InputRefused: They are stored in another dtype.
        """
        n_elements: dict[str, int] = {}
        for info in self.files.tensors.values():
            size = 1
            for dim in info.shape:
                size *= dim
            n_elements[info.dtype] = n_elements.get(info.dtype, 0) + size
        most = max(n_elements, key=n_elements.__getitem__, default="nothing")
        if most not in SAFETENSORS_DTYPES:
            raise InputRefused(
                "Most of the base's weights are stored in a dtype that is not exported",
                where=str(self.path),
                expected="float32, float16 or bfloat16",
                found=most,
                next_step="load it in Transformers, save it in float32, and export that",
            )
        return SAFETENSORS_DTYPES[most]

    def read(self, stored: str | Converted) -> torch.Tensor:
        """The tensor that `checkpoint_names` gave for a parameter, in the dtype it is stored in."""
        return self.files.read(stored) if isinstance(stored, str) else stored.read(self.files)

    def load_config(self, **overrides):
        """The `PretrainedConfig`, from the folder alone, never running code that it carries.

        Raises:
            InputRefused: Transformers cannot read it.
        """
        return read_config(self.config, self.path, **overrides)

    @property
    def tokenizer_inputs(self) -> tuple[str, ...] | None:
        """The inputs that `tokenizer_config.json` names (`model_input_names`); None if it names none."""
        path = self.path / "tokenizer_config.json"
        named = read_json(path).get("model_input_names") if path.is_file() else None
        is_list = isinstance(named, list) and all(isinstance(name, str) for name in named)
        return tuple(named) if is_list else None

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the images that `preprocessor_config.json` makes; None if it does not say."""
        fields = read_json_if_there(self.path / "preprocessor_config.json")
        size = fields.get("size")
        is_exact = isinstance(size, dict) and {"height", "width"} <= size.keys()
        if fields.get("do_center_crop", "crop_size" in fields and not is_exact):
            size = fields.get("crop_size")
        if isinstance(size, dict):
            edge = size.get("shortest_edge")
            size = [size.get("height", edge), size.get("width", edge)]
        sides = [size, size] if isinstance(size, int) else size
        is_size = isinstance(sides, list) and len(sides) == 2 and all(type(side) is int for side in sides)
        return tuple(sides) if is_size and all(0 < side <= _LONGEST_SIDE for side in sides) else None

    @property
    def most_parameters(self) -> int:
        """More parameters than any model of this checkpoint has: a stored tensor is split into a few at most."""
        return 4 * len(self.files.tensors) + 256


def checkpoint_names(
    model: torch.nn.Module, files: SafetensorsFiles, replaced: frozenset[str] = frozenset()
) -> dict[str, str | Converted]:
    """How the checkpoint holds every tensor of `model` that it holds: model path → stored name, or conversion.

    Renamings (legacy names, a base model's prefix added or stripped) and conversions (merged experts) are
    Transformers' own. `Checkpoint.read` takes either.

    Args:
        replaced: Model paths that the checkpoint need not fit: an adapter brings its own (a head of another size).

    Raises:
        InputRefused: A floating parameter is stored in another dtype than float32, float16 or bfloat16; a tensor's
            shape, stored or converted, is not the model's; or a conversion fails.
    """
    state = model.state_dict(keep_vars=True)
    found = list(stored_parameters(model, files))
    floating = [how for path, how in found if state[path].is_floating_point() and path not in replaced]
    refuse_other_dtypes([name for how in floating for name in _stored_names(how)], files)
    shapes = {path: tuple(tensor.shape) for path, tensor in state.items()}
    names: dict[str, str | Converted] = {}
    for path, stored in found:
        first = _stored_names(stored)[0]
        info = files.tensors[first]
        shape = info.shape if isinstance(stored, str) else stored.shape
        if shapes[path] == shape:
            names[path] = stored
        elif path not in replaced:
            raise InputRefused(
                "A tensor of the base does not have the shape its config says",
                where=f"{info.file}: {first}" + ("" if isinstance(stored, str) else f" … → {path}"),
                expected=str(list(shapes[path])),
                found=str(list(shape)),
            )
    return names


def _stored_names(how: str | Converted) -> list[str]:
    return [how] if isinstance(how, str) else [name for group in how.sources.values() for name in group]


def stored_apart(model: torch.nn.Module, names: Mapping[str, str], files: SafetensorsFiles) -> tuple[str, ...]:
    """The paths that `model` ties and for which the checkpoint has numbers of their own (T5 1.1, FLAN-T5, mT5).

    Transformers does not tie those either, whatever the config says.

    Args:
        names: Stored name by model path, from `checkpoint_names`.
    """
    groups: dict[str, list[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, [source]).append(target)
    found = []
    for group in groups.values():
        first, *others = [path for path in group if path in names] or [None]
        found += [path for path in others if not torch.equal(files.read(names[path]), files.read(names[first]))]
    return tuple(found)
