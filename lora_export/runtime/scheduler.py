"""`Scheduler`: many texts on one decoder, each with its own adapter, which join and leave between steps.

Every step adds one token to each text that has its prompt behind it (continuous batching: Yu et al., Orca, OSDI 2022),
after at most `prefill_chunk` tokens of prompts (chunked prefill: Agrawal et al., arXiv 2308.16369).
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.admission import Admission
from lora_export.runtime.bank import Bank, RowAdapter
from lora_export.runtime.decoder_limits import DecoderLimits
from lora_export.runtime.row_cache import NewTokens, rows_for
from lora_export.runtime.sampling import Sampler, Sampling
from lora_export.runtime.stacking import RowSpec

PREFILL_CHUNK = 256


class Finish(StrEnum):
    """Why a text is over."""

    STOP = "stop"  # an end token, which is the last token
    LENGTH = "length"  # `max_new_tokens`, or no room for more
    CANCELLED = "cancelled"
    FAILED = "failed"  # its scores were not finite, or its adapter cannot be read any more


@dataclass(frozen=True, eq=False)
class Request:
    """A text to be written; two equal ones are two texts.

    Attributes:
        prompt_ids: What it begins with.
        adapter: A name, None, or a blend, of the adapters that were loaded when it was submitted.
        eos_ids: The tokens that end it.
    """

    prompt_ids: tuple[int, ...]
    adapter: RowAdapter
    sampling: Sampling
    max_new_tokens: int
    eos_ids: frozenset[int]


@dataclass(frozen=True)
class Token:
    """What a step gives a request.

    Attributes:
        token_id: None for a request that is over without one (cancelled, failed).
        finish: Set on the last one of a request.
        error: Why it failed.
        is_start: It is no part of the text, but of what a target starts with (encoder-decoders).
    """

    request: Request
    token_id: int | None
    finish: Finish | None = None
    error: Exception | None = None
    is_start: bool = False


@dataclass(eq=False)
class _Text:
    """A request in work; `number` counts them."""

    number: int
    request: Request
    adapters: RowSpec
    gate: np.ndarray | None
    sampler: Sampler
    n_cached: int = 0
    written: list[int] = field(default_factory=list)

    @property
    def is_writing(self) -> bool:
        return self.n_cached >= len(self.request.prompt_ids)

    def next_ids(self, most: int) -> tuple[int, ...]:
        """What is to be cached next: the last token written, or the next of the prompt."""
        if self.is_writing:
            return (self.written[-1],)
        return self.request.prompt_ids[self.n_cached : self.n_cached + most]

    def gate_of(self, n_new: int) -> np.ndarray | None:
        """The gate of the next tokens; an activated LoRA that was invoked by the prompt stays active."""
        if self.gate is None:
            return None
        return self.gate[-1:] if self.is_writing else self.gate[self.n_cached : self.n_cached + n_new]


class Scheduler:
    """Writes the texts of requests with one session.

    `submit`, `cancel` and the counts may be called from any thread, `step` from one thread at a time. A text goes on
    with the adapters that it was begun with, whatever is loaded or unloaded meanwhile.

    Args:
        session: Of a decoder with a cache. Where past and present cannot be one buffer (`CacheLayout.COLUMNS`), every
            step copies the caches.
        max_rows: The most texts at a time.
        max_length: The most tokens of a text. The cache for `max_rows × max_length` is allocated at once, or copied.
        prefill_chunk: The most tokens of prompts in a step.

    Raises:
        UsageProblem: The graph is no decoder with a cache, or takes more than tokens; a number is out of its range.
    """

    def __init__(
        self, session: AdapterSession, *, max_rows: int, max_length: int, prefill_chunk: int = PREFILL_CHUNK
    ) -> None:
        self._limits = DecoderLimits.of(session)
        self._limits.require(max_rows=max_rows, max_length=max_length, prefill_chunk=prefill_chunk)
        self._session = session
        self._chunk = prefill_chunk
        self._rows = rows_for(session, max_rows, max_length)
        self._texts: dict[int, _Text] = {}  # by row
        self._waiting: deque[_Text] = deque()
        self._admission = Admission(max_rows, prefill_chunk, session.provider, has_gaps=not self._rows.can_move)
        self._numbers = itertools.count()
        self._cancelled: set[Request] = set()
        self._changing, self._stepping = threading.Lock(), threading.Lock()

    @property
    def n_active(self) -> int:
        """Texts that have a row."""
        return len(self._texts)

    @property
    def n_waiting(self) -> int:
        """Texts that wait for a row."""
        return len(self._waiting)

    def submit(
        self,
        prompt_ids: Sequence[int],
        adapter: RowAdapter = None,
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int,
        eos_ids: Collection[int] = (),
        bank: Bank | None = None,
    ) -> Request:
        """Queue a text; `step` gives its tokens.

        Args:
            bank: The adapters to choose from: the session's, of an earlier moment; None for those of now.

        Raises:
            UsageProblem: The adapter is not loaded, the prompt is empty, too long, or has a token that the model does
                not know.
        """
        prompt = tuple(map(int, prompt_ids))
        self._limits.require_prompt(prompt, self._rows.longest, max_new_tokens)
        bank = bank or self._session.bank
        (row,) = bank.rows(adapter, 1)
        gate = bank.gate(np.array([prompt]), [row])[0] if bank.contract.gate is not None else None
        sampling = sampling or Sampling()
        request = Request(prompt, adapter, sampling, int(max_new_tokens), frozenset(eos_ids))
        with self._changing:
            self._waiting.append(_Text(next(self._numbers), request, row, gate, Sampler(sampling, prompt)))
        return request

    def cancel(self, request: Request) -> None:
        """End a request; the next step says so. One that is over, or is not of this scheduler, is left alone."""
        with self._changing:
            if any(text.request is request for text in (*self._waiting, *self._texts.values())):
                self._cancelled.add(request)

    def clear(self) -> None:
        """Forget all texts, those that wait too: after a step that raised, which is of all of them."""
        with self._stepping, self._changing:
            self._waiting.clear()
            for row in list(self._texts):
                self._free(row)
            self._cancelled.clear()

    def step(self) -> list[Token]:
        """Write one token of every text that has its prompt behind it, and go on with the prompts of others.

        A text that cannot go on fails alone. What the step raises is of all texts.

        Returns:
            What is new, in no particular order; empty where nothing is to be done, or prompts are not through.
        """
        with self._stepping:
            tokens = self._drop_cancelled()
            self._admit()
            writing = [row for row, text in sorted(self._texts.items()) if text.is_writing]
            for rows in (self._next_prompts(), writing):
                if rows:
                    tokens += self._run(rows)
            self._close_gaps()
        return tokens

    def _drop_cancelled(self) -> list[Token]:
        with self._changing:
            gone = set(self._cancelled)
            self._waiting = deque(text for text in self._waiting if text.request not in gone)
            for row in [row for row, text in self._texts.items() if text.request in gone]:
                self._free(row)
            self._cancelled.clear()
        return [Token(request, None, Finish.CANCELLED) for request in gone]

    def _admit(self) -> None:
        """Give free rows, the lowest first, to those who wait longest; or let some more become free."""
        with self._changing:
            free = [row for row in range(self._rows.n_rows) if row not in self._texts]
            if self._admission.is_due(len(free), [text.request.prompt_ids for text in self._waiting]):
                for row in free[: len(self._waiting)]:
                    self._texts[row] = self._waiting.popleft()

    def _next_prompts(self) -> list[int]:
        """The row of the oldest prompt that is not through; if it begins, others beside it that do not prolong it."""
        reading = {row: text for row, text in self._texts.items() if not text.is_writing}
        if not reading:
            return []
        rows = [min(reading, key=lambda row: reading[row].number)]
        lengths = [len(reading[rows[0]].request.prompt_ids)]
        if reading[rows[0]].n_cached:
            return rows
        while (text := reading.get(rows[-1] + 1)) is not None and not text.n_cached:
            if self._admission.saved(lengths, n_tokens := len(text.request.prompt_ids)) < 0:
                break
            rows.append(rows[-1] + 1)
            lengths.append(n_tokens)
        return rows

    def _run(self, rows: Sequence[int]) -> list[Token]:
        new = []
        for row in rows:
            text = self._texts[row]
            ids = text.next_ids(self._chunk)
            new.append(NewTokens(row, ids, text.adapters, text.gate_of(len(ids))))
        try:
            scores = self._rows.run(new)
        except Exception:
            if not (failed := self._failed(rows)):
                raise
            return failed  # nothing was added to a row: the others go on at the next step
        tokens = []
        for each, of_row in zip(new, scores, strict=True):
            text = self._texts[each.row]
            text.n_cached += len(each.ids)
            if text.is_writing:
                tokens.append(self._written(text, of_row))
                if tokens[-1].finish:
                    with self._changing:
                        self._free(each.row)
        return tokens

    def _failed(self, rows: Sequence[int]) -> list[Token]:
        """End those of `rows` whose adapters cannot be had, such as one whose file is not what it was."""
        tokens = []
        for row in rows:
            text = self._texts[row]
            try:
                self._session.bank.stacked([text.adapters])
            except Exception as error:
                tokens.append(Token(text.request, None, Finish.FAILED, error))
                with self._changing:
                    self._free(row)
        return tokens

    def _written(self, text: _Text, scores: np.ndarray) -> Token:
        request = text.request
        try:
            token = text.sampler.choose(scores)
        except Exception as error:  # of this text, whatever it is
            return Token(request, None, Finish.FAILED, error)
        text.written.append(token)
        if token in request.eos_ids:
            return Token(request, token, Finish.STOP)
        is_full = len(request.prompt_ids) + len(text.written) == self._rows.longest
        return Token(request, token, Finish.LENGTH if is_full or len(text.written) == request.max_new_tokens else None)

    def _close_gaps(self) -> None:
        """Move the last texts to rows that are free before them, so that the rows in use lie side by side."""
        if not self._rows.can_move:
            return
        with self._changing:
            for target in range(self._rows.n_rows):
                last = max(self._texts, default=-1)
                if target < last and target not in self._texts:
                    self._rows.move(last, target)
                    self._texts[target] = self._texts.pop(last)

    def _free(self, row: int) -> None:
        self._cancelled.discard(self._texts.pop(row).request)
        self._rows.free(row)
