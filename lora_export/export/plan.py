"""From what the user named to what will be exported: everything is refused here, before any work is done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lora_export.adapters.folder import AdapterFolder, open_adapter, usable_name
from lora_export.adapters.foreign import peft_folder
from lora_export.adapters.initialization import PLAIN_START
from lora_export.adapters.on_quantized import require_taken
from lora_export.adapters.renamed import with_todays_names
from lora_export.adapters.support import require_supported
from lora_export.base.checkpoint import Checkpoint
from lora_export.base.sentence_folder import SentenceHead
from lora_export.base.tasks import SEQ2SEQ, Task
from lora_export.base.weightless import build_weightless
from lora_export.carried import Carried, plan_added, plan_carried
from lora_export.errors import InputRefused, UsageProblem
from lora_export.export.given_files import GivenGraph, locate_graph
from lora_export.export.model_configs import configs_for, merged_config, remarks_on_labels, vocabulary_of
from lora_export.export.origin import another_base, locate_base, quantized_training, remark_on, remark_on_training
from lora_export.export.padding import choose_padding, reads_last_token, with_padding
from lora_export.export.pooling import choose_head, task_for
from lora_export.export.task_choice import choose_task
from lora_export.named import expanded
from lora_export.quantization import AS_STORED, Method, Quantization


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        base: A folder or hub id; None to take the adapters' own `base_model_name_or_path`.
        adapters: (folder or hub id, name or None) of each adapter.
        mode: "merge" or "dynamic".
        dtype: None for the checkpoint's.
        weights: Of each adapter in a merged sum; empty for 1 each.
        convert_rank: Rank to convert tuners other than LoRA with, to serve them: a whole number, or a share of the
            energy between 0 and 1; None to refuse them.
        residual_base: The base is the one that the adapters' start (PiSSA, CorDA, LoftQ, LoRA-GA) left, so their pairs
            are plain ones on it.
        pad_token_id: The padding token of a classifier on a decoder; None for the adapters', else the base's.
        quantization: How to store the base's linear maps as integers; None for floats.
        graph: A folder or ONNX file that another tool wrote, to put the adapters onto; None to make a graph.
        pooling: How the graph makes an embedding of a text: "auto" for what the sentence-transformers folder of base or
            adapters says, a way to pool, or such a folder; None for hidden states alone.
        base_files_stay: The base's tokenizer and settings stay also where all adapters bring the same others, as more
            adapters come later.
    """

    base: str | None
    adapters: tuple[tuple[str, str | None], ...]
    mode: str
    task: str | None = None
    dtype: str | None = None
    provider: str = "cpu"
    weights: tuple[float, ...] = ()
    convert_rank: float | None = None
    residual_base: bool = False
    pad_token_id: int | None = None
    quantization: Quantization | None = None
    base_files_stay: bool = False
    graph: str | None = None
    pooling: str | None = None

    @property
    def weight_of_each(self) -> tuple[float, ...]:
        return self.weights or (1.0,) * len(self.adapters)


