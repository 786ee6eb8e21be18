"""What 100,000 adapters on 64 nodes would take: a simulation from rates that this run measures. Nothing else is real.

    python ci/benchmarks/fleet_at_scale.py --work /tmp/at-scale

Measured here: what the process that leads a fleet does for each adapter (headers, records, links, manifest and reports:
the slope between two sizes of an unchanged list), its hashing, what it takes to hand an assignment to a Ray actor and
to take the answer, and a worker's start. A worker's seconds for a large adapter are those that `fleet.py` recorded.

Simulated: workers that take adapters from one leader, which hands out and takes in one at a time, over storage that all
nodes share, whose bandwidth one transfer at a time has. The leader's own part before and after is added.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import shutil
import statistics
import textwrap
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from fleet import RESULT as MEASURED_FLEET
from fleet import adapters_of
from random_models import LlamaShape, write_llama
from readme_tables import write_into_readme
from results import RESULTS, heading, provenance, table, write_json

from lora_export.artifact import MANIFEST, sha256_of
from lora_export.fleet.on_ray import HERE, Actors
from lora_export.fleet.options import FleetOptions
from lora_export.fleet.outcomes import AdapterOutcome, Outcome
from lora_export.fleet.pool import Limits, Pool
from lora_export.pipeline import fleet

RESULT = RESULTS / "fleet-at-scale.json"
_SHAPE = LlamaShape(2, 64, 128, 4, 2, 16, 259, "float32")
_SIZES, _N_TRIVIAL = (100, 300), 400
_N, _NODES, _CORES = 100_000, 64, 16
# Of the storage that all nodes share: a network file system, a parallel one, a large parallel one.
_GB_A_SECOND = (0.5, 5.0, 50.0)
_DOLLARS_A_CORE_HOUR = 0.05


@dataclass(frozen=True)
class Rates:
    """What was measured; seconds, bytes.

    Attributes:
        lead: Of the leader for each adapter, besides hashing and handing out.
        hash_bytes: What the leader hashes in a second.
        hand_out: Of the leader for an assignment and its answer.
        start: Of a worker, until its first answer.
        work: Of a worker for an adapter, each time that it was measured.
        adapter_bytes: Of an adapter's file.
        manifest_bytes: Of a manifest, for each adapter.
    """

    lead: float
    hash_bytes: float
    hand_out: float
    start: float
    work: tuple[float, ...]
    adapter_bytes: float
    manifest_bytes: float


def trivial() -> object:
    """The work of `hand_out`: nothing."""
    return lambda name: AdapterOutcome(name, "", Outcome.SERVED)


def measured(work: Path) -> Rates:
    base = write_llama(work / "base", _SHAPE)
    seconds, sizes = [], []
    for n in _SIZES:
        listed, out = adapters_of(_SHAPE, work / f"list{n}", base, n, 4), work / f"out{n}"
        shutil.rmtree(out, ignore_errors=True)
        options = FleetOptions(out, provider="cpu", n_rows=1)
        fleet(listed, str(base), options)
        again = [fleet(listed, str(base), options)[0].seconds for _ in range(3)]
        seconds.append(statistics.median(again))
        sizes.append((out / MANIFEST).stat().st_size)
    lead, manifest_bytes = ((two - one) / (_SIZES[1] - _SIZES[0]) for one, two in (seconds, sizes))
    start, hand_out = handed_out()
    large = json.loads(MEASURED_FLEET.read_text(encoding="utf-8"))["figures"]["large"]
    each = tuple(large["seconds_of_each"])
    return Rates(lead, hash_rate(work), hand_out, start, each, large["n_bytes"] / large["n"], manifest_bytes)


def handed_out() -> tuple[float, float]:
    """Seconds until a first answer, and for each of many, of actors that do nothing."""
    begun = time.perf_counter()
    with (
        closing(Actors("fleet_at_scale:trivial", HERE)) as engine,
        Pool(engine, n_workers=1, limits=Limits(600), broken=lambda order, why: None) as pool,
    ):
        next(pool.outcomes(["first"]))
        start = time.perf_counter() - begun
        begun = time.perf_counter()
        assert sum(1 for _ in pool.outcomes([str(n) for n in range(_N_TRIVIAL)])) == _N_TRIVIAL
        return start, (time.perf_counter() - begun) / _N_TRIVIAL


def hash_rate(work: Path) -> float:
    """Bytes a second of `sha256_of` on a file in the page cache."""
    file = work / "hashed"
    file.write_bytes(random.Random(0).randbytes(200_000_000))
    begun = time.perf_counter()
    sha256_of(file)
    return file.stat().st_size / (time.perf_counter() - begun)


def simulated(rates: Rates, *, n: int, n_workers: int, storage: float, seed: int = 0) -> dict:
    """`n` adapters by `n_workers`; seconds, and the share of them that leader, storage and workers were busy.

    Args:
        storage: Bytes a second that all workers have together.
    """
    rng = random.Random(seed)
    transfer = 2 * rates.adapter_bytes / storage  # read once, and written once
    free_at = [(rates.start, worker) for worker in range(n_workers)]
    heapq.heapify(free_at)
    leader = store = ended = working = 0.0
    for _ in range(n):
        asked, worker = heapq.heappop(free_at)
        leader = max(leader, asked) + rates.hand_out
        store = max(store, leader) + transfer
        done = store + (took := rng.choice(rates.work))
        working += took
        ended = max(ended, done)
        heapq.heappush(free_at, (done, worker))
    around = n * (rates.lead + rates.adapter_bytes / rates.hash_bytes)
    busy = {
        "leader, before and after": around,
        "leader, handing out": n * rates.hand_out,
        "storage": n * transfer,
        "workers": working / n_workers,
    }
    return {"seconds": ended + around, "busy": busy}


def summary(result: dict) -> str:
    """The page's tables of a result."""
    rates = result["rates"]
    rows = [
        ("the leader, for each adapter, besides hashing", f"{rates['lead'] * 1e3:.2f} ms"),
        ("the leader's hashing", f"{rates['hash_bytes'] / 1e9:.2f} GB/s"),
        ("handing an assignment out and taking its answer", f"{rates['hand_out'] * 1e3:.2f} ms"),
        ("a worker's start", f"{rates['start']:.1f} s"),
        ("a worker, for a large adapter", f"{statistics.median(rates['work']):.2f} s"),
        ("a large adapter's file", f"{rates['adapter_bytes'] / 1e6:.1f} MB"),
        ("the manifest, for each adapter", f"{rates['manifest_bytes'] / 1e3:.1f} kB"),
    ]
    rates_table = table(("measured rate", "value"), rows)
    columns = ("nodes × cores", "shared storage", "hours", "busiest", "its hours", "workers busy", "core-hours", "cost")
    return f"{textwrap.fill(heading(result['environment']), 128)}\n\n{rates_table}\n\n" + (
        table(columns, [_row(case) for case in result["cases"]]) + "\n"
    )


def _row(case: dict) -> Sequence[str]:
    hours, n_workers = case["seconds"] / 3600, case["nodes"] * case["cores"]
    busiest = max(case["busy"], key=case["busy"].get)
    return (
        f"{case['nodes']} × {case['cores']}",
        f"{case['storage'] / 1e9:g} GB/s",
        f"{hours:.2f}",
        busiest,
        f"{case['busy'][busiest] / 3600:.2f}",
        f"{case['busy']['workers'] / case['seconds']:.0%}",
        f"{hours * n_workers:,.0f}",
        f"${hours * n_workers * _DOLLARS_A_CORE_HOUR:,.0f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    where = provenance()
    rates = measured(parser.parse_args().work)
    cases = [
        {"nodes": nodes, "cores": _CORES, "storage": gigabytes * 1e9}
        | simulated(rates, n=_N, n_workers=nodes * _CORES, storage=gigabytes * 1e9)
        for nodes in (1, 8, _NODES)
        for gigabytes in _GB_A_SECOND
    ]
    result = {"environment": where, "n": _N, "rates": vars(rates), "cases": cases}
    write_json(RESULT, result)
    write_into_readme("fleet_at_scale", summary(result))
    print(summary(result))


if __name__ == "__main__":
    main()
