"""An encoder beside the graph that ONNX Runtime's own optimizer makes for GPUs: MiniLM's shape."""

from __future__ import annotations

from gpu.bundle import restore
from gpu.peers import encoder_run
from gpu.stage import Stage
from gpu.timing import Candidate, candidate_runs, race, ratio_lines
from lora_export.runtime.session import open_session

# (rows, tokens).
SHAPES = ((1, 32), (4, 128), (32, 128), (16, 512))


def run(stage: Stage) -> dict:
    """Time our encoder graphs and the optimizer's at each shape and dtype."""
    found: dict = {"races": []}
    for dtype in ("float16", "float32"):
        names = ("base", "dynamic")
        folders = {name: restore(stage.bundle, f"encoder-{name}-{dtype}", stage.work) for name in names}
        peer = restore(stage.bundle, f"minilm-optimizer-{dtype}", stage.work)
        session = open_session(peer / "model.onnx", stage.provider, stop_spinning=True)
        sessions: dict = {}
        for batch, sequence in SHAPES[:1] if stage.small else SHAPES:
            candidates = [
                Candidate("base", folders["base"]),
                Candidate("no adapter", folders["dynamic"], 1, 0),
                Candidate("one adapter", folders["dynamic"], 1, 8),
                Candidate("base, CUDA graph", folders["base"], cuda_graph=True),
                Candidate("one adapter, CUDA graph", folders["dynamic"], 1, 8, cuda_graph=True),
            ]
            if batch > 1:
                candidates.append(Candidate("another in each row", folders["dynamic"], batch, 8))
            runs, failed = candidate_runs(candidates, stage.provider, (batch, sequence, 0), 30522, sessions)
            runs["optimizer"] = encoder_run(session, stage.provider, batch, sequence)
            pairs = [(name, "optimizer") for name in runs if name != "optimizer"] + [("one adapter", "base")]
            pairs.append(("one adapter, CUDA graph", "base, CUDA graph"))
            result = race(runs, pairs, stage.blocks)
            result |= {"dtype": dtype, "batch": batch, "sequence": sequence, "failed": failed}
            found["races"].append(result)
            stage.say(f"{dtype} {batch} x {sequence}", ratio_lines(result), failed)
            stage.save(found)
            for key in [key for key in sessions if key[1] is not None]:
                del sessions[key]
    return found
