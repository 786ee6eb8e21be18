"""Parts `fleet` and `serve`: commands that go on for long are ended at random moments.

1. A fleet: what lies in its folder afterwards is an export whose every file is as its manifest says, or none. The next
   run finishes: it makes what a run that was not ended makes, and nothing is left beside it.
2. A server: its folder is untouched, and it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

import tokenizers
from injection.forked import Ended, run, start
from injection.judge import digest, listing
from injection.kill import SIGNALS, Tally
from injection.world import World

# No end token is in it, which a model with tied embeddings likes to repeat.
PROMPT = (5, 9)


def fleet_figures(case: object, world: World, rng: random.Random, options: argparse.Namespace) -> dict:
    """What came of a fleet that was ended at moments by each signal."""
    how = ("--provider", "cpu", "--quiet", "--workers", 1, "--rows", 2, "--task", "text-generation")
    command = ("fleet", world.roster("roster"), world.base, "-o", world.out, *how)
    world.go_back("empty")
    whole = _must_end(run(command, world.root))
    expected, listed = digest(world.out, with_reports=False), listing(world.changed)
    tallies = {}
    for number in SIGNALS:
        tally = tallies[f"{number.name} at a moment"] = Tally()
        for _ in range(options.moments):
            world.go_back("empty")
            moment = rng.uniform(0, whole.seconds)
            ended = run(command, world.root, signal_after=(number, moment))
            point = f"{moment:.3f} s"
            tally.n += 1
            tally.ended[ended.code] += 1
            found = digest(world.out, with_reports=False)
            tally.old, tally.new = tally.old + (found is None), tally.new + (found == expected)
            if "Traceback" in ended.output or ended.hung:
                tally.lost.append(f"{point}: {ended.output[-900:]}")
            _judge_whole(world, tally, point)
            again = run(command, world.root)
            if again.code != 0 or digest(world.out, with_reports=False) != expected:
                tally.lost.append(f"{point}: the next run ended with {again.code}: {again.output[-600:]}")
            if left := set(listing(world.changed)) - set(listed):
                tally.left.append(f"{point}: {', '.join(sorted(left))}")
    return {way: tally.to_dict() for way, tally in tallies.items()}


def _judge_whole(world: World, tally: Tally, point: str) -> None:
    """Note whatever file of an export is not as its manifest says."""
    from lora_export.artifact import MANIFEST
    from lora_export.integrity.verify import verify

    if (world.out / MANIFEST).is_file() and (problems := verify(world.out).problems):
        tally.lost.append(f"{point}: {'; '.join(f'{each.kind} {each.name}' for each in problems)}")


def serve_figures(case: object, world: World, rng: random.Random, options: argparse.Namespace) -> dict:
    """What came of a server that was ended at moments by each signal."""
    make_served(world)
    before, listed = digest(world.out), listing(world.changed)
    tallies = {}
    for number in SIGNALS:
        tally = tallies[f"{number.name} at a moment"] = Tally()
        for _ in range(options.moments):
            moment = rng.uniform(0, 4)
            ended = run(("serve", world.out, "--port", free_port(), "--provider", "cpu"), world.root,
                        signal_after=(number, moment))  # fmt: skip
            tally.n, tally.old = tally.n + 1, tally.old + (digest(world.out) == before)
            tally.ended[ended.code] += 1
            if digest(world.out) != before or "Traceback" in ended.output or ended.hung:
                tally.lost.append(f"{moment:.3f} s: {ended.output[-900:]}")
            if number != signal.SIGKILL and ended.code not in (0, 130, 143):
                tally.lost.append(f"{moment:.3f} s: ended with {ended.code}: {ended.output[-600:]}")
            if left := set(listing(world.changed)) - set(listed):
                tally.left.append(f"{moment:.3f} s: {', '.join(sorted(left))}")
    return {way: tally.to_dict() for way, tally in tallies.items()}


def _must_end(ended: Ended) -> Ended:
    if ended.code != 0:
        raise RuntimeError(f"ended with {ended.code}: {ended.output}")
    return ended


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def beside_figures(case: object, world: World, rng: random.Random, options: argparse.Namespace) -> dict:
    """What came of `add` while a server of the same folder answers: it answers on as it did, and the folder is new."""
    make_served(world)
    world.keep("before")
    add = ("add", world.out, world.adapter("two"), "--quiet")
    _must_end(run(add, world.root))
    expected, listed, tally = digest(world.out), listing(world.changed), Tally()
    for _ in range(options.rounds):
        world.go_back("before")
        port = free_port()
        server = start(("serve", world.out, "--port", port, "--provider", "cpu"), world.root, name="served")
        first = answer_of(port, "one")
        added = start(add, world.root, name="added")
        time.sleep(rng.uniform(0, 1))
        during, ended = answer_of(port, "one"), added.ended()
        after = answer_of(port, "one")
        os.kill(server.child, signal.SIGTERM)
        served = server.ended()
        tally.n += 1
        tally.ended[f"{served.code} and {ended.code}"] += 1
        if not first or {first, during, after} != {first} or ended.code or served.code or digest(world.out) != expected:
            tally.lost.append(f"{first!r}, {during!r}, {after!r}: {ended.output[-300:]} {served.output[-300:]}")
        if left := set(listing(world.changed)) - set(listed):
            tally.left.append(", ".join(sorted(left)))
    return {"rounds": tally.to_dict()}


def make_served(world: World, names: Sequence[str] = ("one",)) -> None:
    """An export of a base with a tokenizer, and of the adapters of these names."""
    base, how = world.root / "sources" / "base-of-words", ("--provider", "cpu", "--quiet", "--task", "text-generation")
    shutil.copytree(world.base, base, dirs_exist_ok=True)
    words = {"<unk>": 0, "one": 1, "two": 2} | {f"word{n}": n for n in range(3, world.n_tokens)}
    words = tokenizers.models.WordLevel(words, unk_token="<unk>")
    tokenizers.Tokenizer(words).save(str(base / "tokenizer.json"))
    world.go_back("empty")
    adapters = map(world.strong_adapter, names)
    _must_end(run(("dynamic", base, *adapters, "-o", world.out, *how), world.root))


def answer_of(port: int, model: str) -> str:
    """What the server on `port` writes, once it listens; "" if it does not within a minute."""
    body = json.dumps({"model": model, "prompt": list(PROMPT), "max_tokens": 4, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"}
    )
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["choices"][0]["text"] or "nothing"
        except ConnectionRefusedError:
            pass
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                return str(error)
        time.sleep(0.1)
    return ""
