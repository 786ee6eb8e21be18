"""Graphs that others build for the same models: ONNX Runtime GenAI's model builder, ONNX Runtime's own optimizer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from gpu.bundle import restore
from gpu.models import LLAMA, LLAMA_SMALL
from gpu.stage import Run, Stage
from gpu.timing import Device, bound, noted
from lora_export.runtime.session import open_session

if TYPE_CHECKING:
    import torch

# Positions that a shared cache holds.
_SHARED_LENGTH = 4096
_ELEMENTS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def builder_run(
    stage: Stage,
    name: str,
    shape: tuple[int, int, int],
    vocabulary: int,
    sessions: dict,
    failed: dict[str, str],
    *,
    cuda_graph: bool = False,
) -> dict[str, Run]:
    """A run of the builder's graph, past and present in one buffer, as it is or in a CUDA graph; nothing where the
    bundle has no such graph."""
    if not (stage.bundle / "exports" / name).exists():
        return {}
    label = f"builder, shared cache{', CUDA graph' if cuda_graph else ''}"
    with noted(failed, label):
        folder = restore(stage.bundle, name, stage.work)
        key = (folder, (label, shape) if cuda_graph else None)
        if key not in sessions:
            graph = folder / "model.onnx"
            sessions[key] = open_session(graph, stage.provider, stop_spinning=True, cuda_graph=cuda_graph)
        session = sessions[key]
        head_size = (LLAMA_SMALL if stage.small else LLAMA).head_dim
        device = Device(stage.provider)
        run = decoder_run(session, device, shape, vocabulary, head_size=head_size, slots=_SHARED_LENGTH)
        run()
        return {label: run}
    return {}


def decoder_run(
    session: ort.InferenceSession,
    device: Device,
    shape: tuple[int, int, int],
    vocabulary: int,
    *,
    head_size: int,
    slots: int | None = None,
    adapters: Mapping[str, np.ndarray] | None = None,
) -> Run:
    """A bound run of any decoder whose inputs have Optimum's names.

    Args:
        shape: Rows, new tokens, past.
        slots: Of one buffer for past and present; None for a past of its own, which the graph copies.
        adapters: What else it is fed.
    """
    batch, sequence, past = shape
    rng = np.random.default_rng(0)
    arrays = {
        "input_ids": rng.integers(0, vocabulary, (batch, sequence)),
        "attention_mask": np.ones((batch, past + sequence), np.int64),
        "position_ids": np.tile(np.arange(past, past + sequence), (batch, 1)),
    }
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            size = (batch, value.shape[1], past if slots is None else slots, head_size)
            arrays[value.name] = rng.standard_normal(size, np.float32).astype(_ELEMENTS[value.type])
    own = {value.name: arrays[value.name] for value in session.get_inputs()}
    inputs = device.values(own | dict(adapters or {}))
    outputs = {}
    for output in session.get_outputs():
        cached = output.name.startswith("present.")
        if cached and slots is not None:
            outputs[output.name] = inputs[output.name.replace("present", "past_key_values")]
        else:
            size = (batch, sequence, vocabulary)
            if cached:
                size = (batch, output.shape[1], past + sequence, head_size)
            element = _ELEMENTS[output.type]
            outputs[output.name] = ort.OrtValue.ortvalue_from_shape_and_type(size, element, device.provider, 0)
    return bound(session, inputs, outputs)


def builder_command(
    base: Path, tokenizer: Path, out: Path, builder: Path, dtype: str = "float16", provider: str = "cuda"
) -> list[str]:
    """The command that runs GenAI's model builder on the checkpoint `base`.

    Args:
        tokenizer: A folder with any tokenizer, which is copied to `base`: the builder wants one.
        builder: The folder of its builder.py.
    """
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, base)
    precision = {"float16": "fp16", "float32": "fp32", "bfloat16": "bf16"}[dtype]
    command = [sys.executable, str(builder / "builder.py"), "-m", str(base), "-o", str(out), "-p", precision]
    return [*command, "-e", provider, "-c", str(out.parent / "builder-cache")]


def write_builder_graph(
    base: Path, tokenizer: Path, out: Path, builder: Path, dtype: str = "float16", provider: str = "cuda"
) -> None:
    """Run GenAI's model builder, as `builder_command` says."""
    command = builder_command(base, tokenizer, out, builder, dtype, provider)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def encoder_run(session: ort.InferenceSession, provider: str, batch: int, sequence: int) -> Run:
    """A bound run of the optimizer's MiniLM."""
    rng, device = np.random.default_rng(0), Device(provider)
    arrays = {
        value.name: rng.integers(0, 30522, (batch, sequence)) if value.name == "input_ids" else np.full(
            (batch, sequence), int("mask" in value.name), np.int64
        )
        for value in session.get_inputs()
    }  # fmt: skip
    output = session.get_outputs()[0]
    feeds = device.values({name: array.astype(np.int64) for name, array in arrays.items()})
    return device.bound_run(session, feeds, {output.name: ((batch, sequence, 384), _ELEMENTS[output.type])})


def write_optimized_bert(base: Path, out: Path, dtype: str) -> None:
    """The checkpoint's BERT encoder through PyTorch's exporter and ONNX Runtime's optimizer."""
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(base)
    config._attn_implementation = "eager"
    model = AutoModel.from_pretrained(base, config=config, add_pooling_layer=False, dtype=torch.float32).eval()
    ids = torch.ones(2, 8, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids * 0}
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in [*inputs, "last_hidden_state"]}
    write_optimized(model, inputs, axes, out, kind="bert", dtype=dtype, use_gpu=True)


def write_optimized(
    model: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    axes: Mapping[str, Mapping[int, str]],
    out: Path,
    *,
    kind: str,
    dtype: str = "float32",
    use_gpu: bool = False,
) -> None:
    """`model`, of Transformers, through PyTorch's older exporter and ONNX Runtime's optimizer, into folder `out`.

    Args:
        inputs: Samples of its inputs by name.
        axes: The symbolic axes of inputs and outputs; the outputs are those that are no input, in the model's order.
        kind: The optimizer's name for such models.
    """
    import torch
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    outputs = [name for name in axes if name not in inputs]

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found = self.model(**dict(zip(inputs, given, strict=True))).to_tuple()
            return found[: len(outputs)]

    out.mkdir(parents=True, exist_ok=True)
    raw = out / "raw.onnx"
    torch.onnx.export(
        Wrapped(), tuple(inputs.values()), str(raw), input_names=list(inputs), output_names=outputs,
        dynamic_axes={name: dict(found) for name, found in axes.items()}, opset_version=17, dynamo=False,
    )  # fmt: skip
    optimized = optimize_model(
        str(raw),
        kind,
        num_heads=model.config.num_attention_heads,
        hidden_size=model.config.hidden_size,
        optimization_options=FusionOptions(kind),
        opt_level=0,
        use_gpu=use_gpu,
    )
    if dtype == "float16":
        optimized.convert_float_to_float16()
    optimized.save_model_to_file(str(out / "model.onnx"), use_external_data_format=True)
    raw.unlink()
