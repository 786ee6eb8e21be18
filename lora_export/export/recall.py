"""What planning came to, kept beside the finished graphs: the next export of the same files needs no model.

Planning asks Transformers what a config means and PEFT what an adapter changes, on a weightless model. Importing the
two takes longer than the rest of an export whose graph is kept. So their answers are kept too, by all that they were
asked about: the request, every file of the folders (of tensors the headers), the versions and this code.

A record is kept where headers decide everything that it says:

1. Every tensor of an adapter's file is a part of a pair or a whole tensor, as the file has it.
2. Every parameter is one stored tensor, under one name, in floats; none is computed.
3. The task has one graph, which this package makes, and the request names no modules.

Everything else is planned each time. So is what would be refused: nothing is refused here, planning does that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import safetensors
import torch

from lora_export.adapters.factors import Adapter, LoraFactors
from lora_export.adapters.folder import WEIGHTS, AdapterFolder
from lora_export.adapters.foreign import locate_adapter, read_foreign
from lora_export.adapters.pack import choose_sites
from lora_export.adapters.peft_reader import base_path_of, require_finite
from lora_export.adapters.peft_writer import PREFIX
from lora_export.artifact import versions
from lora_export.base.checkpoint import Checkpoint
from lora_export.base.tasks import Task, graphs_of
from lora_export.carried import Carried
from lora_export.errors import LoraExportError
from lora_export.export.graphs import FinishedGraph, kept_graphs
from lora_export.export.options import ExportOptions
from lora_export.export.origin import locate_base
from lora_export.export.plan import Plan, Request, opened_folders
from lora_export.export.resolve import Resolved
from lora_export.export.weights import Parameters
from lora_export.graph.cache import cache_key, keep_record, kept_record

# Where PEFT's file keeps the parts of a pair.
_PARTS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector", "bias": "lora_B.bias"}
# What an export reads of a config once its graph is there.
_READ = ("num_labels", "vocab_size")
_READ_OF_TEXT = (
    "model_type", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings", "bos_token_id",
    "eos_token_id", "pad_token_id",
)  # fmt: skip
# Files larger than this are no settings; they are known by name, size and time.
_MOST_BYTES_READ = 1 << 26
_HEADER_SIZE_BYTES = 8


@dataclass(frozen=True)
class Recalled:
    """A plan and its resolution, read from a record, and the graphs that are kept for them."""

    plan: Plan
    resolved: Resolved
    graphs: dict[str, FinishedGraph]


def record_key(request: Request, options: ExportOptions) -> str | None:
    """The name of the record of `request`; None where none is kept."""
    more = (request.graph, request.quantization, request.convert_rank, request.pooling)
    if request.residual_base or any(each is not None for each in more) or not options.use_cache:
        return None
    if options.targets or options.zeros_for_missing_head:
        return None
    try:
        paths = [locate_adapter(given) for given, _ in request.adapters]
        if any(path.is_file() or read_foreign(path) is not None for path in paths):
            return None
        located = locate_base(request.base, opened_folders(request))
        states = {str(path): _state_of(path) for path in (located.path, *paths)}
    except (LoraExportError, OSError):  # for planning to tell
        return None
    facts = {"step": "plan", "request": asdict(request), "located": asdict(located), "files": states}
    return cache_key(facts | {"versions": versions() | {"tokenizers": version("tokenizers")}})


def _state_of(folder: Path) -> dict[str, object]:
    """Every file of `folder` by name: a hash of its content, of a file of tensors a hash of its header."""
    return {path.name: _content_of(path) for path in sorted(folder.iterdir()) if path.is_file()}


def _content_of(path: Path) -> object:
    state = path.stat()
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            size = file.read(_HEADER_SIZE_BYTES)
            header = file.read(min(int.from_bytes(size, "little"), state.st_size))
        return [state.st_size, hashlib.sha256(size + header).hexdigest()]
    if state.st_size > _MOST_BYTES_READ:
        return [state.st_size, state.st_mtime_ns]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def keep(key: str | None, request: Request, options: ExportOptions, *, found: tuple[Plan, Resolved]) -> None:
    """Keep what a plan and its resolution say under `key`, where headers alone decide it; with a file that changed
    meanwhile, the key is another."""
    plan, resolved = found
    parameters = resolved.parameters
    is_plain = (
        len(graphs_of(plan.task)) == 1
        and plan.checkpoint.quantization is None
        and not parameters.computed
        and all(isinstance(name, str) for name in parameters.stored_names.values())
        and all(sum(path in parameters.stored_names for path in group) <= 1 for group in parameters.aliases.values())
    )
    if key is None or not is_plain:
        return
    adapters = [_fields_of(*pair) for pair in zip(plan.folders, resolved.adapters, strict=True)]
    if all(fields is not None for fields in adapters) and record_key(request, options) == key:
        keep_record(key, _plan_fields(plan) | _resolved_fields(resolved) | {"adapters": adapters})


def _plan_fields(plan: Plan) -> dict:
    carried = plan.carried
    return {
        "task": plan.task,
        "dtype": plan.dtype,
        "pad_token_id": plan.pad_token_id,
        "other_bases": dict(plan.other_bases),
        "remarks": plan.remarks,
        "config": {
            "fields": plan.config.to_dict(),
            "read": {name: getattr(plan.config, name) for name in _READ if hasattr(plan.config, name)},
            "of_text": {name: getattr(plan.config.get_text_config(), name, None) for name in _READ_OF_TEXT},
            "labels": plan.config.id2label and list(plan.config.id2label.items()),  # PVT's config has none
            "label2id": plan.config.label2id,
        },
        "n_labels": [config.num_labels for config in plan.adapter_configs],
        "carried": {name: str(path) for name, path in carried.files.items()},
        "places": dict(carried.places),
    }


def _resolved_fields(resolved: Resolved) -> dict:
    parameters = resolved.parameters
    return {
        "model_class": resolved.model_class,
        "stored_names": dict(parameters.stored_names),
        "aliases": dict(parameters.aliases),
        "shapes": dict(parameters.shapes),
        "zeros_for": sorted(parameters.zeros_for),
        "in_out": sorted(parameters.in_out),
        "embeddings": sorted(parameters.embeddings),
    }


def _fields_of(folder: AdapterFolder, adapter: Adapter) -> dict | None:
    """Where the tensors of `adapter` are in its file; None if there is more to it."""
    rest = (adapter.base_copies, adapter.embeddings, adapter.convolutions, adapter.token_rows, adapter.layers)
    if any(rest) or adapter.conversion_errors or adapter.config != folder.config:
        return None
    if folder.path != locate_adapter(folder.given):  # a copy with other names
        return None
    whole = {base_path_of(key): key for key in folder.shapes}
    with safetensors.safe_open(folder.path / WEIGHTS, framework="pt") as file:

        def place(key: str | None, tensor: torch.Tensor) -> tuple[str, str] | None:
            dtype = str(tensor.dtype).removeprefix("torch.")
            is_there = key in folder.shapes and torch.equal(file.get_tensor(key).to(tensor.dtype), tensor)
            return (key, dtype) if is_there else None

        replaced = {path: place(whole.get(path), tensor) for path, tensor in adapter.replaced.items()}
        pairs = {}
        for module, pair in adapter.lora.items():
            parts = {name: getattr(pair, name) for name in _PARTS}
            found = {n: place(f"{PREFIX}{module}.{_PARTS[n]}", t) for n, t in parts.items() if t is not None}
            pairs[module] = {"scale": pair.scale, "in_out": pair.weight_is_in_out, "parts": found}
    places = [*replaced.values(), *(each for pair in pairs.values() for each in pair["parts"].values())]
    if None in places or {key for key, _ in places} != set(folder.shapes):
        return None
    return {"pairs": pairs, "replaced": replaced, "replaced_modules": adapter.replaced_modules}


def recalled(key: str | None, request: Request) -> Recalled | None:
    """What was kept under `key`, with adapters read anew; None if nothing was, or its graphs are not kept.

    Raises:
        InputRefused: An adapter holds numbers that are not finite.
    """
    fields = kept_record(key) if key is not None else None
    if fields is None:
        return None
    folders = opened_folders(request)
    checkpoint = Checkpoint.open(locate_base(request.base, folders), is_known=True)
    plan = _plan_of(fields, request, checkpoint, folders=folders)
    for folder in folders:
        require_finite(folder)
    resolved = _resolved_of(fields, plan)
    choice = choose_sites(resolved.adapters if request.mode == "dynamic" else ())
    graphs = kept_graphs(plan, resolved, choice)
    return None if graphs is None else Recalled(plan, resolved, graphs)


def _plan_of(fields: Mapping, request: Request, checkpoint: Checkpoint, *, folders: tuple[AdapterFolder, ...]) -> Plan:
    of_config = fields["config"]
    names = of_config["labels"]
    labels = {"id2label": names and dict(map(tuple, names)), "label2id": of_config["label2id"]}
    text = KeptConfig({}, of_config["of_text"])
    return Plan(
        request,
        checkpoint,
        folders,
        Task(fields["task"]),
        fields["dtype"],
        KeptConfig(of_config["fields"], of_config["read"] | labels, text),
        tuple(KeptConfig({}, {"num_labels": n}) for n in fields["n_labels"]),
        Carried({name: Path(path) for name, path in fields["carried"].items()}, fields["places"]),
        fields["pad_token_id"],
        other_bases=fields["other_bases"],
        remarks=tuple(fields["remarks"]),
    )


def _resolved_of(fields: Mapping, plan: Plan) -> Resolved:
    adapters = tuple(_adapter_of(*pair) for pair in zip(plan.folders, fields["adapters"], strict=True))
    is_merged = plan.request.mode == "merge"
    base = Parameters(
        plan.checkpoint,
        fields["stored_names"],
        {path: tuple(group) for path, group in fields["aliases"].items()},
        {path: tuple(shape) for path, shape in fields["shapes"].items()},
        zeros_for=frozenset(fields["zeros_for"]),
        in_out=frozenset(fields["in_out"]),
        embeddings=frozenset(fields["embeddings"]),
        dtype=plan.dtype,
    )
    merged = tuple(zip(adapters, plan.request.weight_of_each, strict=True)) if is_merged else ()
    return Resolved(adapters, replace(base, adapters=merged), None, fields["model_class"])


def _adapter_of(folder: AdapterFolder, fields: Mapping) -> Adapter:
    with safetensors.safe_open(folder.path / WEIGHTS, framework="pt") as file:

        def read(place: tuple[str, str]) -> torch.Tensor:
            key, dtype = place
            return file.get_tensor(key).to(getattr(torch, dtype))

        lora = {}
        for module, pair in fields["pairs"].items():
            parts = {name: read(place) for name, place in pair["parts"].items()}
            lora[module] = LoraFactors(module=module, scale=pair["scale"], weight_is_in_out=pair["in_out"], **parts)
        replaced = {path: read(place) for path, place in fields["replaced"].items()}
    return Adapter(folder.name, lora, replaced, tuple(fields["replaced_modules"]), folder.config)


class KeptConfig:
    """What a record has of a `PretrainedConfig`. Anything else that is asked for raises, so that no default of the
    asker stands in for it."""

    def __init__(self, fields: Mapping, values: Mapping, text: KeptConfig | None = None) -> None:
        self._fields, self._values, self._text = fields, values, text

    def to_dict(self) -> dict:
        """As the config's own."""
        return dict(self._fields)

    def get_text_config(self) -> KeptConfig:
        """The part that is about text."""
        if self._text is None:
            raise LookupError("the record has no text config")
        return self._text

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self._values:
            raise LookupError(f"the record does not have the config's {name}")
        return self._values[name]
