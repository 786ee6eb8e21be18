"""Clients of a served export for ci/benchmarks/serving.py: OpenAI's own, in one process with an event loop."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import numpy as np
import openai
from processes import anonymous_bytes
from serving_models import N_TOKENS, Served, distance

# An embedding's numbers differ by this much between batches, at most.
TOLERANCE = 1e-5


@dataclass
class Outcome:
    """What came of requests.

    Attributes:
        n_right: Answers that are those of their adapter.
        n_wrong: Answers that are not.
        refused: Refusals that were to be expected, by status.
        lost: Requests without the answer or the refusal that they should have, by what came instead.
        worst: The largest distance of a right answer.
        seconds: The latency of each right answer.
    """

    n_right: int = 0
    n_wrong: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def as_json(self, elapsed: float) -> dict:
        times = sorted(self.seconds) or [0.0]
        return {
            "right": self.n_right, "wrong": self.n_wrong, "refused_as_expected": dict(self.refused),
            "lost": dict(self.lost), "largest_difference": self.worst, "seconds": elapsed,
            "requests_per_second": self.n_right / elapsed,
            "median_ms": 1000 * times[len(times) // 2], "p99_ms": 1000 * times[int(0.99 * (len(times) - 1))],
        }  # fmt: skip


@dataclass(frozen=True)
class Process:
    """A server in a process of its own."""

    url: str
    pid: int

    @property
    def n_bytes(self) -> int:
        """Memory that it has allocated."""
        return anonymous_bytes(self.pid) or 0

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def metric(self, name: str) -> float:
        text = httpx2.get(f"{self.url}/metrics").text
        return float(re.search(rf"^{re.escape(name)} (.*)$", text, re.MULTILINE)[1])


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Process]:
    """The command `lora-export serve` on `folder`."""
    command = [sys.executable, "-m", "lora_export.cli.main", "serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        line = process.stderr.readline()
        url = re.search(r"http://\S+", line)
        if url is None:
            raise RuntimeError(line + process.stderr.read())
        # Its log is read, or it would wait for a reader.
        threading.Thread(target=lambda: [None for _ in process.stderr], daemon=True).start()
        yield Process(url[0], process.pid)
        process.send_signal(signal.SIGTERM)
        if (code := process.wait(60)) != 0:
            raise RuntimeError(f"the server ended with {code}")
    finally:
        process.kill()
        process.wait()


async def ask(client: openai.AsyncOpenAI, served: Served, model: str, index: int) -> np.ndarray | list[int]:
    """What `model` answers to a question."""
    question = served.questions[index]
    if isinstance(question, str):
        found = await client.embeddings.create(model=model, input=question)
        return np.array(found.data[0].embedding, np.float32)
    found = await client.completions.create(
        model=model, prompt=list(question), max_tokens=N_TOKENS, extra_body={"ignore_eos": True}
    )
    return [int(word[1:]) for word in found.choices[0].text.split()]


async def checked(client: openai.AsyncOpenAI, served: Served, outcome: Outcome, *, model: str, like: str, index: int):
    """Ask `model`, and compare with what adapter `like` says alone."""
    began = time.perf_counter()
    try:
        found = await ask(client, served, model, index)
    except openai.APIError as error:
        outcome.lost[type(error).__name__] += 1
        return
    outcome.seconds.append(time.perf_counter() - began)
    far = distance(found, served.answers[like, index])
    if far > (TOLERANCE if isinstance(found, np.ndarray) else 0):
        outcome.n_wrong += 1
    else:
        outcome.n_right += 1
        outcome.worst = max(outcome.worst, far)


async def refused(call, outcome: Outcome, status: int) -> None:
    """Await `call`, which is to be refused with `status`."""
    try:
        await call
    except openai.APIStatusError as error:
        kind = outcome.refused if error.status_code == status else outcome.lost
        kind[str(error.status_code)] += 1
    except openai.APIError as error:
        outcome.lost[type(error).__name__] += 1
    else:
        outcome.n_wrong += 1


async def mixed(process: Process, served: Served, *, n_clients: int, seconds: float) -> tuple[Outcome, float]:
    """`n_clients` that ask one question after another, of all adapters in turn; the outcome and the time it took."""
    outcome, until = Outcome(), time.monotonic() + seconds
    turns = itertools.cycle(itertools.product(range(len(served.questions)), served.adapters))

    async def client_asks(client: openai.AsyncOpenAI) -> None:
        while time.monotonic() < until:
            index, name = next(turns)
            await checked(client, served, outcome, model=name, like=name, index=index)

    began = time.monotonic()
    async with process.client() as client:
        await asyncio.gather(*(client_asks(client) for _ in range(n_clients)))
    return outcome, time.monotonic() - began


async def cycle(client: openai.AsyncOpenAI, served: Served, outcome: Outcome, *, number: int, asks: bool) -> None:
    """Load an adapter under a new name, ask it, unload it."""
    like = served.adapters[number % len(served.adapters)]
    body = {"lora_name": f"new{number}", "lora_path": f"adapters/{like}.onnx_adapter"}
    try:
        await client.post("/load_lora_adapter", body=body, cast_to=str)
        if asks:
            index = number % len(served.questions)
            await checked(client, served, outcome, model=body["lora_name"], like=like, index=index)
        await client.post("/unload_lora_adapter", body={"lora_name": body["lora_name"]}, cast_to=str)
    except openai.APIError as error:
        outcome.lost[type(error).__name__] += 1


async def dies(process: Process, served: Served, number: int) -> None:
    """A client that leaves: before its request is whole, or before its answer is."""
    host, port = process.url.removeprefix("http://").split(":")
    path, key = ("embeddings", "input") if isinstance(served.questions[0], str) else ("completions", "prompt")
    question = served.questions[number % len(served.questions)]
    given = f'"{question}"' if isinstance(question, str) else str(list(question))
    body = f'{{"model": "{served.adapters[0]}", "{key}": {given}}}'.encode()
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with suppress(OSError):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(request if number % 2 else request[:-9])
        await writer.drain()
        await asyncio.sleep(0.002 * (number % 4))
        writer.transport.abort()


async def churning(process: Process, served: Served, *, n_clients: int, seconds: float) -> tuple[Outcome, float]:
    """`mixed`, while adapters come and go, clients die, a poisoned adapter is offered and unknown names are asked."""
    until, outcome = time.monotonic() + seconds, Outcome()

    async def others(client: openai.AsyncOpenAI) -> None:
        for number in itertools.count():
            if time.monotonic() > until:
                return
            await cycle(client, served, outcome, number=number, asks=True)
            poisoned = {"lora_name": "poisoned", "lora_path": "adapters/poisoned.onnx_adapter"}
            await refused(client.post("/load_lora_adapter", body=poisoned, cast_to=str), outcome, 400)
            for model in (f"new{number}", "poisoned", "unknown"):
                await refused(ask(client, served, model, 0), outcome, 404)
            await asyncio.gather(*(dies(process, served, number + n) for n in range(4)))

    began = time.monotonic()
    async with process.client() as client:
        (found, _), _ = await asyncio.gather(
            mixed(process, served, n_clients=n_clients, seconds=seconds), others(client)
        )
    found.n_right += outcome.n_right
    found.n_wrong += outcome.n_wrong
    found.refused += outcome.refused
    found.lost += outcome.lost
    found.worst = max(found.worst, outcome.worst)
    return found, time.monotonic() - began
