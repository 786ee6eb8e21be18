"""`Writer`: texts of many requests on one scheduler; a thread steps it, and gives each request its tokens."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_export.contract import SINGLE
from lora_export.errors import UsageProblem
from lora_export.runtime.sampling import Sampling
from lora_export.runtime.scheduler import Request, Scheduler, Token
from lora_export.runtime.seq2seq_scheduler import Seq2SeqScheduler
from lora_export.runtime.seq2seq_session import Seq2SeqSession
from lora_export.runtime.target_group import Source
from lora_export.runtime.targets import Start, TargetRules
from lora_export.serve.batching import LEAST_RETRY, MOST_RETRY
from lora_export.serve.limits import most_texts
from lora_export.serve.logs import bare
from lora_export.serve.metrics import Metrics
from lora_export.serve.models import Models, Target
from lora_export.serve.options import ServeOptions
from lora_export.serve.problems import Problem


@dataclass(frozen=True)
class Wish:
    """What a text is to be written by.

    Attributes:
        prompt: Token ids; none for a sound.
        stop: Texts that end it.
        source: Of an encoder-decoder, what its encoder is given, and
        rules: what its configuration says of targets, and
        start: what its target starts with, if not as that says.
    """

    prompt: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    eos_ids: frozenset[int]
    stop: tuple[str, ...] = ()
    source: Source | None = None
    rules: TargetRules | None = None
    start: Start | None = None


@dataclass(eq=False)
class Job:
    """A text that is written for a client's request.

    Attributes:
        index: Its place in the request.
        tokens: Where its tokens come, on `loop`; a request's texts have it in common. An exception in a token's place
            is why there is no text.
    """

    index: int
    target: Target
    wish: Wish
    loop: asyncio.AbstractEventLoop
    tokens: asyncio.Queue[tuple[Job, Token | Exception]]
    request: Request | None = None
    started: float = field(default_factory=time.monotonic)


class Writer:
    """Writes texts until it is closed.

    Args:
        models: Of an export whose models write.
    """

    def __init__(self, models: Models, options: ServeOptions, metrics: Metrics) -> None:
        self._metrics = metrics
        self._most = most_texts(models.manifest, models.config, options, longest=models.longest)
        self._max_queue = options.max_queue
        self._scheduler = _scheduler(models, options, self._most)
        self._changed = threading.Condition()
        self._jobs: dict[Request, Job] = {}
        self._seconds_a_text = 0.0
        self._is_open = True
        self._thread = threading.Thread(target=self._work, name="lora-export-writer", daemon=True)
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        return self._scheduler.n_waiting

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def models(self) -> tuple[list[str], list[str]]:
        """The models of the texts that are written and of those that wait, as often as they are."""
        with self._changed:
            asked = [job.target.model for job in self._jobs.values()]
            n_running = max(0, len(asked) - self._scheduler.n_waiting)
        return asked[:n_running], asked[n_running:]

    def submit(self, target: Target, wishes: Sequence[Wish]) -> list[Job]:
        """Queue the texts of a request: all of them or none. They are the model's as it was when `target` was made.

        Raises:
            Problem: 429 if the queue is full, 503 if the server ends.
            UsageProblem: A prompt or a blend cannot be run.
        """
        target.require_blend()  # before others wait
        loop, tokens = asyncio.get_running_loop(), asyncio.Queue()
        jobs = [Job(index, target, wish, loop, tokens) for index, wish in enumerate(wishes)]
        with self._changed:
            if not self._is_open:
                raise Problem(503, "The server is shutting down", code="draining", retry_after_s=LEAST_RETRY)
            n_waiting = self._scheduler.n_waiting
            if n_waiting + len(jobs) > self._max_queue:
                raise Problem(
                    429, f"{n_waiting} texts are waiting; the queue is full", code="queue_full",
                    retry_after_s=self._retry_after(n_waiting),
                )  # fmt: skip
            try:
                for job in jobs:
                    self._submit(job)
            except UsageProblem:
                self._cancel(jobs)
                raise
            self._changed.notify()
        return jobs

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End texts that nobody waits for; those that are over are left alone."""
        with self._changed:
            self._cancel(jobs)
            self._changed.notify()

    def close(self) -> None:
        """Take nothing more, write what there is, and end the thread."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        self._thread.join()

    def _submit(self, job: Job) -> None:
        wish, target = job.wish, job.target
        how = {"sampling": wish.sampling, "max_new_tokens": wish.max_new_tokens, "eos_ids": wish.eos_ids}
        if isinstance(self._scheduler, Seq2SeqScheduler):
            how |= {"rules": wish.rules, "start": wish.start, "banks": target.banks}
            job.request = self._scheduler.submit(wish.source, target.adapter, **how)
        else:
            job.request = self._scheduler.submit(wish.prompt, target.adapter, bank=target.banks[SINGLE], **how)
        self._jobs[job.request] = job

    def _cancel(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.request in self._jobs:
                self._scheduler.cancel(job.request)

    def _retry_after(self, n_waiting: int) -> int:
        seconds = math.ceil(n_waiting * self._seconds_a_text / self._most)
        return min(MOST_RETRY, max(LEAST_RETRY, seconds))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or not self._is_open)
                if not self._jobs:
                    return
            self._step()

    def _step(self) -> None:
        started = time.monotonic()
        try:
            tokens = self._scheduler.step()
        except Exception as error:  # of a run, which is of all texts: none of them goes on
            self._fail(bare(error))
            return
        for token in tokens:
            if token.error is not None:
                bare(token.error)
        self._give(tokens, time.monotonic() - started)

    def _give(self, tokens: Sequence[Token], seconds: float) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, Token]]] = {}
        models = []
        with self._changed:
            for token in tokens:
                job = self._jobs.pop(token.request, None) if token.finish else self._jobs[token.request]
                if job is None:  # of a run that failed
                    continue
                by_loop.setdefault(job.loop, []).append((job, token))
                models.append(job.target.model)
                if token.finish:
                    self._seconds_a_text += 0.2 * (time.monotonic() - job.started - self._seconds_a_text)
        if models:
            self._metrics.ran(models, seconds)
        for loop, given in by_loop.items():
            _on(loop, given)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            failed = list(self._jobs.values())
            self._jobs.clear()
            self._scheduler.clear()  # no step does it while there is no job, and what waits counts
        for job in failed:
            _on(job.loop, [(job, error)])


def _scheduler(models: Models, options: ServeOptions, most: int) -> Scheduler | Seq2SeqScheduler:
    if isinstance(models.session, Seq2SeqSession):
        return Seq2SeqScheduler(
            models.session, max_rows=most, max_length=models.longest, max_source_tokens=options.max_batch_tokens
        )
    return Scheduler(models.session, max_rows=most, max_length=models.longest)


def _on(loop: asyncio.AbstractEventLoop, given: Sequence[tuple[Job, Token | Exception]]) -> None:
    """Put tokens into their jobs' queues, on their loop."""

    def put() -> None:
        for job, token in given:
            job.tokens.put_nowait((job, token))

    if not loop.is_closed():
        loop.call_soon_threadsafe(put)
