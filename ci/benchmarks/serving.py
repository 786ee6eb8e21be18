"""Load test of `lora-export serve`: is every answer that of its own adapter, is any lost, and what does serving cost?

    python ci/benchmarks/serving.py --work /tmp/serving --minilm .demo/minilm

Three exports with 16 adapters of ranks 2 to 16: MiniLM for embeddings, and random shapes of Llama and of T5 that write
texts. The stages, each with OpenAI's client against the command in a process of its own:

1. `mixed`: 64 clients at once over all adapters. Every answer is compared with what its adapter says alone.
2. `churn`, not of T5: the same, while adapters are loaded and unloaded, clients die, a poisoned adapter is offered, and
   names that are not served are asked.
3. `memory`: adapters are loaded, asked and unloaded, again and again.
4. `clients`: eight clients at once beside one.
5. `overhead`: one row over HTTP beside the same row on a session, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import http.client
import json
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnxruntime as ort
from readme_tables import write_into_readme
from results import RESULTS, Target, heading, host_kind, provenance, table, target_table, write_json
from serving_clients import TOLERANCE, Outcome, Process, churning, cycle, dies, mixed, serving
from serving_models import Served, decoder, encoder, encoder_decoder, nearest_of_others

from lora_export.artifact import MANIFEST
from lora_export.runtime.adapter_file import read_adapter
from lora_export.runtime.adapter_session import AdapterSession

_SUBJECTS = ("encoder", "decoder", "encoder-decoder")
_STAGES = ("mixed", "churn", "memory", "clients", "overhead")
_N_CLIENTS = 64
# Of allocated memory, from a tenth of the cycles to their end.
_MOST_GROWTH = 0.02
_LEAST_GAIN = 3.0
_MOST_OVERHEAD_MS = 3.0


def store_of(served: Served, work: Path) -> Path:
    """A folder to load adapters from: those of the export, and a poisoned one that its manifest lists."""
    folder = work / f"{served.name}-store"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copytree(served.folder / "adapters", folder / "adapters")
    first = f"adapters/{served.adapters[0]}.onnx_adapter"
    tensors = read_adapter(folder / first)
    next(iter(tensors.values())).flat[0] = np.nan
    poisoned = ort.AdapterFormat()
    poisoned.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()})
    file = "adapters/poisoned.onnx_adapter"
    poisoned.export_adapter(str(folder / file))
    fields = json.loads((served.folder / MANIFEST).read_text(encoding="utf-8"))
    fields["adapters"].append({**fields["adapters"][0], "name": "poisoned", "file": file})
    fields["files"][file] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(fields), encoding="utf-8")
    return folder


def under_load(served: Served, work: Path, seconds: float, *, churn: bool) -> dict:
    """Stages `mixed` and `churn`."""
    load = churning if churn else mixed
    options = ("--allow-runtime-adapters", str(store_of(served, work))) if churn else ()
    with serving(served.folder, *options) as process:
        asyncio.run(mixed(process, served, n_clients=4, seconds=2))
        outcome, elapsed = asyncio.run(load(process, served, n_clients=_N_CLIENTS, seconds=seconds))
        n_runs, n_rows = (process.metric(f"lora_export_batch_rows_{name}") for name in ("count", "sum"))
        n_models = process.metric("lora_export_batch_models_sum")
    found = outcome.as_json(elapsed) | {"rows_a_run": n_rows / n_runs, "adapters_a_run": n_models / n_runs}
    return found | {"nearest_other_adapter": nearest_of_others(served), "clients": _N_CLIENTS}


def memory(served: Served, work: Path, n_cycles: int) -> dict:
    """Allocated memory while adapters come and go, and every tenth client dies."""
    samples: list[tuple[int, int]] = []
    outcome = Outcome()

    async def run(process: Process) -> None:
        async with process.client() as client:
            for number in range(n_cycles):
                if number % max(1, n_cycles // 20) == 0:
                    samples.append((number, process.n_bytes))
                await cycle(client, served, outcome, number=number, asks=number % 4 == 0)
                if number % 10 == 0:
                    await dies(process, served, number)
            samples.append((n_cycles, process.n_bytes))

    with serving(served.folder, "--allow-runtime-adapters", str(store_of(served, work))) as process:
        began = time.monotonic()
        asyncio.run(run(process))
        elapsed = time.monotonic() - began
    warm = next(n_bytes for number, n_bytes in samples if number >= n_cycles / 10)
    growth = samples[-1][1] / warm - 1
    return outcome.as_json(elapsed) | {"cycles": n_cycles, "bytes_by_cycle": samples, "growth_after_a_tenth": growth}


def clients(served: Served, seconds: float) -> dict:
    """Requests a second of one client and of eight, in turns."""
    rates: dict[int, list[float]] = {1: [], 8: []}
    n_wrong = 0
    with serving(served.folder) as process:
        asyncio.run(mixed(process, served, n_clients=8, seconds=2))
        for _ in range(4):
            for n_clients, found in rates.items():
                outcome, elapsed = asyncio.run(mixed(process, served, n_clients=n_clients, seconds=seconds / 8))
                found.append(outcome.n_right / elapsed)
                n_wrong += outcome.n_wrong + sum(outcome.lost.values())
    one, eight = (statistics.median(found) for found in rates.values())
    return {"one": rates[1], "eight": rates[8], "gain": eight / one, "wrong_or_lost": n_wrong}


def overhead(served: Served, n_blocks: int) -> dict:
    """What a row takes over HTTP beyond what it takes on a session; blocks of both in turns."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(served.folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    text, name = served.questions[0], served.adapters[0]
    ids = np.array([tokenizer.encode(text).ids])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    session = AdapterSession(served.folder, "cpu")
    body = json.dumps({"model": name, "input": text, "encoding_format": "base64"})

    def of_session() -> None:
        session.run(inputs, name, ["last_hidden_state"])

    with serving(served.folder) as process:
        connection = http.client.HTTPConnection(process.url.removeprefix("http://"))

        def over_http() -> None:
            connection.request("POST", "/v1/embeddings", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise RuntimeError(answer.read())
            answer.read()

        pairs = [(_median_ms(of_session), _median_ms(over_http)) for _ in range(n_blocks)]
        connection.close()
    differences = sorted(http - alone for alone, http in pairs)
    return {"blocks_ms": pairs, "overhead_ms": statistics.median(differences), "quartiles_ms": _quartiles(differences)}


def _median_ms(call: Callable[[], None], n: int = 20) -> float:
    times = []
    for _ in range(n + 3):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times[3:])


