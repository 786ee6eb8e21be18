"""A base in a GGUF file, as llama.cpp has it: a folder that stands for it, and its weights in floats, one at a time.

Transformers reads such a file whole (`from_pretrained(gguf_file=…)`). Here its parts are called for one tensor: its map
of names, what undoes llama.cpp's layout (`TensorProcessor`), and `gguf.dequantize`, whose float32 is what is exported.
Config and tokenizer are those that Transformers makes of the file. The folder holds them, a link to the file, and which
of its tensors each parameter is; it lasts as long as this process.

Taken are the architectures below, whose weights tests compare with `from_pretrained`, and of these only files of which
Transformers leaves nothing out. It drops in silence tensors that it has no place for (`rope_freqs` of Llama 3.1), the
scaling of positions, the base of StarCoder2's, and sliding windows; so each key must be one that it reads, or say what
the config has anyway.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from lora_export.base.config import refuse_unsafe_or_unknown
from lora_export.base.stored import GGUF_NAMES, SafetensorsFiles, TensorInfo, stands_for_gguf
from lora_export.base.tasks import Task
from lora_export.base.weightless import build_weightless
from lora_export.compat import borrow
from lora_export.errors import EnvironmentUnusable, InputRefused, refused_if_it_fails, some_of
from lora_export.folders import state_of, workplace
from lora_export.quiet import quiet
from lora_export.reading import read_json

# Keys that Transformers' map has not, which must say what the config has anyway: sizes of a head, factors, lengths.
_HEAD_SIZES = ("attention.key_length", "attention.value_length")
_SCALES = ("rope.scale_linear", "rope.scaling.factor", "rope.scaling.attn_factor")
_LENGTHS = ("attention.sliding_window", "rope.scaling.original_context_length")
_NAME_IT = "name the checkpoint that the file was made from"
# Whatever it is called: a link in the hub's cache, or a copy, is the same base.
_FILE = "model.gguf"
ARCHITECTURES = ("llama", "phi3", "qwen2", "qwen3", "starcoder2")


@dataclass(frozen=True)
class GgufFiles(SafetensorsFiles):
    """The tensors of a GGUF file by the parameters that they are, as if they were stored in float32.

    Attributes:
        source: The file.
        config: What it says of the model, in Transformers' words.
        names: The file's name of each tensor.
    """

    source: Path = Path()
    config: Mapping[str, object] = field(default_factory=dict, repr=False, compare=False)
    names: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def read(self, name: str) -> torch.Tensor:
        from gguf import dequantize

        reader = _reader(self.source)
        stored = next(tensor for tensor in reader.tensors if tensor.name == self.names[name])
        processor = _processor(reader, self.config)
        array = dequantize(stored.data, stored.tensor_type)
        found = processor.process(weights=array, name=stored.name, tensor_key_mapping={}, parsed_parameters={})
        value = torch.from_numpy(found.weights.copy())
        if tuple(value.shape) != self.tensors[name].shape:
            _refuse(self.source, f"{stored.name} is {list(value.shape)}", f"{name} of {list(self.tensors[name].shape)}")
        return value


def gguf_files(folder: Path) -> tuple[GgufFiles, str] | None:
    """The tensors of the file that `folder` stands for, and how they are stored, in words; None for another folder."""
    if not stands_for_gguf(folder):
        return None
    known = read_json(folder / GGUF_NAMES)
    source = (folder / known["file"]).resolve()
    tensors = {name: TensorInfo(source, "F32", tuple(entry["shape"])) for name, entry in known["tensors"].items()}
    names = {name: entry["name"] for name, entry in known["tensors"].items()}
    return GgufFiles(tensors, source=source, config=known["config"], names=names), known["described"]


def gguf_folder(file: Path) -> Path:
    """The folder that stands for a GGUF file.

    Raises:
        InputRefused: It is no model of the architectures that are taken, or not whole.
        EnvironmentUnusable: The package gguf is not installed.
    """
    return _folder(file, state_of(file))


@functools.cache
def _folder(file: Path, state: tuple[int, int, int] | None) -> Path:
    if find_spec("gguf") is None:
        raise EnvironmentUnusable(
            "The package gguf is not installed, by which Transformers reads GGUF files",
            where=str(file),
            next_step="pip install 'lora-export[gguf]'",
        )
    from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

    reader = _reader(file)
    _require_taken(file, reader)
    folder = Path(tempfile.mkdtemp(dir=workplace()))
    with (
        quiet(),
        refused_if_it_fails(
            "Transformers cannot read the config and the tokenizer of the GGUF file",
            where=str(file),
            next_step=_NAME_IT,
        ),
    ):
        raw, _ = PreTrainedConfig.get_config_dict(file.parent, gguf_file=file.name)
        config = AutoConfig.for_model(**raw)
        if "tokenizer.ggml.model" in reader.fields:
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    _require_read(file, reader, config)
    model = build_weightless(Task.TEXT_GENERATION, config, "float32", most_parameters=4 * len(reader.tensors) + 256)
    fields = json.loads(config.to_json_string()) | {"architectures": [type(model).__name__], "dtype": "float32"}
    refuse_unsafe_or_unknown(fields, folder)
    kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1})
    known = {
        "file": _FILE,
        "described": f"GGUF ({', '.join(kinds)})",
        "config": raw,
        "tensors": _placed(file, reader, model, config=raw),
    }
    (folder / _FILE).symlink_to(file)
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")
    (folder / GGUF_NAMES).write_text(json.dumps(known), encoding="utf-8")
    return folder


def _reader(file: Path) -> object:
    return _opened(file, state_of(file))


@functools.lru_cache(maxsize=2)
def _opened(file: Path, state: tuple[int, int, int] | None) -> object:
    from gguf import GGUFReader

    with refused_if_it_fails("The file is truncated or not GGUF", where=str(file), next_step="fetch the file again"):
        return GGUFReader(file)


def _text(reader: object, name: str) -> str:
    found = reader.fields.get(name)
    return "" if found is None else str(found.contents())


def _require_taken(file: Path, reader: object) -> None:
    kind, architecture = _text(reader, "general.type") or "model", _text(reader, "general.architecture")
    scaling = _text(reader, f"{architecture}.rope.scaling.type")
    found = [f"{kind} of {architecture or 'no architecture'}"]
    found += ["one of several files"] if "split.count" in reader.fields else []
    found += [f"rope.scaling.type {scaling}"] if scaling not in ("", "none") else []
    if kind != "model" or architecture not in ARCHITECTURES or found[1:]:
        raise InputRefused(
            "The GGUF file is no base that is read",
            where=str(file),
            expected=f"a model in one file, of {', '.join(ARCHITECTURES)}, without scaled positions",
            found=", ".join(found),
            next_step=_NAME_IT,
        )


def _require_read(file: Path, reader: object, config: object) -> None:
    """Refuse what the file says of the model and Transformers does not read, unless it says what the config has."""
    architecture = _text(reader, "general.architecture")
    read = {key for key, name in borrow("GGUF_CONFIG_MAPPING")[architecture].items() if name is not None}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    theta, longest = config.rope_parameters["rope_theta"], config.max_position_embeddings
    holds = {
        "rope.freq_base": lambda value: value == theta,
        **dict.fromkeys(("rope.dimension_count", *_HEAD_SIZES), lambda value: value == head),
        **dict.fromkeys(_SCALES, lambda value: value == 1),
        "rope.scaling.type": lambda value: value == "none",
        **dict.fromkeys(_LENGTHS, lambda value: value >= longest),
        **dict.fromkeys(("expert_count", "expert_used_count", "pooling_type"), lambda value: value == 0),
        "attention.causal": bool,
        "vocab_size": lambda value: value == config.vocab_size,
    }
    for name, entry in reader.fields.items():
        key, value = name.removeprefix(f"{architecture}."), entry.contents()
        if key == name or (key in read and key != "rope.freq_base"):
            continue
        if key not in holds or not holds[key](value):
            raise InputRefused(
                "The GGUF file says something of its model that Transformers leaves out",
                where=str(file),
                found=f"{name} = {value}",
                next_step=_NAME_IT,
            )


def _processor(reader: object, config: Mapping[str, object]) -> object:
    """What undoes llama.cpp's layout of the weights of this architecture."""
    processors = borrow("TENSOR_PROCESSORS")
    return processors.get(_text(reader, "general.architecture"), borrow("TensorProcessor"))(config=dict(config))


def _placed(file: Path, reader: object, model: torch.nn.Module, *, config: Mapping[str, object]) -> dict[str, dict]:
    """Which tensor of the file each parameter of `model` is, and its shape."""
    places = borrow("get_gguf_hf_weights_map")(model, _processor(reader, config))
    left = [tensor.name for tensor in reader.tensors if tensor.name not in places]
    if left:
        _refuse(file, f"no place for {some_of(left, 4)}", f"what a {model.config.model_type} has")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {places[tensor.name]: tensor.name for tensor in reader.tensors}
    return {name: {"name": stored, "shape": shapes[name]} for name, stored in found.items()}


def _refuse(file: Path, found: str, expected: str) -> None:
    raise InputRefused(
        "A tensor of the GGUF file has no place in the model that Transformers makes of it",
        where=str(file),
        expected=expected,
        found=found,
        next_step=_NAME_IT,
    )
