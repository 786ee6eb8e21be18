"""Faults injected into commands: what is lost, what is left behind, and what is said.

    python ci/benchmarks/fault_injection.py --work /tmp/faults                                  # all
    python ci/benchmarks/fault_injection.py --work /tmp/faults --part kill --scenario "remove"  # a part of it

1. `kill`: ended at each call that changes a file, and at random moments, by SIGKILL, SIGTERM and SIGINT.
2. `errors`: each call that changes a file fails, as on a full or broken disk; each that opens or reads one.
   Open files, sizes of files and memory are limited.
3. `bits`: one bit of one file of an export is another.
4. `together`: two commands at once.
5. `fleet` and `serve`: ended at random moments; a server also while it answers.

What was recorded of other parts and scenarios stays. `--calls` takes so many of the calls, by `--seed`.
"""

from __future__ import annotations

import argparse
import json
import random
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from injection.shim import loaded_with_shim
from readme_tables import write_into_readme
from results import RESULTS, heading, provenance, table, write_json

RESULT = RESULTS / "faults.json"
PARTS = ("kill", "errors", "bits", "together", "fleet", "serve")
BESIDE, IN_FLIGHT = "add beside a server", "serve, requests in flight"
_LONG = {"fleet": "fleet, its workers started anew"}
OF_BITS = ("merge", "dynamic", "dynamic --sign-key")


@dataclass(frozen=True)
class Named:
    """A part of one scenario, which has its name."""

    name: str


def recorded(path: Path) -> dict:
    """What was recorded so far: by part, environment and figures by scenario."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _sum(figures: dict, field: str, chosen: Callable[[str], bool] = lambda way: True) -> int:
    found = [tally[field] for way, tally in figures.items() if chosen(way)]
    return sum(value if isinstance(value, int) else len(value) for value in found)


def summary(result: dict) -> str:
    """The page's tables of a result."""
    rows = []
    kill, errors = result["kill"]["scenarios"], result["errors"]["scenarios"]
    for name in kill:
        both = {**kill[name], **errors.get(name, {})}
        counted = (
            _sum(kill[name], "points", lambda way: way.endswith("call")),
            _sum(kill[name], "points", lambda way: way.endswith("moment")),
            _sum(errors.get(name, {}), "points", lambda way: "RLIMIT" not in way),
            _sum(errors.get(name, {}), "points", lambda way: "RLIMIT" in way),
            _sum(both, "lost"),
            _sum(both, "left"),
        )
        rows.append((name, *counted))
    for name in sorted({"fleet", "serve"} & set(result)):
        for scenario, of in result[name]["scenarios"].items():
            told = _LONG.get(scenario, scenario)
            rows.append((told, 0, _sum(of, "points"), 0, 0, _sum(of, "lost"), _sum(of, "left")))
    rows.append(("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    columns = ("command", "ended at a call", "at a moment", "a call failed", "under a limit", "lost", "left behind")
    tables = [table(columns, [(name, *(f"{n:,}" for n in counted)) for name, *counted in rows])]
    columns = ("two at once", "rounds", "how both ended", "mixed or lost", "left behind")
    pairs = [(name, figures["rounds"]) for name, figures in result["together"]["scenarios"].items()]
    told = [
        (name, str(of["points"]), "; ".join(f"{codes}: {n}" for codes, n in of["ended"].items()), str(len(of["lost"])),
         str(len(of["left"])))
        for name, of in pairs
    ]  # fmt: skip
    tables.append(table(columns, told))
    columns = ("an export's flipped bits", "files", "bits", "not noticed by verify")
    bits = result["bits"]["scenarios"].items()
    told = [(name, str(len(of)), f"{_sum(of, 'points'):,}", str(_sum(of, "lost"))) for name, of in bits]
    tables.append(table(columns, told))
    where = textwrap.fill(heading(result["kill"]["environment"]), 128)
    return "\n\n".join((where, *tables)) + "\n"


def run_parts(options: argparse.Namespace) -> int:
    """Run what was asked for, recording as it goes; how many points were lost, or left something behind."""
    from injection import bits, errors, in_flight, kill, long_running, together
    from injection.keys import make_key
    from injection.scenarios import scenarios, warm_up
    from injection.world import make_world

    world = make_world(options.work / "world")
    key = make_key(world.root / "sources")
    every = scenarios(world, key)
    pairs = together.pairs(world, {one.name: one for one in every})
    chosen = [one for one in every if options.scenario in (None, one.name)]
    of_bits = partial(bits.figures, public=key.with_suffix(".pub"))
    cases = {"kill": chosen, "errors": chosen, "bits": [one for one in chosen if one.name in OF_BITS]}
    cases["together"] = [pair for pair in pairs if options.scenario in (None, pair.name)]
    run_of = {"kill": kill.figures, "errors": errors.figures, "bits": of_bits, "together": together.figures}
    for name, figures in (("fleet", long_running.fleet_figures), ("serve", long_running.serve_figures)):
        cases[name], run_of[name] = ([Named(name)] if options.scenario in (None, name) else []), figures
    if options.scenario in (None, IN_FLIGHT):
        cases["serve"].append(Named(IN_FLIGHT))
    own = {BESIDE: long_running.beside_figures, IN_FLIGHT: in_flight.in_flight_figures}
    parts = options.part or PARTS
    warm_up(world, [*chosen, *(pair.before for pair in cases["together"] if "together" in parts)])
    if options.scenario in (None, BESIDE):
        cases["together"].append(Named(BESIDE))
    n_bad = 0
    for part in parts:
        for case in cases[part]:
            rng = random.Random(f"{options.seed} {part} {case.name}")
            figures = own.get(case.name, run_of[part])(case, world, rng, options)
            result = recorded(options.result)
            of_part = result.setdefault(part, {"scenarios": {}})
            of_part["environment"] = provenance()
            of_part["scenarios"][case.name] = figures
            write_json(options.result, result)
            bad = [found for tally in figures.values() for found in (*tally["lost"], *tally["left"])]
            n_points = sum(tally["points"] for tally in figures.values())
            print(f"{part}, {case.name}: {n_points} points", *bad, sep="\n    ", flush=True)
            n_bad += len(bad)
    return n_bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--scenario")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--calls", type=int, default=10**6, help="most calls of a kind that are struck in a scenario")
    parser.add_argument("--moments", type=int, default=50, help="random moments for each signal in a scenario")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of each two commands at once")
    options = parser.parse_args()
    loaded_with_shim(options.work)
    n_bad = run_parts(options)
    if options.result == RESULT and {"kill", "errors", "bits", "together"} <= set(recorded(RESULT)):
        write_into_readme("fault_injection", summary(recorded(RESULT)))
    raise SystemExit(min(1, n_bad))


if __name__ == "__main__":
    main()
