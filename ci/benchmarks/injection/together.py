"""Part `together`: two commands at once on one folder, or with one cold cache, begun a random moment apart.

One waits for the other or is refused; the folder is what one of them, or both after each other, would have made.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from injection.forked import Ended, run, start
from injection.judge import digest, listing
from injection.kill import Tally
from injection.scenarios import Scenario, prepared
from injection.world import World

_REFUSED = 4


@dataclass(frozen=True)
class Pair:
    """Two commands, and the exit codes that each may have.

    Attributes:
        outcomes: Commands that, run one after the other, make what the folder may be afterwards; one for each outcome.
    """

    name: str
    before: Scenario
    one: tuple[object, ...]
    other: tuple[object, ...]
    codes: tuple[int, ...]
    outcomes: tuple[tuple[tuple[object, ...], ...], ...]


def pairs(world: World, by_name: dict[str, Scenario]) -> tuple[Pair, ...]:
    """All of them."""
    over, add, replace = by_name["merge --overwrite"], by_name["add"], by_name["add --replace"]
    first, cold = (*over.before[0], "--overwrite"), by_name["dynamic, nothing cached"]
    late = ("add", world.out, world.adapter("other/one"), "--name", "late", "--quiet")
    elsewhere = tuple(world.place / "other" if part == world.out else part for part in cold.command)
    anew = (*add.before[0], "--overwrite")
    check = ("check", world.out, "--quiet", "--provider", "cpu")
    return (
        Pair("two exports to one folder", over, first, over.command, (0, _REFUSED), ((first,), (over.command,))),
        Pair("two adapters added", add, add.command, late, (0,), ((add.command, late), (late, add.command))),
        Pair("an export where one is added", add, add.command, anew, (0, _REFUSED), ((add.command,), (anew,))),
        Pair("two with one cold cache", cold, cold.command, elsewhere, (0,), ((cold.command,),)),
        Pair("check where one is replaced", replace, check, replace.command, (0, 1), ((replace.command,),)),
    )  # fmt: skip


def figures(pair: Pair, world: World, rng: random.Random, options: argparse.Namespace) -> dict:
    """What came of so many rounds."""
    prepared(pair.before, world)
    possible, seconds = [], 0.0
    for commands in pair.outcomes:
        world.go_back("before")
        for command in commands:
            ended = run(command, world.root)
            if ended.code != 0:
                raise RuntimeError(f"{pair.name}: {command} ended with {ended.code}: {ended.output}")
            seconds = max(seconds, ended.seconds)
        possible.append(digest(world.out, with_reports=False))
    tally = Tally()
    for _ in range(options.rounds):
        world.go_back("before")
        listed = {*listing(world.changed), "place/out", "place/other"}
        apart = rng.uniform(0, seconds)
        first = start(pair.one, world.root, name="one")
        time.sleep(apart)
        second = start(pair.other, world.root, name="other")
        _judge(pair, world, (first.ended(), second.ended()), possible, listed, tally, f"{apart:.3f} s apart")
    return {"rounds": tally.to_dict()}


def _judge(
    pair: Pair, world: World, both: Sequence[Ended], possible: list, listed: set[str], tally: Tally, point: str
) -> None:
    tally.n += 1
    tally.ended[" and ".join(str(ended.code) for ended in both)] += 1
    for ended in both:
        if ended.code not in pair.codes or ended.hung:
            tally.lost.append(f"{point}: ended with {ended.code}: {ended.output[-600:]}")
    if all(ended.code for ended in both):  # a check's verdict is 0 or 1, as it is alone
        tally.lost.append(f"{point}: both were refused")
    elif digest(world.out, with_reports=False) not in possible:
        tally.lost.append(f"{point}: the folder is what neither order makes")
    left = [name for name in listing(world.changed) if name not in listed and not name.startswith("cache/")]
    left += [name for name in listing([world.cache]) if name.startswith("cache/.")]
    if left:
        tally.left.append(f"{point}: {', '.join(left)}")
