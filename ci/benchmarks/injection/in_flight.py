"""Part `serve`, requests in flight: a server is ended while clients wait for texts, whole ones and streams.

1. Told to end (SIGTERM, SIGINT): each request that was sent before is answered with its whole text, or refused in
   words; none is cut off. The server ends with 0.
2. Killed: a text is whole and right, or its client sees that it is not.
3. Its folder is as it was, nothing is left, and a server that is started anew at the same port answers as before.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from injection.forked import Ended, Started, start
from injection.judge import digest, listing
from injection.kill import SIGNALS, Tally
from injection.long_running import PROMPT, answer_of, free_port, make_served
from injection.world import World

_MODELS = ("one", "two")
_N_TOKENS = 40
_MOST_SECONDS = 0.6
# What may become of a request besides its text.
REFUSED, CUT = "refused", "cut off"
_PAUSE_SECONDS = 0.005


@dataclass(frozen=True)
class Asked:
    """A request of a client, with what became of it: its text, `REFUSED`, or `CUT`; times are `time.monotonic`'s."""

    model: str
    began: float
    ended: float
    found: str


class _Client(threading.Thread):
    """Asks one thing after another until it is told to stop."""

    def __init__(self, port: int, model: str, *, streams: bool, is_over: threading.Event) -> None:
        super().__init__(daemon=True)
        self._port, self._model, self._streams, self._is_over = port, model, streams, is_over
        self.asked: list[Asked] = []

    def run(self) -> None:
        while not self._is_over.is_set():
            began = time.monotonic()
            found = ask(self._port, self._model, streams=self._streams)
            self.asked.append(Asked(self._model, began, time.monotonic(), found))
            if found in (REFUSED, CUT):
                time.sleep(_PAUSE_SECONDS)


def ask(port: int, model: str, *, streams: bool) -> str:
    """The text that the server on `port` writes, or why there is none."""
    body = {"model": model, "prompt": list(PROMPT), "max_tokens": _N_TOKENS, "temperature": 0, "stream": streams}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        content = answer.read().decode()
    except ConnectionRefusedError:
        return REFUSED
    except (OSError, http.client.HTTPException):
        return CUT
    finally:
        connection.close()
    if answer.status != 200:
        return REFUSED if answer.status == 503 else f"status {answer.status}: {content}"
    if not streams:
        return json.loads(content)["choices"][0]["text"]
    events = [line.removeprefix("data: ") for line in content.splitlines() if line]
    if not events or events[-1] != "[DONE]":
        return CUT
    return "".join(choice["text"] for event in events[:-1] for choice in json.loads(event)["choices"])


def in_flight_figures(case: object, world: World, rng: random.Random, options: argparse.Namespace) -> dict:
    """What came of the requests of a server that was ended at moments by each signal."""
    make_served(world, _MODELS)
    before, listed, port = digest(world.out), listing(world.changed), free_port()
    expected = _expected(world, port)
    figures = {}
    for number in SIGNALS:
        tally, became, n_in_flight = Tally(), Counter(), 0
        for _ in range(options.moments):
            moment = rng.uniform(0, _MOST_SECONDS)
            asked, signalled, ended = _struck(world, port, number, moment)
            point = f"{moment:.3f} s"
            tally.n, tally.old = tally.n + 1, tally.old + (digest(world.out) == before)
            tally.ended[ended.code] += 1
            n_in_flight += sum(each.began < signalled < each.ended for each in asked)
            became.update(each.found if each.found in (REFUSED, CUT) else "whole" for each in asked)
            tally.lost += [f"{point}: {problem}" for problem in problems_of(asked, expected, number, signalled)]
            if ended.code != (-number if number == signal.SIGKILL else 0) or ended.hung or "Traceback" in ended.output:
                tally.lost.append(f"{point}: ended with {ended.code}: {ended.output[-600:]}")
            if digest(world.out) != before:
                tally.lost.append(f"{point}: the folder is another")
            if (again := _expected(world, port)) != expected:
                tally.lost.append(f"{point}: a server that was started anew answers {again!r}")
            if left := set(listing(world.changed)) - set(listed):
                tally.left.append(f"{point}: {', '.join(sorted(left))}")
        figures[f"{number.name} at a moment"] = tally.to_dict() | {"in_flight": n_in_flight, "requests": dict(became)}
    return figures


def problems_of(asked: Sequence[Asked], expected: Mapping[str, str], number: int, signalled: float) -> list[str]:
    """What should not have become of requests, by what each model writes and when signal `number` was sent."""
    found = []
    for each in asked:
        is_text = each.found not in (REFUSED, CUT)
        if is_text and each.found != expected[each.model]:
            found.append(f"{each.model} wrote {each.found!r}")
        elif each.found == CUT and (number != signal.SIGKILL or each.ended < signalled) and each.began < signalled:
            found.append(f"{each.model} was cut off")
        elif each.found == REFUSED and each.ended < signalled:
            found.append(f"{each.model} was refused before the signal")
    return found


def _served(world: World, port: int) -> Started:
    """A server that answers."""
    server = start(("serve", world.out, "--port", port, "--provider", "cpu"), world.root, name="served")
    answer_of(port, _MODELS[0])
    return server


def _expected(world: World, port: int) -> dict[str, str]:
    """What a server that nothing happens to writes, by model."""
    server = _served(world, port)
    found = {model: ask(port, model, streams=False) for model in _MODELS}
    os.kill(server.child, signal.SIGTERM)
    server.ended()
    if len(set(found.values())) < len(_MODELS):
        raise RuntimeError(f"models that write the same tell nothing: {found}")
    return found


def _struck(world: World, port: int, number: int, moment: float) -> tuple[list[Asked], float, Ended]:
    """What clients were answered by a server that got signal `number` after so many seconds, when that was, its end."""
    server, is_over = _served(world, port), threading.Event()
    clients = [_Client(port, model, streams=streams, is_over=is_over) for model in _MODELS for streams in (False, True)]
    for client in clients:
        client.start()
    time.sleep(moment)
    signalled = time.monotonic()
    os.kill(server.child, number)
    ended = server.ended()
    is_over.set()
    for client in clients:
        client.join()
    return [each for client in clients for each in client.asked], signalled, ended