def _quartiles(values: list[float]) -> list[float]:
    return [float(value) for value in np.quantile(values, (0.25, 0.75))]


def find_targets(results: dict) -> list[Target]:
    """What was found beside what was to be."""
    targets = []
    for name, found in results.items():
        stage, _, subject = name.partition(": ")
        if stage in ("mixed", "churn", "memory"):
            n_bad = found["wrong"] + sum(found["lost"].values())
            targets.append(_at_most(f"{name}: answers wrong or lost", n_bad, 0, f"{found['right']:,} right"))
        if stage == "memory":
            detail = f"{found['cycles']:,} cycles"
            targets.append(_at_most(f"{name}: growth", found["growth_after_a_tenth"], _MOST_GROWTH, detail))
        if stage == "clients" and subject == "decoder":
            verdict = "pass" if found["gain"] >= _LEAST_GAIN else "fail"
            targets.append(Target(f"{name}: eight ÷ one", found["gain"], 8.0, "median of 4", verdict, _LEAST_GAIN))
        if stage == "overhead":
            low, high = found["quartiles_ms"]
            detail = f"quartiles {low:.2f} to {high:.2f}, {len(found['blocks_ms'])} blocks"
            targets.append(_at_most(f"{name}: ms over the session", found["overhead_ms"], _MOST_OVERHEAD_MS, detail))
    return targets


def _at_most(name: str, value: float, limit: float, detail: str) -> Target:
    return Target(name, float(value), limit, detail, "pass" if value <= limit else "fail")


