"""Benchmark: one session with many adapters on the CPU: a decoder's step, other mixes, continuous batching.

    python ci/benchmarks/serving_session.py --work /tmp/serving  # writes results/serving-session-*.json

A random Llama shape (8 layers, 1024 wide, 16 query and 4 key heads) with 16 adapters whose ranks are 4, 8, 16 and 32 in
turn, on all linears. Every row of a batch of 16 has another of them.

queries    the step beside the base's with adapters of queries and values only (as in the LoRA paper), ranks 2 to 16.
decode     a step of 16 rows on 256 tokens each, as `AdapterSession.run` does it: with the adapters, without any, row by
           row, with another adapter in one row at every step, and in every row, each of these on a session of its own.
           Samples are taken in turn, forwards and backwards; ratios are of blocks.
peft       the step beside PEFT's own `adapter_names` batch in PyTorch.
compose    what putting a wholly new mix together takes, beside copying its bytes once into memory that is there.
batching   64 texts with prompts of 4 to 32 tokens and 4 to 128 new tokens (geometric lengths): `Scheduler` beside
           batches of 16, each of which runs until its longest text ends.
resident   the memory of 100 adapters, beside the bytes of their files.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from random_models import LlamaShape, write_adapter, write_llama
from readme_tables import write_into_readme
from results import RESULTS, Target, heading, host_kind, provenance, target_table, write_json

from lora_export.bench.intervals import median_interval, verdict
from lora_export.contract import LOGITS_TO_KEEP
from lora_export.export.plan import Request
from lora_export.pipeline import ExportOptions, export
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.generate import generate
from lora_export.runtime.scheduler import Scheduler

_SHAPE = LlamaShape(8, 1024, 2816, heads=16, kv_heads=4, head_dim=64, vocab=32000, dtype="float32")
_RANKS, _QUERY_RANKS = (4, 8, 16, 32), (2, 4, 8, 16)
_ROWS, _PAST = 16, 256
_N_TEXTS, _N_RESIDENT = 64, 100
_MOST_NEW, _MEAN_NEW = 128, 24
# PEFT's steps are long, and far from its target: a few blocks tell.
_PEFT_BLOCKS = 4
_BATCHING_BLOCKS = 2

Steps = Mapping[str, Callable[[], object]]


def prepare(work: Path) -> tuple[Path, tuple[Path, ...], dict[str, Path]]:
    """The base, its adapters of all linears, and the exports: the base alone, with these, and with those of queries and
    values. What is there is reused."""
    base = write_llama(work / "base", _SHAPE)
    linears = _SHAPE.linears()
    queries = {name: size for name, size in linears.items() if name.endswith(("q_proj", "v_proj"))}

    def write(name: str, modules: Mapping[str, tuple[int, int]], ranks: Sequence[int]) -> tuple[Path, ...]:
        options = {"base": base, "task_type": "CAUSAL_LM"}
        return tuple(
            write_adapter(work / f"{name}{i:02}", modules, rank=ranks[i % len(ranks)], seed=i, **options)
            for i in range(_ROWS)
        )

    adapters, of_queries = write("task", linears, _RANKS), write("query", queries, _QUERY_RANKS)
    folders = {}
    for name, mode, given in (
        ("alone", "merge", ()),
        ("served", "dynamic", adapters),
        ("queries", "dynamic", of_queries),
    ):
        folders[name] = work / name
        if not (folders[name] / "lora_export.json").exists():
            named = tuple((str(path), None) for path in given)
            request = Request(str(base), named, mode, "text-generation", "float32", "cpu")
            export(request, ExportOptions(folders[name], overwrite=True))
    return base, adapters, folders


def paired(steps: Steps, n_blocks: int) -> dict[str, list[float]]:
    """Seconds of each step, two a block: one on the way there, one on the way back."""
    for step in steps.values():
        step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(n_blocks):
        for name in (*steps, *reversed(steps)):
            start = time.perf_counter()
            steps[name]()
            taken[name].append(time.perf_counter() - start)
    return taken


def ratio(taken: Mapping[str, Sequence[float]], over: str, under: str) -> tuple[float, float, float]:
    """The median of the blocks' ratios, and its interval."""
    blocks = [(sum(taken[over][i : i + 2])) / (sum(taken[under][i : i + 2])) for i in range(0, len(taken[over]), 2)]
    low, high, _ = median_interval(blocks)
    return statistics.median(blocks), low, high


