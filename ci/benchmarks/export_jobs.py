"""The jobs that `export.py` measures, each to be run in an interpreter of its own.

    python export_jobs.py ours  BASE ADAPTER OUT      the export of this package
    python export_jobs.py peer  BASE ADAPTER OUT      PEFT, then Transformers' ONNX exporter
    python export_jobs.py agree BASE OURS PEER        compare their logits on ONNX Runtime's CPU provider

The last line that a job prints is a JSON object: the seconds of its stages, or what it found.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

# Sizes of the peer's trace and of the comparison: sample rows, new tokens, cached tokens.
_BATCH, _SEQUENCE, _PAST = 2, 7, 5


class _Stages:
    """Seconds from one stage to the next."""

    def __init__(self) -> None:
        self._last, self.seconds = time.perf_counter(), {}

    def done(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now


def ours(base: str, adapter: str, out: str) -> dict:
    """Merge `adapter` and export with this package, fused for CUDA."""
    stages = _Stages()
    from lora_export.cli.main import collect_rarely

    collect_rarely()
    from lora_export.export.plan import Request
    from lora_export.pipeline import ExportOptions, export

    stages.done("import")
    running: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        if not running or running[-1] != stage:
            stages.done(running[-1] if running else "plan")
            running.append(stage)

    export(Request(base, ((adapter, None),), "merge", provider="cuda"), ExportOptions(Path(out)), progress=progress)
    stages.done(running[-1])
    return stages.seconds


def peer(base: str, adapter: str, out: str) -> dict:
    """The same job with PEFT and Transformers alone: load, merge, export fused for CUDA, save with external data."""
    stages = _Stages()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    stages.done("import")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True)
    stages.done("load")
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload().eval().requires_grad_(False)
    stages.done("merge")
    inputs, shapes = _peer_inputs(model)
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, ort_fusions="cuda")
    with torch.no_grad():
        exported = OnnxExporter().export(model, inputs, config)
    stages.done("export")
    Path(out).mkdir(parents=True)
    OnnxExporter.save_program(exported.program, Path(out) / "model.onnx")
    stages.done("save")
    return stages.seconds


def _peer_inputs(model) -> tuple[dict, dict]:
    """Sample inputs with a filled cache, and the axes that stay dynamic: what a graph for generation needs."""
    import torch
    from transformers import DynamicCache

    config = model.config
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        states = torch.zeros(_BATCH, config.num_key_value_heads, _PAST, config.head_dim, dtype=model.dtype)
        cache.update(states, states.clone(), layer)
    inputs = {
        "input_ids": torch.ones(_BATCH, _SEQUENCE, dtype=torch.long),
        "attention_mask": torch.ones(_BATCH, _PAST + _SEQUENCE, dtype=torch.long),
        "position_ids": torch.arange(_PAST, _PAST + _SEQUENCE).expand(_BATCH, -1).clone(),
        "past_key_values": cache,
        "use_cache": True,
    }
    auto = torch.export.Dim.AUTO
    shapes = {name: {0: auto, 1: auto} for name in ("input_ids", "attention_mask", "position_ids")}
    shapes["past_key_values"] = [{0: auto, 2: auto}] * (2 * config.num_hidden_layers)
    return inputs, shapes


def agree(base: str, ours: str, peer: str) -> dict:
    """Largest difference of the two graphs' logits on random tokens, relative to the largest logit (at least 1)."""
    import numpy as np

    vocabulary = json.loads((Path(base) / "config.json").read_text())["vocab_size"]
    tokens = np.random.default_rng(0).integers(0, vocabulary, (_BATCH, _SEQUENCE))
    mine, theirs = _logits(ours, tokens), _logits(peer, tokens)
    scale = max(1.0, float(np.abs(theirs).max()))
    return {
        "relative_error": float(np.abs(mine - theirs).max()) / scale,
        "top1_agreement": float((mine.argmax(-1) == theirs.argmax(-1)).mean()),
        "largest_logit": scale,
    }


def _logits(folder: str, tokens):
    """Float32 logits of the graph in `folder` for `tokens`, `[batch, sequence]`, with an empty cache."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(Path(folder) / "model.onnx"), options, providers=["CPUExecutionProvider"])
    batch, sequence = tokens.shape
    feeds = {}
    for value in session.get_inputs():
        if "input_ids" in value.name:
            feeds[value.name] = tokens
        elif "attention_mask" in value.name:
            feeds[value.name] = np.ones((batch, sequence), np.int64)
        elif "position_ids" in value.name:
            feeds[value.name] = np.tile(np.arange(sequence), (batch, 1))
        else:  # a key or a value of the cache
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            feeds[value.name] = np.zeros((batch, value.shape[1], 0, value.shape[3]), dtype)
    outputs = [value.name for value in session.get_outputs()]
    return session.run([next(name for name in outputs if "logits" in name)], feeds)[0].astype(np.float32)


if __name__ == "__main__":
    job = {"ours": ours, "peer": peer, "agree": agree}[sys.argv[1]]
    print()
    print(json.dumps(job(*sys.argv[2:])))
