"""The commands that faults are injected into, each with what was there before and what is run after."""

from __future__ import annotations

import importlib
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from injection.forked import run, workers_by_fork
from injection.world import World
from tqdm import tqdm

_HOW = ("--provider", "cpu", "--quiet")
_TASK = ("--task", "text-generation")


@dataclass(frozen=True)
class Scenario:
    """One command.

    Attributes:
        before: Commands that make what is there before.
        command: The command that is struck.
        again: What is run after it was struck, to end as the command would have.
        done: Exit codes of `again` where the struck command had done its work, besides 0.
        cached: Whether its graphs are in the cache before.
        with_reports: Whether what lies in `reports/` is a part of what it makes; a fleet's come after it.
        resumes: Whether it keeps what it has done, for the next run to take up.
    """

    name: str
    before: tuple[tuple[object, ...], ...]
    command: tuple[object, ...]
    again: tuple[object, ...]
    done: tuple[int, ...] = ()
    cached: bool = True
    with_reports: bool = True
    resumes: bool = False


def scenarios(world: World, key: Path) -> tuple[Scenario, ...]:
    """All of them."""
    out, base, one, two, three = world.out, world.base, *map(world.adapter, ("one", "two", "three"))
    other_one = world.adapter("other/one")

    def merge(*adapters: Path) -> tuple[object, ...]:
        return ("merge", base, *adapters, "-o", out, *_TASK, *_HOW)

    def dynamic(*adapters: Path) -> tuple[object, ...]:
        return ("dynamic", base, *adapters, "-o", out, *_TASK, *_HOW)

    def add(*rest: object) -> tuple[object, ...]:
        return ("add", out, *rest, "--quiet")

    over, replace, sign = "--overwrite", "--replace", ("--sign-key", key)
    extract = ("extract", base, world.fine_tuned, "--rank", 2, "-o", out, "--quiet")
    signed = (*dynamic(one, two), *sign)
    fleets = [
        ("fleet", world.roster(name), base, "-o", out, "--workers", 1, "--rows", 2, *_TASK, *_HOW)
        for name in ("roster", "next-roster")
    ]
    return (
        Scenario("merge", (), merge(one), (*merge(one), over)),
        Scenario("merge of kohya's", (), merge(world.foreign), (*merge(world.foreign), over)),
        Scenario("merge --overwrite", (merge(one),), (*merge(two), over), (*merge(two), over)),
        Scenario("dynamic", (), dynamic(one, two), (*dynamic(one, two), over)),
        Scenario("dynamic --sign-key", (), signed, (*signed, over)),
        Scenario("add", (dynamic(one, two),), add(three), add(three, replace)),
        Scenario("add --replace", (dynamic(one, two),), add(other_one, replace), add(other_one, replace)),
        Scenario("add --sign-key", (signed,), (*add(three), *sign), (*add(three, replace), *sign)),
        Scenario("remove", (dynamic(one, two),), ("remove", out, "one"), ("remove", out, "one"), (2,)),
        Scenario("extract", (), extract, (*extract, over)),
        Scenario("dynamic, nothing cached", (), dynamic(one), (*dynamic(one), over), cached=False),
        Scenario("fleet", (), fleets[0], fleets[0], with_reports=False, resumes=True),
        Scenario("fleet, renewed", (fleets[0],), fleets[1], fleets[1], with_reports=False, resumes=True),
    )


def prepared(scenario: Scenario, world: World) -> None:
    """Make what is there before the command, and keep it."""
    world.go_back("empty" if scenario.cached else "nothing")
    for command in scenario.before:
        ended = run(command, world.root, workers_by_fork)
        if ended.code != 0:
            raise RuntimeError(f"{scenario.name}: {command} ended with {ended.code}: {ended.output}")
    world.keep("before")


def warm_up(world: World, chosen: Sequence[Scenario]) -> None:
    """Run all commands once in this process, so that its forks have the libraries loaded and the graphs cached."""
    from lora_export.cli.main import main

    importlib.import_module("lora_export.fleet.worker")  # workers are forks of this process
    tqdm.set_lock(threading.RLock())  # its own is shared by all forks, and stays taken by one that is killed

    for scenario in chosen:
        world.go_back("empty")
        for command in (*scenario.before, scenario.command):
            try:
                main([str(argument) for argument in command])
            except SystemExit as ended:
                if ended.code:
                    raise RuntimeError(f"{scenario.name}: {command} ended with {ended.code}") from ended
        shutil.copytree(world.cache, world.root / "kept" / "empty" / world.cache.name, dirs_exist_ok=True)
