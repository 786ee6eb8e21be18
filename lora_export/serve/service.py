"""`Service`: an export that is served: its models, its queue, its metrics, and how a request waits for its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from starlette.requests import Request

from lora_export.serve.batching import Batcher, Gaps, Limits, Row
from lora_export.serve.encoders import Encoder
from lora_export.serve.guard import Seen
from lora_export.serve.metrics import Load, Metrics
from lora_export.serve.models import Models, Target
from lora_export.serve.options import ServeOptions
from lora_export.serve.problems import Problem
from lora_export.serve.room import Held, Room
from lora_export.serve.runtime_adapters import RuntimeAdapters
from lora_export.serve.schema import Body
from lora_export.serve.tasks import PATH_OF_TASK
from lora_export.serve.writing import Writer

if TYPE_CHECKING:
    from tokenizers import Encoding

# Above it, tokens are made on another thread: the event loop has other clients to answer.
LONG_TEXT = 20_000
# Requests whose images or sounds are unpacked at a time: each takes as much memory as `MOST_PIXELS` do.
_MOST_PREPARING = 2

Made = TypeVar("Made")


class Service:
    """What the routes call.

    Raises:
        LoraExportError: The export cannot be served.
    """

    def __init__(self, folder: Path, options: ServeOptions) -> None:
        options.require_key()
        self.options = options
        self.models = models = Models(folder, options)
        self.metrics = Metrics(self.load, lambda: self.models.view.adapters, models.base)
        self.batcher, self.writer = None, None
        if models.writes:
            self.writer = Writer(models, options, self.metrics)
        else:
            encoder = Encoder(models, options.pooling, normalize=options.normalize)
            most_tokens = min(options.max_batch_tokens, encoder.most_tokens(options.max_cache_bytes))
            limits = Limits(options.max_batch, most_tokens, options.max_queue, options.max_wait_ms / 1000)
            self.batcher = Batcher(encoder.run, limits, self)
        self._engine = self.writer or self.batcher
        self.room = Room(options.max_signal_bytes)
        self._preparing = ThreadPoolExecutor(_MOST_PREPARING, "lora-export-prepare")
        self.is_draining = False
        self.runtime_adapters = None
        if options.runtime_adapters is not None:
            place = options.runtime_adapters.resolve(strict=True)
            self.runtime_adapters = RuntimeAdapters(models, place, options.max_adapter_bytes)

    @property
    def is_alive(self) -> bool:
        return self._engine.is_alive

    @property
    def is_ready(self) -> bool:
        return self.is_alive and not self.is_draining and self._engine.n_waiting < self.options.max_queue

    def load(self) -> Load:
        """What runs and waits now."""
        running, waiting = self._engine.models()
        return Load(running, waiting, self.options.max_batch, self.is_ready)

    def ran(self, rows: Sequence[Row], seconds: float) -> None:
        """Of the batcher: a run is over."""
        self.metrics.ran([row.model for row in rows], seconds)

    def target(self, body: Body, request: Request, *tasks: str) -> Target:
        """What a request's model is; notes it for the log.

        Raises:
            Problem: The export is for another task than `tasks`, or the model is not served.
        """
        seen: Seen = request.state.seen
        if self.models.task not in tasks:
            raise Problem(
                400, f"The export is for {self.models.task}: {PATH_OF_TASK[self.models.task]} answers",
                code="other_task",
            )  # fmt: skip
        target = self.models.view.target(body.model)
        seen.model = target.label
        if self.options.log_prompts:
            seen.fields |= {"request": body.model_dump(exclude_unset=True)}
        return target

    async def rows(self, given: str | Sequence, target: Target) -> list[list[int]]:
        """The tokens of a request's texts, or its token ids.

        Raises:
            Problem: There is nothing, or a row is longer than the model takes.
        """
        given = self.listed(given, "input")
        if isinstance(given[0], str):
            return [each.ids for each in await self.encodings(given, target, "input")]
        found = [list(ids) for ids in given]
        self.require_tokens(found, "input")
        self._require_length(found, "input")
        return found

    def listed(self, given: str | Sequence, field: str) -> Sequence:
        """Texts, or lists of token ids, of a request that may have one of them alone.

        Raises:
            Problem: There is nothing, or there are more than ever wait.
        """
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given or not all(map(len, given)):
            raise Problem(400, f"{'A prompt' if field == 'prompt' else 'An input'} is empty", param=field, code="empty")
        self.require_room(len(given), field)
        return given

    async def encodings(self, given: Sequence[str | tuple[str, str]], target: Target, field: str) -> list[Encoding]:
        """The tokens of texts, or of pairs of them, with the characters that each is of.

        Raises:
            Problem: A row is longer than the model takes.
        """
        texts = target.settings.texts
        is_long = sum(len(part) for each in given for part in each) > LONG_TEXT
        found = await asyncio.to_thread(texts.encodings, given) if is_long else texts.encodings(given)
        self._require_length([each.ids for each in found], field)
        return found

    def _require_length(self, rows: Sequence[Sequence[int]], field: str) -> None:
        longest = max(map(len, rows))
        if longest > self.models.longest:
            raise Problem(
                400, f"An input has {longest} tokens; the model takes {self.models.longest}", param=field,
                code="context_length_exceeded",
            )  # fmt: skip

    def require_room(self, n_texts: int, field: str, *, most: int | None = None, what: str | None = None) -> None:
        """Refuse a request of more texts, or `what` else, than ever wait, or signals than `most`, before work is done.

        Raises:
            Problem: 400.
        """
        what, most = (what or "texts", self.options.max_queue) if most is None else ("inputs", most)
        if n_texts > most:
            raise Problem(400, f"The request has {n_texts} {what}; at most {most} are taken", param=field)

    async def pairs(self, text: str, others: Sequence[str], target: Target) -> tuple[list, list]:
        """The tokens of `text` with each of `others` behind it, and which of the two each is of.

        Raises:
            Problem: There are none, or a pair is longer than the model takes.
        """
        if not text or not others:
            raise Problem(400, "An input is empty", param="query" if others else "documents", code="empty")
        self.require_room(len(others), "documents")
        found = await self.encodings([(text, other) for other in others], target, "documents")
        return [each.ids for each in found], [each.type_ids for each in found]

    async def answers(
        self,
        request: Request,
        target: Target,
        rows: Sequence[Sequence[int]],
        *,
        types: Sequence[Sequence[int]] | None = None,
        signals: Sequence[np.ndarray] | None = None,
        gaps: Sequence[Gaps] | None = None,
    ) -> list:
        """The answers of an encoder to `rows`: pairs of texts where they have `types`, signals, or texts with `gaps`.

        Raises:
            Problem: They are not answered.
        """
        seen: Seen = request.state.seen
        n_tokens = sum(map(len, rows))
        seen.fields |= {"rows": len(rows), "prompt_tokens": n_tokens}
        ticket = self.batcher.submit(
            target.model, rows, seen.deadline, target=target, types=types, signals=signals, gaps=gaps
        )
        answer = asyncio.wrap_future(ticket.future)
        found = await self.answered(request, answer, cancel=lambda: self.batcher.cancel(ticket))
        self.metrics.tokens.labels(self.metrics.label(target.label), "prompt").inc(n_tokens)
        return found

    async def answered(self, request: Request, answer: asyncio.Future, cancel: Callable[[], None]) -> list:
        """What `answer` gives before the deadline, while the client is there.

        Args:
            cancel: Called if nobody waits for it any more.

        Raises:
            Problem: The deadline has come, or the client has gone.
        """
        seen: Seen = request.state.seen
        gone = asyncio.ensure_future(disconnected(request))
        left = max(0, seen.deadline - time.monotonic())
        try:
            done, _ = await asyncio.wait({answer, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not answer.done():
                answer.cancel()
                cancel()
        if answer in done:
            return answer.result()
        if gone in done:
            raise Problem(499, "The client has gone")
        raise Problem(504, f"There was no answer within {self.options.timeout_s:g} s", code="deadline")

    async def prepared(self, request: Request, make: Callable[[Held], Made]) -> Made:
        """What `make` gives, on one of a few threads, before the deadline and while the client is there.

        Args:
            make: Given what the request holds, its body until now, which it keeps until it is over; it takes what it
                makes, and asks now and then whether anybody waits.

        Raises:
            Problem: The deadline has come, the client has gone, or there is no room.
        """
        seen: Seen = request.state.seen
        held = self.room.held()
        seen.at_end.append(held.give_back)
        held.take(seen.n_bytes)
        waiting = [make]  # the executor keeps a job that was cancelled until its turn, but not what it works on
        job = self._preparing.submit(lambda: waiting.pop()(held))
        job.add_done_callback(lambda _: waiting.clear())
        held.used_by(job)
        return await self.answered(request, asyncio.wrap_future(job), cancel=held.give_back)

    def require_tokens(self, rows: Sequence[Sequence[int]], field: str) -> None:
        """Refuse token ids that the model does not know.

        Raises:
            Problem: 400.
        """
        vocabulary = self.models.config.get("vocab_size")
        most = vocabulary if isinstance(vocabulary, int) else 2**31
        wrong = next((token for row in rows for token in row if not 0 <= token < most), None)
        if wrong is not None:
            raise Problem(400, f"{wrong} is no token of this model", param=field, code="bad_token")

    def close(self) -> None:
        """Finish what waits, and end the threads."""
        self._engine.close()
        self._preparing.shutdown(cancel_futures=True)


async def disconnected(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def usage_of(rows: Sequence[Sequence[int]]) -> dict:
    """The tokens of an encoder's rows, as OpenAI's API counts them."""
    n_tokens = sum(map(len, rows))
    return {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
