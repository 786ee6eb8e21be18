"""A decoder's step, 1.24 B Llama shape in float16: base, merged, dynamic, with and without a CUDA graph.

The graph of ONNX Runtime GenAI's model builder runs beside them, and PyTorch.
"""

from __future__ import annotations

from gpu.bundle import restore
from gpu.models import LLAMA
from gpu.peers import builder_run
from gpu.stage import Stage, torch_lora_llama
from gpu.timing import Candidate, candidate_runs, race, ratio_lines

RANK = 16
# (rows, new tokens, past).
SHAPES = ((1, 1, 512), (8, 1, 512), (32, 1, 512), (1, 512, 0), (8, 1, 2048))


def run(stage: Stage) -> dict:
    """Time every variant at each shape."""
    found: dict = {"races": []}
    named = {name: f"llama-{name}-float16" for name in ("base", "merged", "all")}
    named |= {"base, int4": "llama-base-int4", "all, int4": "llama-all-int4"}
    folders = {name: restore(stage.bundle, export, stage.work) for name, export in named.items()}
    sessions: dict = {}
    for batch, sequence, past in [(1, 1, 8), (2, 1, 8)] if stage.small else SHAPES:
        candidates = [
            Candidate("base", folders["base"]),
            Candidate("base again", folders["base"]),
            Candidate("merged", folders["merged"]),
            Candidate("no adapter", folders["all"], 1, 0),
            Candidate("one adapter", folders["all"], 1, RANK),
        ]
        if batch > 1:
            candidates.append(Candidate("another in each row", folders["all"], batch, RANK))
        is_step = sequence == 1
        if is_step:
            candidates.append(Candidate("base, int4", folders["base, int4"]))
            candidates.append(Candidate("one adapter, int4", folders["all, int4"], 1, RANK))
            candidates.append(Candidate("base, CUDA graph", folders["base"], cuda_graph=True))
            candidates.append(Candidate("one adapter, CUDA graph", folders["all"], 1, RANK, cuda_graph=True))
        shape = (batch, sequence, past)
        vocabulary = 512 if stage.small else LLAMA.vocab
        runs, failed = candidate_runs(candidates, stage.provider, shape, vocabulary, sessions)
        for capture in (False, True) if is_step else (False,):
            runs |= builder_run(stage, "llama-builder", shape, vocabulary, sessions, failed, cuda_graph=capture)
        if stage.torch_device and batch == 1:
            runs |= torch_lora_llama(stage, batch, sequence, past)
        references = ("base", "base, CUDA graph", "builder, shared cache")
        pairs = [(name, reference) for reference in references for name in runs if name != reference]
        pairs.append(("one adapter, int4", "base, int4"))
        result = race(runs, pairs, stage.blocks)
        result |= {"rows": batch, "new": sequence, "past": past, "failed": failed}
        found["races"].append(result)
        stage.say(f"{batch} rows, {sequence} new, past {past}", ratio_lines(result), failed)
        stage.save(found)
        del runs
        for key in [key for key in sessions if key[1] is not None]:
            del sessions[key]
    return found