def decode_steps(session: AdapterSession, names: Sequence[str]) -> dict[str, Callable[[], object]]:
    """Steps of `_ROWS` rows, each on a cache of `_PAST` tokens."""
    ids, mask = np.full((_ROWS, 1), 9), np.ones((_ROWS, _PAST + 1), np.int64)
    last = {LOGITS_TO_KEEP: np.array(1)}
    cache = session.cache(_ROWS, _PAST + 1)
    turns, mixes = itertools.count(), itertools.count()

    def step(adapters: Sequence[str] | None, rows: slice = slice(None)) -> None:
        part = cache.part(rows.start or 0, len(ids[rows]), _PAST)
        session.run({"input_ids": ids[rows], "attention_mask": mask[rows], **last}, adapters, cache=part)

    def one_other() -> None:
        """The first row takes another adapter each time, one of the rank that it had."""
        other = names[(next(turns) % 3 + 1) * len(_RANKS)]
        step([other, *names[1:]])

    def all_other() -> None:
        turn = next(mixes) * len(_RANKS) % _ROWS
        step([*names[turn:], *names[:turn]])

    def row_by_row() -> None:
        for row, name in enumerate(names):
            step([name], slice(row, row + 1))

    return {
        "base": lambda: step(None),
        "mixed": lambda: step(names),
        "one row changes": one_other,
        "every row changes": all_other,
        "row by row": row_by_row,
    }


def peft_step(base: Path, adapters: Sequence[Path]) -> Callable[[], object]:
    """The same step in PyTorch, with PEFT's `adapter_names`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
    for index, folder in enumerate(adapters[1:], 1):
        model.load_adapter(folder, adapter_name=str(index))
    model.eval()
    names = [str(index) for index in range(len(adapters))]
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=torch.full((_ROWS, _PAST), 9), adapter_names=names, past_key_values=cache, logits_to_keep=1)

    def step() -> None:
        with torch.no_grad():
            ids, mask = torch.full((_ROWS, 1), 9), torch.ones((_ROWS, _PAST + 1), dtype=torch.long)
            model(input_ids=ids, attention_mask=mask, adapter_names=names, past_key_values=cache, logits_to_keep=1)
        cache.crop(-1)

    return step


def compose_steps(session: AdapterSession, names: Sequence[str]) -> dict[str, Callable[[], object]]:
    """Putting a wholly new mix together, and copying its bytes once."""
    bank, turns = session.bank, itertools.count()
    mixes = [bank.rows([*names[turn:], *names[:turn]], _ROWS) for turn in range(0, _ROWS, len(_RANKS))]
    tensors = [array for held in bank.adapters.values() for array in held.tensors.values()]
    targets = [np.ones_like(array) for array in tensors]

    def compose() -> None:
        with bank.lent(mixes[next(turns) % len(mixes)]):
            pass

    def copy() -> None:
        for target, array in zip(targets, tensors, strict=True):
            np.copyto(target, array)

    return {"compose": compose, "copy": copy}


def batching(session: AdapterSession, names: Sequence[str]) -> dict[str, dict]:
    """Tokens per second of texts whose lengths differ, all told what they are to write."""
    rng = np.random.default_rng(0)
    texts = [
        (
            rng.integers(5, 1000, int(rng.integers(4, 33))).tolist(),
            int(np.clip(rng.geometric(1 / _MEAN_NEW), 4, _MOST_NEW)),
        )
        for _ in range(_N_TEXTS)
    ]
    n_tokens = sum(n_new for _, n_new in texts)

    def static() -> None:
        for start in range(0, _N_TEXTS, _ROWS):
            some = texts[start : start + _ROWS]
            generate(session, [prompt for prompt, _ in some], names, max_new_tokens=max(n_new for _, n_new in some))

    def continuous() -> None:
        scheduler = Scheduler(session, max_rows=_ROWS, max_length=_MOST_NEW + 32)
        for index, (prompt, n_new) in enumerate(texts):
            scheduler.submit(prompt, names[index % _ROWS], max_new_tokens=n_new)
        while scheduler.n_active or scheduler.n_waiting:
            scheduler.step()

    taken = paired({"static": static, "continuous": continuous}, _BATCHING_BLOCKS)
    return {
        name: {"seconds": seconds, "tokens_per_second": n_tokens / statistics.median(seconds)}
        for name, seconds in taken.items()
    }


def resident(session: AdapterSession) -> tuple[int, int]:
    """What 100 adapters add to this process's memory, and the bytes of their files."""
    files = sorted((session.folder / "adapters").glob("*.onnx_adapter"))
    session.load(files[0], "first")  # what reading one leaves behind
    gc.collect()
    before, n_bytes = _resident_bytes(), 0
    for index in range(_N_RESIDENT):
        file = files[index % len(files)]
        session.load(file, f"copy {index}")
        n_bytes += file.stat().st_size
    gc.collect()
    return _resident_bytes() - before, n_bytes


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def target(name: str, measured: tuple[float, float, float], limit: float) -> Target:
    value, low, high = measured
    return Target(name, value, limit, f"{low:.3f} to {high:.3f}", str(verdict(low, high, limit)))