@dataclass(frozen=True)
class Plan:
    """A request that passed all checks that headers allow.

    Attributes:
        config: The `PretrainedConfig` the graph is traced from; for a merge, with the adapter's number of labels.
        adapter_configs: The config each adapter's head was trained for, in the order of `folders`.
        carried: The files that a host needs beside the graph.
        pad_token_id: The padding token by which a classifier on a decoder finds the token to read; None for others.
        model: The weightless float32 model that the adapters were held against, of the checkpoint's own config; None
            without adapters. `resolve` goes on with it.
        other_bases: The base that an adapter records, where it is another than `checkpoint`, by the adapter's name.
        remarks: What was decided for the user and is worth a word.
        given_graph: The graph that another tool made; None to make one.
        head: What makes an embedding of a text; None for hidden states alone.
        own_heads: What was read of how sources embed, by the adapter's name, "" of the base.
    """

    request: Request
    checkpoint: Checkpoint
    folders: tuple[AdapterFolder, ...]
    task: Task
    dtype: str
    config: object
    adapter_configs: tuple[object, ...]
    carried: Carried
    pad_token_id: int | None = None
    model: torch.nn.Module | None = None
    other_bases: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    given_graph: GivenGraph | None = None
    head: SentenceHead | None = None
    own_heads: Mapping[str, SentenceHead] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Bytes that the exported weights take, before packing and metadata."""
        if self.given_graph is not None:
            return self.given_graph.n_bytes
        item = 4 if self.dtype == "float32" else 2
        sizes = [item * math.prod(info.shape) for info in self.checkpoint.files.tensors.values()]
        # An encoder and a decoder each have the embedding that they share.
        return sum(sizes) + (max(sizes, default=0) if self.task in SEQ2SEQ else 0)


def make_plan(request: Request, *, added_to: Path | None = None) -> Plan:
    """Locate and check base and adapters, headers only.

    Args:
        added_to: The dynamic export that the adapters are added to; None to make one.

    Raises:
        LoraExportError: Anything that cannot be exported, by name, with the way out.
    """
    folders = opened_folders(request)
    _require_exportable(request, folders)
    checkpoint = Checkpoint.open(locate_base(request.base, folders))
    chosen = choose_task(task_for(request.task, request.pooling), checkpoint, folders)
    task, model = chosen.task, chosen.model
    chosen_head = choose_head(request.pooling, task, checkpoint=checkpoint, folders=folders)
    _refuse_activated(folders, task)
    given = _given_graph(request, task)
    dtype, of_dtype = _dtype_of(request, checkpoint) if given is None else (given.dtype, ())
    remarks = chosen.remarks + of_dtype + chosen_head.remarks
    config, pad_token_id = checkpoint.load_config(), None
    adapter_configs = ()
    if model is None and task is Task.TEXT_CLASSIFICATION:
        model = build_weightless(task, config, "float32", most_parameters=checkpoint.most_parameters)
    if model is not None:
        folders = tuple(with_todays_names(folder, model) for folder in folders)
        if reads_last_token(task, model):
            pad_token_id, said = choose_padding(
                request.pad_token_id, folders, checkpoint, config=config, is_fixed=added_to is not None
            )
            config, remarks = with_padding(config, pad_token_id), remarks + said
        adapter_configs = configs_for(config, task, folders, model=model)
    if request.pad_token_id is not None and pad_token_id is None:
        _refuse_padding(f"{task} on {config.model_type}")
    paths = {folder.name: folder.path for folder in folders}
    sizes = {f.name: vocabulary_of(config) for f, config in zip(folders, adapter_configs, strict=True)}
    is_new = added_to is None
    if is_new:
        stays = request.base_files_stay
        carried = plan_carried(checkpoint.path, paths, request.mode, vocabularies=sizes, base_stays=stays)
    else:
        carried = plan_added(added_to, paths, sizes)
    if request.mode == "merge" and adapter_configs:
        config = merged_config(folders, adapter_configs)
    remarks += carried.remarks
    remarks += remarks_on_labels(folders, adapter_configs, task)
    others = {f.name: other for f in folders if (other := another_base(f, checkpoint.located)) is not None}
    remarks += tuple(remark_on(name, other, checkpoint.located.given) for name, other in others.items())
    remarks += _remarks_on_training(folders, checkpoint)
    found = (request, checkpoint, folders, task, dtype, config, adapter_configs, carried, pad_token_id)
    return Plan(*found, model, others, remarks, given, chosen_head.head, chosen_head.own)


def _require_exportable(request: Request, folders: Sequence[AdapterFolder]) -> None:
    """Refuse what the request and the adapters' configs alone say cannot be exported."""
    _refuse_equal_names(folders)
    if len(request.weight_of_each) != len(folders):
        raise UsageProblem(
            "--weight is given once for each adapter, in order",
            expected=f"{len(folders)} weights",
            found=f"{len(request.weights)}",
        )
    for folder in folders:
        require_supported(folder.config, request.mode, folder.name, convert_rank=request.convert_rank)
        if request.quantization is not None:
            require_taken(folder.config, request.mode, folder.name)
    _refuse_folded(request)


