"""A server on a free port of this machine, for tests: its process is this one, its thread its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import numpy as np
import onnxruntime as ort
import openai

from lora_export.serve.logs import NAME
from lora_export.serve.options import ServeOptions
from lora_export.serve.server import Server, listen
from lora_export.serve.service import Service

WAIT_S = 20


@dataclass
class Live:
    """A server that runs.

    Attributes:
        lines: The fields of what it has logged, with their event.
    """

    server: Server
    service: Service
    url: str
    lines: list[dict] = field(default_factory=list)

    def http(self, **options: object) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=WAIT_S, **options)

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S)

    def post(self, path: str, **body: object) -> httpx2.Response:
        with self.http() as client:
            return client.post(path, json=body)

    def metrics(self) -> dict[str, float]:
        """The value of each series, by its name and labels as they stand there."""
        with self.http() as client:
            lines = client.get("/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


class _Lines(logging.Handler):
    def __init__(self, lines: list[dict]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append({"event": record.getMessage(), **getattr(record, "fields", {})})


@contextlib.contextmanager
def running(folder: Path, **options: object) -> Iterator[Live]:
    """A server of `folder` until the end of the block."""
    service = Service(folder, ServeOptions(port=0, provider="cpu", n_threads=1, **options))
    server = Server(service)
    socket = listen("127.0.0.1", 0)
    live = Live(server, service, f"http://127.0.0.1:{socket.getsockname()[1]}")
    logger, handler = logging.getLogger(NAME), _Lines(live.lines)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[socket])), daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield live
    finally:
        server.begin_to_end()
        thread.join(WAIT_S)
        service.close()
        logger.removeHandler(handler)
    assert not thread.is_alive()


def wait_until(holds, seconds: float = WAIT_S) -> None:
    """Return once `holds()` is true."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not come to be in time"
        time.sleep(0.005)


def write_adapter(path: Path, tensors: dict[str, np.ndarray]) -> None:
    adapter = ort.AdapterFormat()
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()})
    adapter.export_adapter(str(path))
