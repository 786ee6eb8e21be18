"""The LoRA paper's table 1 on ONNX Runtime: GPT-2 medium's shape, one forward pass with its language-model head.

Base, merged and dynamic graphs, one adapter for the batch or another in each row, r = 8 on the attention's projection
(as the paper adapts) and on all linears; the paper's Adapter-L and Adapter-H; PyTorch with PEFT beside them, merged and
not. With a CUDA graph at the two smaller shapes.
"""

from __future__ import annotations

from pathlib import Path

from gpu.adapter_layers import PARAMETERS, write_adapter_layers
from gpu.bundle import restore
from gpu.models import GPT2_MEDIUM
from gpu.stage import Stage, torch_lora_gpt2
from gpu.timing import Candidate, candidate_runs, race, ratio_lines

# (batch, tokens): milliseconds of the base, Adapter-L and Adapter-H in the paper (arXiv 2106.09685, table 1).
PAPER = {(32, 512): (1449.4, 1482.0, 1492.2), (16, 256): (338.0, 354.8, 366.3), (1, 128): (19.8, 23.9, 25.8)}
RANK = 8
# Largest ratio to the base: (one adapter, another in each row, one adapter with a CUDA graph).
TARGETS = {(32, 512): (1.02, 1.05, None), (16, 256): (1.02, None, None), (1, 128): (1.10, None, 1.05)}


def run(stage: Stage) -> dict:
    """Time every variant at the paper's three shapes, in float16 and float32."""
    found: dict = {"paper_ms": {f"{b} x {n}": ms for (b, n), ms in PAPER.items()}, "races": []}
    shapes = [(2, 16), (1, 8)] if stage.small else list(PAPER)
    for dtype in ("float16", "float32"):
        sessions: dict = {}
        for batch, sequence in reversed(shapes):
            candidates = _candidates(stage, dtype, (batch, sequence), capture=batch < 32)
            shape = (batch, sequence, 0)
            vocabulary = 512 if stage.small else GPT2_MEDIUM.vocab
            runs, failed = candidate_runs(candidates, stage.provider, shape, vocabulary, sessions)
            if stage.torch_device:
                runs |= torch_lora_gpt2(stage, dtype, batch, sequence)
            result = race(runs, _pairs(list(runs)), stage.blocks)
            result |= {"dtype": dtype, "batch": batch, "sequence": sequence, "failed": failed}
            found["races"].append(result)
            stage.say(f"{dtype} {batch} x {sequence}", ratio_lines(result), failed)
            stage.save(found)
            del runs
    return found


def _candidates(stage: Stage, dtype: str, shape: tuple[int, int], *, capture: bool) -> list[Candidate]:
    batch = shape[0]
    names = ("base", "merged", "attention", "all")
    folders = {name: restore(stage.bundle, f"gpt2-{name}-{dtype}", stage.work) for name in names}
    found = [
        Candidate("base", folders["base"]),
        Candidate("base again", folders["base"]),
        Candidate("merged", folders["merged"]),
    ]
    for name in ("attention", "all"):
        found.append(Candidate(f"{name}, no adapter", folders[name], 1, 0))
        found.append(Candidate(f"{name}, one adapter", folders[name], 1, RANK))
        if batch > 1:
            found.append(Candidate(f"{name}, another in each row", folders[name], batch, RANK))
    layers = {kind: _adapter_layers(stage, folders["base"], kind, shape) for kind in ("L", "H")}
    found += [Candidate(f"Adapter-{kind}", folder) for kind, folder in layers.items()]
    if capture:
        found.append(Candidate("base, CUDA graph", folders["base"], cuda_graph=True))
        for name in ("attention", "all"):
            found.append(Candidate(f"{name}, one adapter, CUDA graph", folders[name], 1, RANK, cuda_graph=True))
        found.append(Candidate("Adapter-L, CUDA graph", layers["L"], cuda_graph=True))
    return found


def _adapter_layers(stage: Stage, base: Path, kind: str, shape: tuple[int, int]) -> Path:
    n_parameters = 1000 if stage.small else PARAMETERS[shape]
    return write_adapter_layers(base, stage.work / f"{base.name}-adapter-{kind}-{n_parameters}", kind, n_parameters)


def _pairs(names: list[str]) -> list[tuple[str, str]]:
    captured = [name for name in names if name.endswith(", CUDA graph") and name != "base, CUDA graph"]
    pairs = [(name, "base") for name in names if name != "base"]
    return pairs + [(name, "base, CUDA graph") for name in ("base", *captured)]