def _refuse_folded(request: Request) -> None:
    """Refuse to fold adapters into integers that are to stay as they are stored."""
    how = request.quantization
    if how is not None and how.method is Method.AS_STORED and request.mode == "merge" and request.adapters:
        raise UsageProblem(
            "Adapters cannot be folded into the base's own integers",
            where=f"merge --quantize {AS_STORED}",
            next_step="use dynamic, which keeps the integers and adds adapters beside them; or --quantize int4, which "
            "folds into floats and rounds the sums",
        )


def _refuse_padding(found: str) -> None:
    raise UsageProblem(
        "--pad-token-id is for classifiers on decoders, which read a text at its last token",
        found=found,
        next_step="leave it out",
    )


def _remarks_on_training(folders: Sequence[AdapterFolder], checkpoint: Checkpoint) -> tuple[str, ...]:
    """A word on each adapter that was trained on a quantized base, where this one is not."""
    if checkpoint.quantization is not None:
        return ()
    trained = {folder.name: quantized_training(folder) for folder in folders}
    return tuple(remark_on_training(name, how) for name, how in trained.items() if how is not None)


def opened_folders(request: Request) -> tuple[AdapterFolder, ...]:
    """The headers of the adapters that were asked for, in order.

    Raises:
        LoraExportError: See `peft_folder` and `open_adapter`.
    """
    folders = tuple(_opened(request, given, name) for given, name in request.adapters)
    if request.residual_base:
        folders = tuple(replace(folder, config=folder.config | PLAIN_START) for folder in folders)
    return folders


def _opened(request: Request, given: str, name: str | None) -> AdapterFolder:
    """An adapter's folder; of a merge, a name that the user has not given is made usable, as no host asks for it."""
    path = peft_folder(given, request.base, request.task)
    return open_adapter(path, given, name or (usable_name(path) if request.mode == "merge" else None))


def _given_graph(request: Request, task: Task) -> GivenGraph | None:
    if request.graph is None:
        return None
    return locate_graph(request.graph, task, dtype=request.dtype, is_quantized=request.quantization is not None)


def _dtype_of(request: Request, checkpoint: Checkpoint) -> tuple[str, tuple[str, ...]]:
    """The dtype to export in, and what to say of it: ONNX Runtime's CPU provider has no kernels for bfloat16.

    Raises:
        InputRefused: bfloat16 was asked for and the graph is for the CPU.
    """
    dtype = request.dtype or checkpoint.dtype
    if dtype != "bfloat16" or request.provider != "cpu":
        return dtype, ()
    if request.dtype is None:
        said = "the base is stored in bfloat16, which ONNX Runtime's CPU provider does not run: exporting in float32"
        return "float32", (f"{said} (--dtype float16 halves it; --provider cuda keeps bfloat16)",)
    raise InputRefused(
        "ONNX Runtime's CPU provider has no kernels for bfloat16, so nothing could run the export",
        where="--dtype bfloat16 with --provider cpu",
        next_step="export with --dtype float32 or float16, or for --provider cuda",
    )


def _refuse_equal_names(folders: Sequence[AdapterFolder]) -> None:
    names = [folder.name for folder in folders]
    if len(set(names)) != len(names):
        raise UsageProblem(
            "Two adapters have the same name", found=", ".join(names), next_step="name each with --name, in order"
        )


def _refuse_activated(folders: Sequence[AdapterFolder], task: Task) -> None:
    activated = [folder.name for folder in folders if folder.config.get("alora_invocation_tokens")]
    if activated and task is not Task.TEXT_GENERATION:
        raise InputRefused(
            "An activated LoRA is for decoders: PEFT looks for its invocation in a prompt",
            where=f"adapter_config.json of {', '.join(activated)}: alora_invocation_tokens",
            found=f"task {task}",
            next_step="export it as text-generation (--task)",
        )


def local_path(given: str) -> str:
    """A path as it is recorded in a manifest: absolute if it is a folder here, so that `check` finds it."""
    path = expanded(given)
    return str(path.resolve()) if path.exists() else given
