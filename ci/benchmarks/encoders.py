"""Encoders to time beside ONNX Runtime's own optimizer: their checkpoints, our exports, and the optimizer's graphs.

MiniLM has real weights. The others are random, at the widths of BERT-base, DistilBERT and ViT-base, four layers deep:
all layers of one are alike, so more of them change no ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from gpu.peers import write_optimized
from gpu.stage import Run
from gpu.timing import Device
from random_models import write_adapter

from lora_export.artifact import read_manifest
from lora_export.bench.workloads import random_inputs
from lora_export.export.plan import Request
from lora_export.pipeline import ExportOptions, export

RANK = 8
_BASE = {"num_hidden_layers": 4}
_TOKENS = ((1, 32), (4, 128), (16, 64), (1, 256))


@dataclass(frozen=True)
class Encoder:
    """A model to time.

    Attributes:
        config: The Transformers config class, with its `fields`; None for a checkpoint that is there.
        task: `--task`, and the model's output that is timed by `output`.
        optimizer: The optimizer's name for such models.
        values: The last parts of the names of queries' and values' projections.
        shapes: Rows and tokens; of images, rows and 0.
    """

    name: str
    config: str | None
    fields: dict
    auto: str
    task: str
    optimizer: str
    values: tuple[str, str]
    shapes: tuple[tuple[int, int], ...] = _TOKENS


ENCODERS = (
    Encoder("MiniLM", None, {}, "AutoModel", "feature-extraction", "bert", ("query", "value")),
    Encoder("BERT-base", "BertConfig", _BASE, "AutoModel", "feature-extraction", "bert", ("query", "value")),
    Encoder("DistilBERT", "DistilBertConfig", {"n_layers": 4}, "AutoModel", "feature-extraction", "bert",
            ("q_lin", "v_lin")),
    Encoder("ViT-base", "ViTConfig", _BASE | {"num_labels": 1000}, "AutoModelForImageClassification",
            "image-classification", "vit", ("q_proj", "v_proj"), ((1, 0), (4, 0))),
)  # fmt: skip


def checkpoint(encoder: Encoder, minilm: Path, work: Path) -> Path:
    import torch
    import transformers

    folder = work / encoder.name
    if encoder.config is None:
        return minilm
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        config = getattr(transformers, encoder.config)(**encoder.fields)
        getattr(transformers, encoder.auto).from_config(config).save_pretrained(folder)
    return folder


def exports(encoder: Encoder, base: Path, work: Path) -> dict[str, Path]:
    """The folders of exports: the base alone as `base`, dynamic with pairs on all linear modules as `all`, and on
    queries and values as `qv`."""
    import torch
    import transformers

    model = getattr(transformers, encoder.auto).from_pretrained(base)
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "classifier"
    }
    adapters = {
        "all": linears,
        "qv": {name: size for name, size in linears.items() if name.rsplit(".", 1)[-1] in encoder.values},
    }
    folders = {"base": _exported(encoder, base, (), work / f"{encoder.name}-base")}
    for name, modules in adapters.items():
        folder = work / f"{encoder.name}-adapter-{name}"
        adapter = write_adapter(folder, modules, rank=RANK, base=base, task_type="FEATURE_EXTRACTION", seed=1)
        folders[name] = _exported(encoder, base, (adapter,), work / f"{encoder.name}-{name}")
    return folders


def _exported(encoder: Encoder, base: Path, adapters: Sequence[Path], out: Path) -> Path:
    if not (out / "lora_export.json").exists():
        mode = "dynamic" if adapters else "merge"
        named = tuple((str(path), None) for path in adapters)
        export(Request(str(base), named, mode, encoder.task, "float32", "cpu"), ExportOptions(out, overwrite=True))
    return out


def optimized(encoder: Encoder, base: Path, folder: Path, out: Path) -> Path:
    """The optimizer's graph of the checkpoint, with the inputs and outputs of our export in `folder`."""
    import torch
    import transformers

    graph = out / "model.onnx"
    if not graph.exists():
        config = transformers.AutoConfig.from_pretrained(base)
        config._attn_implementation = "eager"
        model = getattr(transformers, encoder.auto).from_pretrained(base, config=config).eval()
        contract = read_manifest(folder).contract
        arrays = random_inputs(contract, 1000, (2, 8, 0))
        inputs = {spec.name: torch.tensor(arrays[spec.name]) for spec in contract.inputs}
        axes = {
            name: {0: "batch_size"} | ({1: "sequence_length"} if x.dim() == 2 else {}) for name, x in inputs.items()
        }
        axes |= {spec.name: {0: "batch_size"} for spec in contract.outputs}
        write_optimized(model, inputs, axes, out, kind=encoder.optimizer)
    return graph


def peer_run(session: ort.InferenceSession, folder: Path, shape: tuple[int, int]) -> Run:
    """A bound run of the optimizer's graph on the inputs that our export in `folder` is given."""
    contract, device = read_manifest(folder).contract, Device("cpu")
    read = {value.name for value in session.get_inputs()}
    arrays = random_inputs(contract, 1000, (*shape, 0))
    arrays = {name: array for name, array in arrays.items() if name in read}
    names = [value.name for value in session.get_outputs()]
    found = dict(zip(names, session.run(names, arrays), strict=True))
    shapes = {name: (array.shape, np.float32) for name, array in found.items()}
    return device.bound_run(session, device.values(arrays), shapes)