def serving_table(result: dict) -> str:
    """The results as Markdown, for docs/serve.md."""
    results = result["results"]
    rows = [
        (
            name, f"{found['right']:,}", str(found["wrong"]), str(sum(found["lost"].values())),
            f"{sum(found['refused_as_expected'].values()):,}", f"{found['requests_per_second']:.0f}",
            f"{found['median_ms']:.0f}", f"{found['p99_ms']:.0f}", f"{found.get('rows_a_run', 1):.1f}",
        )
        for name, found in results.items() if "right" in found
    ]  # fmt: skip
    columns = ("stage", "right", "wrong", "lost", "refused", "a second", "median ms", "p99 ms", "rows a run")
    mixed = results["mixed: encoder"]
    far = (
        f"The largest difference of an embedding's number from what its adapter says alone is "
        f"{mixed['largest_difference']:.1e}; the nearest other adapter's is {mixed['nearest_other_adapter']:.1e} away."
    )
    gains = [f"eight clients ÷ one, {name.partition(': ')[2]}: {found['gain']:.2f} ×"
             for name, found in results.items() if "gain" in found]  # fmt: skip
    targets = target_table([Target(**target) for target in result["targets"]])
    head, far = (textwrap.fill(text, 128, break_on_hyphens=False) for text in (heading(result["environment"]), far))
    return "\n\n".join([head, table(columns, rows), far, "; ".join(gains), targets]) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for models and exports; models there are reused")
    parser.add_argument("--minilm", type=Path, default=Path(".demo/minilm"), help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--seconds", type=float, default=60, help="of a stage under load")
    parser.add_argument("--cycles", type=int, default=10_000, help="of the stage `memory`")
    parser.add_argument("--blocks", type=int, default=30, help="of the stage `overhead`")
    parser.add_argument("--only", choices=_STAGES, nargs="*", default=_STAGES, help="these stages; others are kept")
    parser.add_argument("--subject", choices=_SUBJECTS, nargs="*", default=_SUBJECTS)
    parser.add_argument("--out", type=Path, default=RESULTS / f"serving-{host_kind()}.json")
    return parser.parse_args()


def stages(args: argparse.Namespace, served: Served) -> dict[str, Callable[[], dict]]:
    """The stages of a subject by name."""
    found: dict[str, Callable[[], dict]] = {
        "mixed": lambda: under_load(served, args.work, args.seconds, churn=False),
        "clients": lambda: clients(served, args.seconds),
    }
    if served.name != "encoder-decoder":
        found["churn"] = lambda: under_load(served, args.work, args.seconds, churn=True)
    if served.name == "encoder":
        found["memory"] = lambda: memory(served, args.work, args.cycles)
        found["overhead"] = lambda: overhead(served, args.blocks)
    return found


def main() -> int:
    """Measure, write the JSON after each stage, print the Markdown; 1 if a target failed."""
    args = _arguments()
    args.work, environment = args.work.resolve(), provenance()
    before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    results = before.get("results", {})
    makers = {"encoder": lambda: encoder(args.minilm.resolve(), args.work), "decoder": lambda: decoder(args.work)}
    makers["encoder-decoder"] = lambda: encoder_decoder(args.work)
    for subject in args.subject:
        served = makers[subject]()
        for stage, run in stages(args, served).items():
            if stage in args.only:
                print(f"{stage}: {subject}", file=sys.stderr, flush=True)
                results[f"{stage}: {subject}"] = run() | {"load_average": provenance()["load_average_at_start"]}
                targets = [asdict(target) for target in find_targets(results)]
                head = {"benchmark": "serving", "environment": environment, "tolerance": TOLERANCE}
                write_json(args.out, head | {"results": results, "targets": targets})
    result = json.loads(args.out.read_text(encoding="utf-8"))
    print(serving_table(result))
    if args.out.parent == RESULTS:
        write_into_readme("serving", serving_table(result))
    return int(any(target.verdict == "fail" for target in find_targets(results)))


if __name__ == "__main__":
    sys.exit(main())
