"""`EventStream`: an answer as server-sent events, which ends when its client goes or its deadline comes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lora_export.errors import LoraExportError
from lora_export.serve.guard import Seen
from lora_export.serve.logs import log
from lora_export.serve.problems import Problem, problem_of

_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class EventStream(Response):
    """Sends what `events` gives, an event each, and `[DONE]`; an error is an event, too.

    Args:
        cancel: Called at the end, however it came.
    """

    def __init__(self, events: AsyncIterator[dict], seen: Seen, cancel: Callable[[], None]) -> None:
        super().__init__()
        self._events, self._seen, self._cancel = events, seen, cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                self._seen.fields["client_left"] = True
        finally:
            for task in (sending, gone):
                task.cancel()
            self._cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sending

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        try:
            async with asyncio.timeout(max(0, self._seen.deadline - time.monotonic())):
                async for event in self._events:
                    await _event(send, json.dumps(event, ensure_ascii=False))
        except TimeoutError:
            await self._problem(send, Problem(504, "The deadline passed before the end", code="deadline"))
        except (Problem, LoraExportError) as error:
            await self._problem(send, problem_of(error))
        except Exception as error:
            log("error", level=logging.ERROR, error=error, id=self._seen.id)
            await self._problem(send, problem_of(error))
        await _event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b""})

    async def _problem(self, send: Send, problem: Problem) -> None:
        self._seen.fields["ended_by"] = problem.code or problem.status
        await _event(send, json.dumps(problem.body))


async def _event(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
