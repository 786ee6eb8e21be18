"""Part `kill`: each command is ended at each call that changes a file, and at random moments.

At each point: the folder is the old one or the new one, whole; the command, run again, ends as it would have; and
nothing is left in the folder beside it, in the cache or in /tmp. The signature of a signed export is verified.
"""

from __future__ import annotations

import argparse
import random
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from injection.forked import Ended, run, workers_by_fork
from injection.judge import digest, listing, noticed
from injection.scenarios import Scenario, prepared
from injection.shim import ALL_CHANGES, Strike, arm
from injection.world import World

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Known:
    """A scenario's outputs before and after, and what its folders hold when nothing was struck."""

    old: str | None
    new: str
    listed: tuple[str, ...]
    n_calls: int
    seconds: float


@dataclass
class Tally:
    """What the points of one scenario and one way of ending came to.

    Attributes:
        ended: How often the struck command ended with which code.
        old, new: How often the folder was the one before or the one after.
        lost: Points where it was neither, or the next run did not mend it, with what was found.
        left: Points after which something still lay about, with what.
    """

    n: int = 0
    old: int = 0
    new: int = 0
    ended: Counter = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        ended = {str(code): n for code, n in sorted(self.ended.items())}
        counts = {"points": self.n, "old": self.old, "new": self.new, "ended": ended}
        return counts | {"lost": self.lost, "left": self.left}


def figures(scenario: Scenario, world: World, rng: random.Random, options: argparse.Namespace) -> dict:
    """What came of each way of ending it: SIGKILL at each call, the others at some, all at random moments."""
    found = known(scenario, world)
    calls = range(1, found.n_calls + 1)
    tallies = {}
    for number in SIGNALS:
        most = min(options.calls, len(calls) if number == signal.SIGKILL else len(calls) // 2)
        tallies[f"{number.name} at a call"] = at_calls(scenario, world, found, number, sorted(rng.sample(calls, most)))
        tallies[f"{number.name} at a moment"] = at_moments(scenario, world, found, number, rng, options.moments)
    return {name: tally.to_dict() for name, tally in tallies.items()}


def known(scenario: Scenario, world: World) -> Known:
    """Run the scenario once without a strike; its folder is kept as it was before."""
    prepared(scenario, world)
    old = digest(world.out, with_reports=scenario.with_reports)
    ended = run(scenario.command, world.root, partial(_armed, world, Strike(ALL_CHANGES, 0)))
    if ended.code != 0:
        raise RuntimeError(f"{scenario.name} ended with {ended.code}: {ended.output}")
    new = digest(world.out, with_reports=scenario.with_reports)
    return Known(old, new, tuple(listing(world.changed)), ended.n_calls, ended.seconds)


def at_calls(scenario: Scenario, world: World, found: Known, number: int, calls: Sequence[int]) -> Tally:
    """End the command by signal `number` at each of `calls`."""
    tally = Tally()
    for nth in calls:
        world.go_back("before")
        strike = partial(_armed, world, Strike(ALL_CHANGES, nth, number))
        judge(scenario, world, found, run(scenario.command, world.root, strike), tally, f"call {nth}")
    return tally


def at_moments(scenario: Scenario, world: World, found: Known, number: int, rng: random.Random, n: int) -> Tally:
    """End the command by signal `number` at `n` random moments."""
    tally = Tally()
    for _ in range(n):
        world.go_back("before")
        moment = rng.uniform(0, found.seconds)
        ended = run(scenario.command, world.root, workers_by_fork, signal_after=(number, moment))
        judge(scenario, world, found, ended, tally, f"{moment:.3f} s")
    return tally


def judge(scenario: Scenario, world: World, found: Known, ended: Ended, tally: Tally, point: str) -> None:
    """Look at what is there, run the command again, and look once more."""
    state = digest(world.out, with_reports=scenario.with_reports)
    tally.n += 1
    tally.ended[ended.code] += 1
    tally.old += state == found.old
    tally.new += state == found.new
    if state not in (found.old, found.new):
        tally.lost.append(f"{point}: neither the old nor the new: {', '.join(listing([world.out]))}")
    if problem := wrong_signature(world):
        tally.lost.append(f"{point}: {problem}")
    if "Traceback" in ended.output or ended.hung:
        tally.lost.append(f"{point}: {'hung: ' * ended.hung}{ended.output[-2000:]}")
    again = run(scenario.again, world.root, workers_by_fork)
    if again.code != 0 and not (state == found.new and again.code in scenario.done):
        tally.lost.append(f"{point}: the next run ended with {again.code}: {again.output[-600:]}")
    elif digest(world.out, with_reports=scenario.with_reports) != found.new:
        tally.lost.append(f"{point}: the next run made something else")
    if problem := wrong_signature(world):
        tally.lost.append(f"{point}: after the next run: {problem}")
    left = set(listing(world.changed)) - set(found.listed)
    if left:
        tally.left.append(f"{point}: {', '.join(sorted(left))}")


def wrong_signature(world: World) -> str | None:
    """What `verify` says against a signed export; None for nothing, or where none is signed."""
    return noticed(world.out, world.public_key) if (world.out / "model.sig").is_file() else None


def _armed(world: World, strike: Strike) -> None:
    """Strike a command at its calls, or a worker of it at its own."""
    workers_by_fork()
    arm(world.changed, strike)
