"""Part `errors`: a call fails, as on a disk that is full or broken, or where too many files are open.

At each point: the command ends with one message and exit code 3 or 4, the folder is as it was, and nothing is left
beside it, in the cache or in /tmp. Where the command does without what failed, it ends as if nothing had been.
"""

from __future__ import annotations

import argparse
import errno
import random
import resource
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from injection.forked import Ended, run
from injection.judge import digest, listing
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
        n = run(scenario.command, world.root, partial(arm, folders, Strike(calls, 0))).n_calls
        tally = tallies[name] = Tally()
        for nth in sorted(rng.sample(range(1, n + 1), min(n, options.calls))):
            world.go_back("before")
            listed = listing(world.changed)
            strike = Strike(calls, nth, number, is_signal=False, is_sticky=is_sticky)
            ended = run(scenario.command, world.root, partial(arm, folders, strike))
            judge(world, found, listed, ended, tally, f"call {nth}")
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
        judge(world, found, listed, ended, tally, f"at most {value}")
    return tally


def _limit(limit: int, value: int) -> None:
    """Files may have `value` bytes; open files and memory may grow by `value` from here."""
    if limit == resource.RLIMIT_NOFILE:
        value += max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 1
    if limit == resource.RLIMIT_AS:
        value += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(limit, (value, value))


def judge(world: World, found: Known, listed: list[str], ended: Ended, tally: Tally, point: str) -> None:
    """Look at what is there and at what was said."""
    state = digest(world.out)
    tally.n += 1
    tally.ended[ended.code] += 1
    tally.old += state == found.old
    tally.new += state == found.new
    expected = found.new if ended.code == 0 else found.old
    if state != expected:
        tally.lost.append(f"{point}: ended with {ended.code}, and the folder is not as it should be")
    if ended.code not in (0, 3, 4) or "Traceback" in ended.output or ended.hung:
        tally.lost.append(f"{point}: ended with {ended.code}: {ended.output[-600:]}")
    elif ended.code and ended.output.count("error:") != 1:
        tally.lost.append(f"{point}: not one message: {ended.output[-600:]}")
    now = listing(world.changed)
    left = set(now) - set(found.listed if ended.code == 0 else listed) if now != listed else set()
    if left:
        tally.left.append(f"{point}: {', '.join(sorted(left))}")
