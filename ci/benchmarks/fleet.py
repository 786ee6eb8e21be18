"""What a fleet takes: many tiny adapters, few large ones, memory, and a second run.

    python ci/benchmarks/fleet.py --work /tmp/fleets

1. `tiny`: 1,000 adapters of a two-layer Llama, packed and compared on four rows, by the command on all cores; peak
   memory beside that of a tenth of them.
2. `again`: the same list with 10 of them changed.
3. `large`: adapters of rank 16 on all linear maps of 8 layers of width 1024; what packing takes of the processor
   beside reading and writing their bytes once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import textwrap
import time
from pathlib import Path

from processes import Usage, run_measured
from random_models import LlamaShape, write_adapter, write_llama
from readme_tables import write_into_readme
from results import RESULTS, Target, heading, host_kind, provenance, target_table, write_json

RESULT = RESULTS / "fleet-x86_64-2cores.json"
_TINY = LlamaShape(2, 64, 128, 4, 2, 16, 259, "float32")
_LARGE = LlamaShape(8, 1024, 2816, 16, 4, 64, 8000, "float32")
_N_TINY, _N_LARGE, _N_CHANGED = 1000, 24, 10
_MOST_SECONDS, _MOST_MEMORY, _MOST_COPIES, _MOST_SECONDS_BEYOND = 300, 1.10, 1.5, 0.1


def adapters_of(shape: LlamaShape, folder: Path, base: Path, n: int, rank: int) -> Path:
    """A folder of `n` adapters on all linear maps."""
    for index in range(n):
        seeded = {"rank": rank, "base": base, "task_type": "CAUSAL_LM", "seed": index}
        write_adapter(folder / f"a{index}", shape.linears(), **seeded)
    return folder


def fleet(listed: Path, base: Path, out: Path, *options: str) -> tuple[Usage, dict]:
    """Run the command; what it took, and its report."""
    command = [
        sys.executable,
        "-m",
        "lora_export.cli.main",
        "fleet",
        listed,
        base,
        "-o",
        out,
        "--provider",
        "cpu",
        *options,
    ]
    usage = run_measured(list(map(str, command)), os.environ | {"LORA_EXPORT_CACHE": str(out.parent / "cache")})
    report = json.loads((out / "reports/fleet.json").read_text(encoding="utf-8"))
    assert report["counts"]["served"] == len(report["adapters"]), report["counts"]
    return usage, report


def seconds_to_copy(listed: Path, target: Path) -> tuple[float, float]:
    """Reading the adapters' bytes and writing them once: by the clock, and of the processor."""
    started, processor = time.perf_counter(), time.process_time()
    with target.open("wb") as file:
        for path in sorted(listed.glob("*/adapter_model.safetensors")):
            file.write(path.read_bytes())
    return time.perf_counter() - started, time.process_time() - processor


def measured(work: Path) -> dict:
    """All figures, as JSON values; seconds and bytes."""
    base = write_llama(work / "tiny/base", _TINY)
    listed = adapters_of(_TINY, work / "tiny/list", base, _N_TINY, 4)
    few = adapters_of(_TINY, work / "tiny/few", base, _N_TINY // 10, 4)
    shutil.rmtree(work / "tiny/out", ignore_errors=True)
    shutil.rmtree(work / "tiny/few-out", ignore_errors=True)
    small, _ = fleet(few, base, work / "tiny/few-out", "--rows", "4")
    whole, report = fleet(listed, base, work / "tiny/out", "--rows", "4")
    for index in range(_N_CHANGED):
        shutil.rmtree(listed / f"a{index}")
        seeded = {"rank": 4, "base": base, "task_type": "CAUSAL_LM", "seed": _N_TINY + index + time.time_ns() % 10**6}
        write_adapter(listed / f"a{index}", _TINY.linears(), **seeded)
    again, second = fleet(listed, base, work / "tiny/out", "--rows", "4")
    n_redone = sum(not adapter["reused"] for adapter in second["adapters"])
    large_base = write_llama(work / "large/base", _LARGE)
    large = adapters_of(_LARGE, work / "large/list", large_base, _N_LARGE, 16)
    shutil.rmtree(work / "large/out", ignore_errors=True)
    copies = [seconds_to_copy(large, work / "large/copy") for _ in range(5)]
    of_large, found = fleet(large, large_base, work / "large/out", "--rows", "1", "--workers", "1")
    packing, of_processor = (
        sorted(adapter[field] for adapter in found["adapters"])
        for field in ("seconds_packing", "processor_seconds_packing")
    )
    return {
        "tiny": {"n": _N_TINY, "seconds": whole.seconds, "seconds_packing": report["seconds_packing"],
                 "peak_bytes": whole.peak_bytes, "few_peak_bytes": small.peak_bytes},
        "again": {"n_changed": _N_CHANGED, "n_redone": n_redone, "seconds": again.seconds},
        "large": {"n": _N_LARGE, "seconds": of_large.seconds, "n_bytes": sum(a["n_bytes"] for a in found["adapters"]),
                  "seconds_packing_of_each": packing, "processor_seconds_packing_of_each": of_processor,
                  "seconds_to_copy": [clock for clock, _ in copies],
                  "processor_seconds_to_copy": [processor for _, processor in copies],
                  "seconds_of_each": sorted(adapter["seconds"] for adapter in found["adapters"])},
    }  # fmt: skip


def targets(figures: dict) -> list[Target]:
    """What was promised, and whether it holds."""
    tiny, again, large = figures["tiny"], figures["again"], figures["large"]
    memory = tiny["peak_bytes"] / tiny["few_peak_bytes"]
    copy = statistics.median(large["processor_seconds_to_copy"]) / large["n"]
    packing = statistics.median(large["processor_seconds_packing_of_each"])
    clock = statistics.median(large["seconds_packing_of_each"])
    beyond = packing - _MOST_COPIES * copy
    rows = [
        ("1,000 tiny adapters, seconds", tiny["seconds"], _MOST_SECONDS, f"{tiny['n']} packed and compared on 4 rows"),
        ("peak memory ÷ that of a tenth of them", memory, _MOST_MEMORY, f"{tiny['peak_bytes'] / 1e9:.2f} GB"),
        ("adapters done again", again["n_redone"], again["n_changed"], f"in {again['seconds']:.1f} s"),
        (
            "packing a large adapter beyond 1.5 copies, seconds of processor", beyond, _MOST_SECONDS_BEYOND,
            f"median {packing:.3f} s; a copy of its {large['n_bytes'] / large['n'] / 1e6:.1f} MB {copy:.3f} s; "
            f"{clock:.3f} s by the clock",
        ),
    ]  # fmt: skip
    return [
        Target(name, value, limit, detail, "pass" if value <= limit else "fail") for name, value, limit, detail in rows
    ]


def summary(result: dict) -> str:
    """The page's table of a result."""
    rows = target_table([Target(**target) for target in result["targets"]])
    return f"{textwrap.fill(heading(result['environment']), 128)}\n\n{rows}\n"


def read_result() -> dict:
    """The recorded result."""
    return json.loads((RESULT).read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    where = provenance()
    figures = measured(parser.parse_args().work)
    result = {"environment": where, "figures": figures, "targets": [vars(target) for target in targets(figures)]}
    write_json(RESULTS / f"fleet-{host_kind()}.json", result)
    write_into_readme("fleet", summary(result))
    print(summary(result))


if __name__ == "__main__":
    main()
