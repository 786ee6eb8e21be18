"""`Service`: an export that is served: its models, its queue, its metrics, and how a request waits for its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from starlette.requests import Request

from lora_export.serve.batching import Batcher, Limits, Row
from lora_export.serve.encoders import Encoder
from lora_export.serve.guard import Seen
from lora_export.serve.metrics import Load, Metrics
from lora_export.serve.models import CLASSIFICATION, FEATURES, GENERATION, Models, Target
from lora_export.serve.options import ServeOptions
from lora_export.serve.problems import Problem
from lora_export.serve.runtime_adapters import RuntimeAdapters
from lora_export.serve.schema import Body
from lora_export.serve.writing import Writer

# Above it, tokens are made on another thread: the event loop has other clients to answer.
LONG_TEXT = 20_000
# The path that answers for an export's task.
PATH_OF_TASK = {
    GENERATION: "/v1/completions and /v1/chat/completions",
    CLASSIFICATION: "/v1/classify",
    FEATURES: "/v1/embeddings",
}


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
            self.writer = Writer(
                models, most=options.max_batch, longest=models.longest, max_queue=options.max_queue,
                metrics=self.metrics,
            )  # fmt: skip
        else:
            encoder = Encoder(models, options.pooling, normalize=options.normalize)
            limits = Limits(options.max_batch, options.max_batch_tokens, options.max_queue, options.max_wait_ms / 1000)
            self.batcher = Batcher(encoder.run, limits, self)
        self._engine = self.writer or self.batcher
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

    def target(self, body: Body, request: Request, task: str) -> Target:
        """What a request's model is; notes it for the log.

        Raises:
            Problem: The export is for another task than `task`, or the model is not served.
        """
        seen: Seen = request.state.seen
        if self.models.task != task:
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
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given or not all(map(len, given)):
            raise Problem(400, "An input is empty", param="input", code="empty")
        self.require_room(len(given), "input")
        if isinstance(given[0], str):
            texts = self.models.texts(target.place)
            is_long = sum(map(len, given)) > LONG_TEXT
            found = await asyncio.to_thread(texts.encode, given) if is_long else texts.encode(given)
        else:
            found = [list(ids) for ids in given]
            self._require_tokens(found)
        self._require_length(found, "input")
        return found

    def _require_length(self, rows: Sequence[Sequence[int]], field: str) -> None:
        longest = max(map(len, rows))
        if longest > self.models.longest:
            raise Problem(
                400, f"An input has {longest} tokens; the model takes {self.models.longest}", param=field,
                code="context_length_exceeded",
            )  # fmt: skip

    def require_room(self, n_texts: int, field: str) -> None:
        """Refuse a request of more texts than ever wait, before work is done for them.

        Raises:
            Problem: 400.
        """
        most = self.options.max_queue
        if n_texts > most:
            raise Problem(400, f"The request has {n_texts} texts; at most {most} are taken", param=field)

    async def pairs(self, text: str, others: Sequence[str], target: Target) -> tuple[list, list]:
        """The tokens of `text` with each of `others` behind it, and which of the two each is of.

        Raises:
            Problem: There are none, or a pair is longer than the model takes.
        """
        if not text or not others:
            raise Problem(400, "An input is empty", param="query" if others else "documents", code="empty")
        self.require_room(len(others), "documents")
        texts = self.models.texts(target.place)
        found = await asyncio.to_thread(texts.encode_pairs, text, others)
        self._require_length([ids for ids, _ in found], "documents")
        return [ids for ids, _ in found], [types for _, types in found]

    async def answers(
        self,
        request: Request,
        target: Target,
        rows: Sequence[Sequence[int]],
        *,
        types: Sequence[Sequence[int]] | None = None,
    ) -> list:
        """The answers of an encoder to `rows`, which are pairs of texts where they have `types`.

        Raises:
            Problem: They are not answered.
        """
        seen: Seen = request.state.seen
        n_tokens = sum(map(len, rows))
        seen.fields |= {"rows": len(rows), "prompt_tokens": n_tokens}
        ticket = self.batcher.submit(target.model, rows, seen.deadline, target=target, types=types)
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

    def _require_tokens(self, rows: Sequence[Sequence[int]]) -> None:
        vocabulary = self.models.config.get("vocab_size")
        most = vocabulary if isinstance(vocabulary, int) else 2**31
        wrong = next((token for row in rows for token in row if not 0 <= token < most), None)
        if wrong is not None:
            raise Problem(400, f"{wrong} is no token of this model", param="input", code="bad_token")

    def close(self) -> None:
        """Finish what waits, and end the threads."""
        self._engine.close()


async def disconnected(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
