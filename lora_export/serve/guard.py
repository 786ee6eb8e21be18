"""`Guard`: what stands before every request, in this order, and writes one line of the log after it.

1. The `Host` header, where the server is for this machine only and has no key: a web page must not reach it under a
   name of its own (DNS rebinding).
2. There, the page that sends it: a browser sends a form to any site, and says in `Origin` from which page.
3. The key, for all paths under `/v1/`.
4. No new work while the server shuts down.
5. The size of the body, and the time that it takes to come.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_export.serve.logs import log
from lora_export.serve.metrics import NO_MODEL, Metrics
from lora_export.serve.options import ServeOptions
from lora_export.serve.problems import Problem, problem_of

_GUARDED = "/v1/"
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
# What asks every few seconds.
_PROBES = frozenset({"/health", "/ready", "/metrics"})


@dataclass
class Seen:
    """What is known of a request while it is answered; the log and the metrics are made of it.

    Attributes:
        started: In `time.monotonic`'s seconds, and so is `deadline`.
        model: Its label; "none" where the request has come to no model.
        fields: What else the log says.
        n_bytes: Of the request's body.
        at_end: Called when the request is over, whether it was answered or not.
    """

    id: str
    started: float
    deadline: float
    model: str = NO_MODEL
    status: int = 499  # if the client is gone before an answer
    fields: dict[str, object] = field(default_factory=dict)
    n_bytes: int = 0
    at_end: list[Callable[[], None]] = field(default_factory=list)


class Guard:
    """An ASGI application around the API's own."""

    def __init__(self, app: ASGIApp, options: ServeOptions, metrics: Metrics) -> None:
        self._app, self._options, self._metrics = app, options, metrics
        self.n_requests, self.is_draining = 0, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._request(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        now = time.monotonic()
        seen = Seen(uuid.uuid4().hex, now, now + self._options.timeout_s)
        scope.setdefault("state", {})["seen"] = seen
        answer = _Answer(send, seen)
        self.n_requests += 1
        try:
            headers = {key.decode("latin-1"): value for key, value in scope["headers"]}
            self._refuse(scope, headers)
            body = await self._body(receive, headers, seen)
            seen.n_bytes = len(body)
            await self._app(scope, _replayed(body, receive), answer)
        except Problem as problem:
            await answer.problem(problem)
        except Exception as error:  # a defect: the client is told no more than that
            log("error", level=logging.ERROR, error=error, id=seen.id)
            await answer.problem(problem_of(error))
        finally:
            for call in seen.at_end:
                call()
            self.n_requests -= 1
            self._record(scope, seen)

    def _refuse(self, scope: Scope, headers: Mapping[str, bytes]) -> None:
        key = self._options.api_key
        if key is None and self._options.is_local:
            if not _is_local(headers.get("host", b"")):
                said = "The server answers to the names of this machine only, as it has no key"
                raise Problem(421, said, code="host")
            origin = headers.get("origin")
            if origin is not None and not _is_local(origin.rpartition(b"//")[2]):
                raise Problem(403, "The server answers to pages of this machine only, as it has no key", code="origin")
        if not scope["path"].startswith(_GUARDED):
            return
        given = headers.get("authorization", b"").removeprefix(b"Bearer ")
        if key is not None and not hmac.compare_digest(given, key.encode()):
            raise Problem(401, "The key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key")
        if self.is_draining and scope["method"] == "POST":
            raise Problem(503, "The server is shutting down", code="draining", retry_after_s=1)

    async def _body(self, receive: Receive, headers: Mapping[str, bytes], seen: Seen) -> bytes:
        most = self._options.max_body_bytes
        said = headers.get("content-length", b"0")
        if said.isdigit() and int(said) > most:
            raise _too_large(most)
        parts, size, more = [], 0, True
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(0, seen.deadline - time.monotonic()))
            except TimeoutError:
                raise Problem(408, "The request did not arrive in time", code="deadline") from None
            if message["type"] == "http.disconnect":
                raise Problem(499, "The client has gone")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise _too_large(most)
            more = message.get("more_body", False)
        return b"".join(parts)

    def _record(self, scope: Scope, seen: Seen) -> None:
        seconds = time.monotonic() - seen.started
        path = getattr(scope.get("route"), "path", "other")  # of the route: what a client makes up is no label
        model = self._metrics.label(seen.model)
        self._metrics.requests.labels(path, model, str(seen.status)).inc()
        self._metrics.seconds.labels(path, model).observe(seconds)
        if path not in _PROBES:
            log(
                "request", id=seen.id, method=scope["method"], path=path, status=seen.status,
                ms=round(1000 * seconds, 2), model=seen.model, **seen.fields,
            )  # fmt: skip


class _Answer:
    """The way to the client: notes the status, and adds the request's id."""

    def __init__(self, send: Send, seen: Seen) -> None:
        self._send, self._seen, self._has_begun = send, seen, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_begun, self._seen.status = True, message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self._seen.id.encode())]
        await self._send(message)

    async def problem(self, problem: Problem) -> None:
        if self._has_begun:
            return
        body = json.dumps(problem.body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **problem.headers}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self({"type": "http.response.start", "status": problem.status, "headers": raw})
        await self({"type": "http.response.body", "body": body})


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`body` first, then what comes after it: that the client has gone."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def _is_local(host: bytes) -> bool:
    name = host.decode("latin-1").lower()
    return (name if name.endswith("]") else name.rpartition(":")[0] or name) in _LOCAL_NAMES


def _too_large(most: int) -> Problem:
    return Problem(413, f"The request is larger than {most:,} bytes", code="too_large")
