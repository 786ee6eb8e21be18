"""Graphs that others build for the same models: ONNX Runtime GenAI's model builder, ONNX Runtime's own optimizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from gpu.bundle import restore
from gpu.models import LLAMA, LLAMA_SMALL
from gpu.stage import Run, Stage
from gpu.timing import Device, bound, noted
from lora_export.runtime.session import open_session

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
    shared: bool,
) -> dict[str, Run]:
    """A run of the builder's graph, with a cache of its own for past and present or one that they share; nothing where
    the bundle has no such graph."""
    if not (stage.bundle / "exports" / name).exists():
        return {}
    label = f"builder, {'shared cache' if shared else 'separate cache'}"
    batch, sequence, past = shape
    head_size = (LLAMA_SMALL if stage.small else LLAMA).head_dim
    with noted(failed, label):
        folder = restore(stage.bundle, name, stage.work)
        if (folder, None) not in sessions:
            sessions[folder, None] = open_session(folder / "model.onnx", stage.provider, stop_spinning=True)
        session = sessions[folder, None]
        run = _bound(session, Device(stage.provider), batch, sequence, past, vocabulary, head_size, shared=shared)
        run()
        return {label: run}
    return {}


def _bound(
    session: ort.InferenceSession,
    device: Device,
    batch: int,
    sequence: int,
    past: int,
    vocabulary: int,
    head_size: int,
    *,
    shared: bool,
) -> Run:
    rng = np.random.default_rng(0)
    length = _SHARED_LENGTH if shared else past
    arrays = {
        "input_ids": rng.integers(0, vocabulary, (batch, sequence)),
        "attention_mask": np.ones((batch, past + sequence), np.int64),
        "position_ids": np.tile(np.arange(past, past + sequence), (batch, 1)),
    }
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            size = (batch, value.shape[1], length, head_size)
            arrays[value.name] = rng.standard_normal(size, np.float32).astype(_ELEMENTS[value.type])
    inputs = device.values({value.name: arrays[value.name] for value in session.get_inputs()})
    outputs = {}
    for output in session.get_outputs():
        cached = output.name.startswith("present.")
        if cached and shared:
            outputs[output.name] = inputs[output.name.replace("present", "past_key_values")]
        else:
            size = (batch, output.shape[1], past + sequence, head_size) if cached else (batch, sequence, vocabulary)
            element = _ELEMENTS[output.type]
            outputs[output.name] = ort.OrtValue.ortvalue_from_shape_and_type(size, element, device.provider, 0)
    return bound(session, inputs, outputs)


def write_builder_graph(base: Path, tokenizer: Path, out: Path, builder: Path, dtype: str = "float16") -> None:
    """Run GenAI's model builder for CUDA on the checkpoint `base`.

    Args:
        tokenizer: A folder with any tokenizer: the builder wants one.
        builder: The folder of its builder.py.
    """
    import shutil
    import subprocess
    import sys

    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, base)
    precision = {"float16": "fp16", "float32": "fp32", "bfloat16": "bf16"}[dtype]
    command = [sys.executable, str(builder / "builder.py"), "-m", str(base), "-o", str(out), "-p", precision]
    subprocess.run([*command, "-e", "cuda", "-c", str(out.parent / "cache")], check=True, stdout=subprocess.DEVNULL)


def write_optimized_bert(base: Path, out: Path, dtype: str) -> None:
    """The checkpoint's BERT encoder through PyTorch's exporter and ONNX Runtime's optimizer for GPUs."""
    import torch
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(base)
    config._attn_implementation = "eager"
    model = AutoModel.from_pretrained(base, config=config, add_pooling_layer=False, dtype=torch.float32).eval()
    out.mkdir(parents=True, exist_ok=True)
    ids = torch.ones(2, 8, dtype=torch.long)

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, token_type_ids):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)[0]

    names = ["input_ids", "attention_mask", "token_type_ids"]
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in [*names, "last_hidden_state"]}
    raw = out / "raw.onnx"
    torch.onnx.export(
        Encoder(), (ids, ids, ids * 0), str(raw), input_names=names, output_names=["last_hidden_state"],
        dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip
    optimized = optimize_model(
        str(raw),
        "bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        optimization_options=FusionOptions("bert"),
        opt_level=0,
        use_gpu=True,
    )
    if dtype == "float16":
        optimized.convert_float_to_float16()
    optimized.save_model_to_file(str(out / "model.onnx"), use_external_data_format=True)
    raw.unlink()
