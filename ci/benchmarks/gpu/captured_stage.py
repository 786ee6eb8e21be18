"""`AdapterSession` with a CUDA graph beside one without: the same outputs before and after swaps, and what a run takes.

An encoder at several shapes, and steps of the 1.24 B Llama shape on a cache. Times are those of `run`, host's work and
copies of inputs and outputs included. Rehearsed on a CPU, both sessions are without.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np

from gpu.bundle import restore
from gpu.provider_stage import median_us
from gpu.stage import Stage
from gpu.timing import adapter_arrays, noted
from lora_export.bench.workloads import random_inputs
from lora_export.runtime.adapter_session import AdapterSession

_SHAPES = ((1, 32), (4, 128), (32, 128))
_ROWS, _PROMPT, _STEPS = (1, 8), 512, 64
# Token ids below it, which every vocabulary here has.
_MOST_ID = 200
_RANKS = {"encoder-dynamic-float16": 8, "llama-all-float16": 16}


def run(stage: Stage) -> dict:
    """Outputs' differences and times, by export and shape."""
    found: dict = {"encoder": {}, "steps": {}, "failed": {}}
    with noted(found["failed"], "encoder"):
        plain, captured = _sessions(stage, "encoder-dynamic-float16")
        for shape in ((2, 6),) if stage.small else _SHAPES:
            name = "{} × {}".format(*shape)
            found["encoder"][name] = _encoder(plain, captured, shape, 3 if stage.small else 200)
            stage.say(f"encoder, {name}", [f"  {key}: {value:.4g}" for key, value in found["encoder"][name].items()])
            stage.save(found)
    with noted(found["failed"], "steps"):
        plain, captured = _sessions(stage, "llama-all-float16")
        for rows in _ROWS:
            n_prompt, n_steps = (5, 6) if stage.small else (_PROMPT, _STEPS)
            result = _steps(plain, captured, rows, n_prompt=n_prompt, n_steps=n_steps)
            found["steps"][f"{rows} rows on {n_prompt}"] = result
            stage.say(f"steps, {rows} rows", [f"  {key}: {value:.4g}" for key, value in result.items()])
            stage.save(found)
    stage.say("failed", [], found["failed"])
    return found


def _sessions(stage: Stage, name: str) -> tuple[AdapterSession, AdapterSession]:
    """Without and with a CUDA graph, both with the adapters "a" and "b"."""
    folder = restore(stage.bundle, name, stage.work)
    sessions = [AdapterSession(folder, stage.provider, cuda_graph=each and stage.provider == "cuda") for each in (0, 1)]
    for session in sessions:
        for seed, adapter in enumerate("ab"):
            session.hold(adapter, adapter_arrays(session.contract, 1, _RANKS[name], seed))
    return sessions[0], sessions[1]


def _mixes(rows: int) -> list:
    """Adapters of runs one after another: swaps, a row's own, none."""
    return ["a", "b", ["a", "b", None, "b"][:rows] * -(-rows // 4), None, "b", "a"]


def _encoder(plain: AdapterSession, captured: AdapterSession, shape: tuple[int, int], n: int) -> dict[str, float]:
    inputs = random_inputs(plain.contract, _MOST_ID, (*shape, 0))
    outputs = [plain.contract.outputs[0].name]

    def output(session: AdapterSession, mix) -> np.ndarray:
        return session.run(inputs, mix, outputs)[outputs[0]].astype(np.float32)

    mixes = [mix[: shape[0]] if isinstance(mix, list) else mix for mix in _mixes(shape[0])] * 2
    pairs = [(output(plain, mix), output(captured, mix)) for mix in mixes]
    found = {
        "largest difference": max(float(np.abs(a - b).max()) for a, b in pairs),
        "between the adapters": float(np.abs(pairs[0][0] - pairs[1][0]).max()),
    }
    turn = iter(range(10**9))
    for name, session in (("plain", plain), ("CUDA graph", captured)):
        found[f"{name}, one adapter, µs"] = median_us(lambda s=session: output(s, "a"), n)
        found[f"{name}, another adapter at every run, µs"] = median_us(
            lambda s=session: output(s, "ab"[next(turn) % 2]), n
        )
        if shape[0] > 1:
            rows = ["a", "b"] * (shape[0] // 2)
            found[f"{name}, an adapter for each row, µs"] = median_us(lambda s=session, r=rows: output(s, r), n)
    return found


def _steps(
    plain: AdapterSession, captured: AdapterSession, rows: int, *, n_prompt: int, n_steps: int
) -> dict[str, float]:
    """Greedy steps of both on the tokens that the plain session chooses, the adapter swapped half way."""
    found, logits, chosen = {}, {}, []
    first = np.random.default_rng(0).integers(5, _MOST_ID, (rows, n_prompt))
    for name, session in (("plain", plain), ("CUDA graph", captured)):
        for second_use in (False, True):  # of the same buffer: a capture may be used again
            cache = session.cache(rows, n_prompt + n_steps + 1)
            ids, seconds, found_logits = first, [], []
            for step in range(n_steps):
                mask = np.ones((rows, cache.length + ids.shape[1]), np.int64)
                adapter = "a" if step < n_steps // 2 else "b"
                start = time.perf_counter()
                step_logits = _run(session, ids, mask, adapter, cache)
                seconds.append(time.perf_counter() - start)
                found_logits.append(step_logits)
                if name == "plain" and not second_use:
                    chosen.append(step_logits.argmax(-1)[:, None])
                ids = chosen[step]
            del cache
        logits[name] = np.stack(found_logits)
        found[f"{name}, first step, ms"] = seconds[1] * 1e3
        found[f"{name}, a step, ms"] = statistics.median(seconds[3:]) * 1e3
    found["largest difference"] = float(np.abs(logits["plain"] - logits["CUDA graph"]).max())
    found["largest logit"] = float(np.abs(logits["plain"]).max())
    same = logits["plain"].argmax(-1) == logits["CUDA graph"].argmax(-1)
    found["same tokens, share"] = float(same.mean())
    return found


def _run(session: AdapterSession, ids: np.ndarray, mask: np.ndarray, adapters: Sequence | str, cache) -> np.ndarray:
    """The last token's logits, `[rows, vocabulary]` in float32."""
    inputs = {"input_ids": ids, "attention_mask": mask, "num_logits_to_keep": np.array(1)}
    return session.run(inputs, adapters, ["logits"], cache=cache)["logits"][:, -1].astype(np.float32)
