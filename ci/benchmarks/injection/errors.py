"""Part `errors`: a call fails, as on a disk that is full or broken, or where too many files are open.

At each point: the command ends with one message and exit code 3 or 4, the folder is as it was, and nothing is left
beside it, in the cache or in /tmp. Where the command does without what failed, it ends as if nothing had been.

A fleet that fails may keep what it has done beside its folder, and an adapter that a disk did not give is broken (exit
code 1) while the others are served. Its folder must be whole, and the next run must end as if nothing had been.
"""

from __future__ import annotations

import argparse
import errno
import random
import re
import resource
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from injection.forked import Ended, run, workers_by_fork
from injection.judge import digest, listing, noticed
from injection.kill import Known, Tally, known
from injection.scenarios import Scenario
from injection.shim import Calls, Strike, arm
from injection.world import World

_WRITES = Calls.CREATES | Calls.CHANGES
# By name: which calls fail, with which error, and whether all later ones do as well.
WAYS = {
    "ENOSPC from here on": (_WRITES, errno.ENOSPC, True),
    "EDQUOT from here on": (_WRITES, errno.EDQUOT, True),
    "EIO once": (_WRITES, errno.EIO, False),
    "EMFILE once": (Calls.OPENS | Calls.CREATES, errno.EMFILE, False),
    "EIO of a read": (Calls.READS, errno.EIO, False),
}

_CACHED = re.compile(r"cache/[0-9a-f]{64}\..*")
_MB = 1 << 20
LIMITS = {
    "RLIMIT_FSIZE": (resource.RLIMIT_FSIZE, (1000, 2000, 4000, 10_000, 30_000, 60_000)),
    "RLIMIT_NOFILE": (resource.RLIMIT_NOFILE, tuple(range(12))),
    "RLIMIT_AS": (resource.RLIMIT_AS, (0, _MB, 2 * _MB, 4 * _MB, 8 * _MB, 12 * _MB, 16 * _MB, 32 * _MB, 64 * _MB)),
}


def figures(scenario: Scenario, world: World, rng: random.Random, options: argparse.Namespace) -> dict:
    """What came of each way of failing."""
    found = known(scenario, world)
    tallies = {}
    for name, (calls, number, is_sticky) in WAYS.items():
        folders = (*world.changed, world.root / "sources")
        world.go_back("before")
        n = run(scenario.command, world.root, partial(_armed, folders, Strike(calls, 0))).n_calls
        tally = tallies[name] = Tally()
        for nth in sorted(rng.sample(range(1, n + 1), min(n, options.calls))):
            world.go_back("before")
            listed = listing(world.changed)
            strike = Strike(calls, nth, number, is_signal=False, is_sticky=is_sticky)
            ended = run(scenario.command, world.root, partial(_armed, folders, strike))
            judge(scenario, world, found, listed=listed, ended=ended, tally=tally, point=f"call {nth}")
    for name, (limit, values) in LIMITS.items():
        some = sorted(rng.sample(values, min(len(values), options.calls)))
        tallies[name] = under_limits(scenario, world, found, limit, some)
    return {name: tally.to_dict() for name, tally in tallies.items()}


def under_limits(scenario: Scenario, world: World, found: Known, limit: int, values: Sequence[int]) -> Tally:
    """Run the command under each value of a limit of the system."""
    tally = Tally()
    for value in values:
        world.go_back("before")
        listed = listing(world.changed)
        ended = run(scenario.command, world.root, partial(_limit, limit, value))
        judge(scenario, world, found, listed=listed, ended=ended, tally=tally, point=f"at most {value}")
    return tally


def _armed(folders: Sequence[Path], strike: Strike) -> None:
    """A call of the command fails, or one of a worker of it."""
    workers_by_fork()
    arm(folders, strike)


def _limit(limit: int, value: int) -> None:
    """Files may have `value` bytes; open files and memory may grow by `value` from here."""
    workers_by_fork()
    if limit == resource.RLIMIT_NOFILE:
        value += max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 1
    if limit == resource.RLIMIT_AS:
        value += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(limit, (value, value))


def judge(
    scenario: Scenario, world: World, found: Known, *, listed: list[str], ended: Ended, tally: Tally, point: str
) -> None:
    """Look at what is there and at what was said."""
    state = digest(world.out, with_reports=scenario.with_reports)
    tally.n += 1
    tally.ended[ended.code] += 1
    tally.old += state == found.old
    tally.new += state == found.new
    expected = found.new if ended.code == 0 else found.old
    if state != expected and not (scenario.resumes and ended.code):
        told = ended.output[-600:] + _not_served(world)
        tally.lost.append(f"{point}: ended with {ended.code}, and the folder is not as it should be: {told}")
    if ended.code not in (0, 1, 3, 4) or (ended.code == 1 and not scenario.resumes):
        tally.lost.append(f"{point}: ended with {ended.code}: {ended.output[-600:]}")
    elif "Traceback" in ended.output or ended.hung:
        tally.lost.append(f"{point}: {ended.output[-600:]}")
    elif ended.code in (3, 4) and ended.output.count("error:") != 1:
        tally.lost.append(f"{point}: not one message: {ended.output[-600:]}")
    if scenario.resumes and ended.code:
        listed = list(found.listed)
        if problem := _not_resumed(scenario, world, found):
            tally.lost.append(f"{point}: {problem}")
    now = listing(world.changed)
    left = set(now) - set(found.listed if ended.code == 0 else listed) if now != listed else set()
    if scenario.resumes:  # a graph that was exported anew for what could be read is cached as every graph is
        left = {name for name in left if not _CACHED.fullmatch(name)}
    if left:
        tally.left.append(f"{point}: {', '.join(sorted(left))}")


def _not_resumed(scenario: Scenario, world: World, found: Known) -> str | None:
    """What is wrong with the folder of a fleet that failed, or with what the next run makes of it; None for nothing."""
    if world.out.exists() and (problem := noticed(world.out, None)):
        return problem
    again = run(scenario.again, world.root, workers_by_fork)
    if again.code or digest(world.out, with_reports=scenario.with_reports) != found.new:
        there = ", ".join(sorted(str(path.relative_to(world.out)) for path in world.out.rglob("*")))
        return f"the next run ended with {again.code}, not as if nothing had been ({there}): {again.output[-600:]}"
    return None


def _not_served(world: World) -> str:
    """What a fleet's report says of adapters that it has not."""
    report = world.out / "reports/fleet.csv"
    return report.read_text(encoding="utf-8") if report.is_file() else ""
