"""Part `bits`: one bit of one file of an export is flipped; `verify` must notice.

Every byte of a small file, in one of its bits; of larger files as many bytes, at random. An export that was signed is
verified with its key, so that the signature is read too.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

from injection.forked import run
from injection.judge import noticed
from injection.kill import Tally
from injection.scenarios import Scenario
from injection.world import World

_SMALL_BYTES = 1500


def figures(scenario: Scenario, world: World, rng: random.Random, options: argparse.Namespace, public: Path) -> dict:
    """What came of the flipped bits of each file of what `scenario` makes."""
    world.go_back("empty")
    ended = run(scenario.command, world.root)
    if ended.code != 0:
        raise RuntimeError(f"{scenario.name} ended with {ended.code}: {ended.output}")
    key = public if (world.out / "model.sig").exists() else None
    if problem := noticed(world.out, key):
        raise RuntimeError(f"the export is not as it was made: {problem}")
    tallies = {}
    for path in sorted(path for path in world.out.rglob("*") if path.is_file()):
        n_bytes = path.stat().st_size
        positions = range(n_bytes) if n_bytes <= _SMALL_BYTES else sorted(rng.sample(range(n_bytes), _SMALL_BYTES))
        most = min(len(positions), options.calls)
        name = path.relative_to(world.out).as_posix()
        tallies[name] = flipped(path, sorted(rng.sample(positions, most)), rng, lambda: noticed(world.out, key))
    return {name: tally.to_dict() for name, tally in tallies.items()}


def flipped(path: Path, positions: list[int], rng: random.Random, look: Callable[[], str | None]) -> Tally:
    """Flip a bit at each of `positions` in turn; `look` says what is noticed."""
    content, tally = path.read_bytes(), Tally()
    for position in positions:
        bit = rng.randrange(8)
        wrong = bytearray(content)
        wrong[position] ^= 1 << bit
        path.write_bytes(wrong)
        tally.n += 1
        seen = look()
        tally.ended["not noticed" if seen is None else "noticed"] += 1
        if seen is None:
            around = content[max(0, position - 12) : position + 12]
            tally.lost.append(f"byte {position}, bit {bit}: {around!r}")
    path.write_bytes(content)
    return tally
