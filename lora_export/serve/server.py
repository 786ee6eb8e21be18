"""Serve until SIGTERM or SIGINT, and end without losing a request.

On the first signal the server is no longer ready and takes no new work, but still answers on its port, so that a load
balancer can see it. Once the requests that it has are answered, or `drain_s` is over, it ends. A second signal ends it
at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from lora_export.runtime.targets import settings_not_done
from lora_export.serve import logs
from lora_export.serve.api import build
from lora_export.serve.guard import Guard
from lora_export.serve.options import ServeOptions
from lora_export.serve.service import Service

_POLL_S = 0.05
_BACKLOG = 2048
# After the last answer: what a client still reads.
_CLOSING_S = 2


def serve(folder: Path, options: ServeOptions, say: Callable[[str], None]) -> None:
    """Serve the export in `folder` until it is told to end.

    Args:
        say: Told once where it listens.

    Raises:
        LoraExportError: The export cannot be served.
        OSError: The address cannot be used.
    """
    listening = listen(options.host, options.port)  # first: an address in use costs no time
    with listening:
        service = Service(folder, options)
        try:
            _collect_often()
            logs.set_up(sys.stderr)
            host, port = listening.getsockname()[:2]
            say(_greeting(service, host, port))
            logs.log("serving", host=host, port=port, adapters=len(service.models.view.adapters))
            Server(service).run(sockets=[listening])
        finally:
            service.close()
    logs.log("ended")


def _collect_often() -> None:
    """Requests leave garbage in cycles, which exports let Python look for seldom; what is there now stays."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 10, 10)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; what comes before the server is ready waits.

    Raises:
        OSError: The address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With TCP named, asyncio turns Nagle's algorithm off; without, an answer waits 40 ms for an acknowledgement.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError:
        listening.close()
        raise
    listening.listen(_BACKLOG)
    return listening


class Server(uvicorn.Server):
    """uvicorn, with an end that takes the time of its requests."""

    def __init__(self, service: Service) -> None:
        options = service.options
        self.service, self.guard = service, build(service)
        super().__init__(
            uvicorn.Config(
                self.guard, options.host, options.port, log_config=None, access_log=False, ws="none",
                server_header=False, timeout_graceful_shutdown=_CLOSING_S, lifespan="off",
            )
        )  # fmt: skip

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On a signal: drain, or end at once if that is under way."""
        if self.service.is_draining:
            self.should_exit = self.force_exit = True
            return
        self.begin_to_end()

    def begin_to_end(self) -> None:
        """Take no new work; end when what there is is done. From any thread."""
        self.service.is_draining = self.guard.is_draining = True
        logs.log("draining", requests=self.guard.n_requests)

    async def main_loop(self) -> None:
        """As uvicorn's, and the watch over the end."""
        watch = asyncio.ensure_future(self._drained(self.guard))
        try:
            await super().main_loop()
        finally:
            watch.cancel()

    async def _drained(self, guard: Guard) -> None:
        while not self.service.is_draining:
            await asyncio.sleep(_POLL_S)
        until = asyncio.get_running_loop().time() + self.service.options.drain_s
        while guard.n_requests and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(_POLL_S)
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a drained server ends with exit code 0: the signal is not raised again."""
        try:
            before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not on the main thread: a test's
            yield
            return
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def _greeting(service: Service, host: str, port: int) -> str:
    view, options = service.models.view, service.options
    names = ", ".join(view.adapters) or "no adapters"
    address = f"[{host}]" if ":" in host else host
    lines = [f"serving {view.base} with {names} on http://{address}:{port} ({view.session.provider})"]
    if service.models.writes and (ignored := settings_not_done(service.models.settings.voice.defaults)):
        asked = ", ".join(f"{name}={value}" for name, value in ignored.items())
        lines.append(f"texts are greedy or sampled: {asked} of the export's configuration has no effect")
    if not options.is_local and options.api_key is None:
        lines.append("anyone who reaches this address may use it: --api-key asks for a key")
    return "\n".join(lines)