class Work:
    """What the parts share: models, exports and sessions, each made when it is first asked for."""

    def __init__(self, folder: Path, n_blocks: int) -> None:
        self.base, self.adapters, self._folders = prepare(folder)
        self.n_blocks = n_blocks

    @functools.cached_property
    def served(self) -> AdapterSession:
        return self.session("served")

    def session(self, name: str) -> AdapterSession:
        return AdapterSession(self._folders[name], "cpu", stop_spinning=True)

    def steps(self, session: AdapterSession) -> dict[str, Callable[[], object]]:
        return decode_steps(session, list(session.adapters))

    def base_step(self) -> Callable[[], object]:
        return decode_steps(self.session("alone"), [])["base"]


Part = tuple[object, list[Target]]


def part_decode(work: Work) -> Part:
    steps = {"base alone": work.base_step(), **work.steps(work.served)}
    for name in ("one row changes", "every row changes"):  # a session has what its own last step was put together of
        steps[name] = work.steps(work.session("served"))[name]
    taken = paired(steps, work.n_blocks)
    return taken, [
        target("16 adapters ÷ the base alone", ratio(taken, "mixed", "base alone"), 1.08),
        target("16 adapters in one batch ÷ row by row", ratio(taken, "mixed", "row by row"), 1 / 3),
        target("one row's adapter changes ÷ none changes", ratio(taken, "one row changes", "mixed"), 1.05),
    ]


def part_queries(work: Work) -> Part:
    steps = {"base alone": work.base_step(), "mixed": work.steps(work.session("queries"))["mixed"]}
    taken = paired(steps, work.n_blocks)
    name = "16 adapters of queries and values ÷ the base alone"
    return taken, [target(name, ratio(taken, "mixed", "base alone"), 1.08)]


def part_compose(work: Work) -> Part:
    taken = paired(compose_steps(work.served, list(work.served.adapters)), work.n_blocks)
    return taken, [target("a wholly new mix ÷ copying its bytes", ratio(taken, "compose", "copy"), 2)]


def part_batching(work: Work) -> Part:
    found = batching(work.served, list(work.served.adapters))
    taken = {name: each["seconds"] for name, each in found.items()}
    return found, [target("continuous ÷ static batches, seconds", ratio(taken, "continuous", "static"), 0.5)]


def part_resident(work: Work) -> Part:
    memory, files = resident(work.session("served"))
    return {"bytes": memory, "file_bytes": files}, [
        target("100 adapters' memory ÷ their files", (memory / files,) * 3, 1.1)
    ]


def part_peft(work: Work) -> Part:
    steps = {"mixed": work.steps(work.served)["mixed"], "PEFT": peft_step(work.base, work.adapters)}
    taken = paired(steps, _PEFT_BLOCKS)
    return taken, [target("16 adapters ÷ PEFT's adapter_names batch", ratio(taken, "mixed", "PEFT"), 1 / 3)]


_PARTS = {
    "decode": part_decode, "queries": part_queries, "compose": part_compose, "batching": part_batching,
    "resident": part_resident, "peft": part_peft,
}  # fmt: skip


def session_table(result: Mapping) -> str:
    """The targets of all parts, and under what load and with how many bytes they were measured."""
    parts, setup = result["parts"], result["setup"]
    known = [name for name in _PARTS if name in parts]
    loads = [parts[name]["environment"]["load_average_at_start"][0] for name in known]
    judged = target_table([Target(**each) for name in known for each in parts[name]["targets"]])
    read = f"{setup['base_bytes'] / 1e6:.0f} MB of the base, {setup['padded_bytes'] / 1e6:.0f} MB of the adapters"
    load = f"Load average at the start of a part: {min(loads):.1f} to {max(loads):.1f}."
    return f"{judged}\n\n{load}\nA step of 16 rows reads {read}, padded to the largest rank.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for models and exports; what is there is reused")
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--parts", nargs="*", default=list(_PARTS), choices=_PARTS)
    given = parser.parse_args()
    work, path = Work(given.work, given.blocks), RESULTS / f"serving-session-{host_kind()}.json"
    for name in given.parts:
        environment = provenance()
        measured, targets = _PARTS[name](work)
        # Written after each part, beside those of other runs: a crash loses nothing.
        result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        padded = sum(sum(size) for size in _SHAPE.linears().values()) * max(_RANKS) * _ROWS * 4
        setup = {
            "shape": asdict(_SHAPE), "ranks": _RANKS, "ranks_of_queries": _QUERY_RANKS, "rows": _ROWS, "past": _PAST,
            "base_bytes": 4 * _SHAPE.n_parameters, "padded_bytes": padded,
        }  # fmt: skip
        judged = [asdict(each) for each in targets]
        parts = result.get("parts", {}) | {name: {"environment": environment, "measured": measured, "targets": judged}}
        result = {"setup": setup, "parts": parts}
        write_json(path, result)
        write_into_readme("serving_session", session_table(result))
        print(heading(environment), target_table(targets), sep="\n\n", flush=True)


if __name__ == "__main__":
    main()
