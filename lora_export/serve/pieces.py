"""The tokens of a request's texts as pieces of text, up to their stop strings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from lora_export.runtime.scheduler import Finish, Token
from lora_export.runtime.text_stream import TextStream
from lora_export.runtime.tokenizer import TextTokenizer
from lora_export.serve.logs import log
from lora_export.serve.problems import Problem
from lora_export.serve.writing import Job, Writer


@dataclass(frozen=True)
class Piece:
    """What a token adds to text `index` of a request; `finish` is set on its last piece."""

    index: int
    text: str
    finish: Finish | None


class _Text:
    """One text: what its tokens say so far."""

    def __init__(self, job: Job, tokenizer: TextTokenizer) -> None:
        self.job, self.finish = job, None
        self.start: list[int] = []
        self._reader = TextStream(tokenizer.decode, job.wish.stop)

    def add(self, token: Token) -> Piece:
        """What `token` adds.

        Raises:
            Problem: It says that there is no text.
        """
        if token.finish is Finish.FAILED:
            raise _failure(self.job, token.error)
        is_word = token.token_id is not None and token.finish is not Finish.STOP and not token.is_start
        text = self._reader.add(token.token_id) if is_word else ""
        if token.finish and not self._reader.is_stopped:
            text += self._reader.end()
        self.finish = Finish.STOP if self._reader.is_stopped else token.finish
        return Piece(self.job.index, text, self.finish)


def _failure(job: Job, error: Exception | None) -> Problem:
    model = job.target.model
    if isinstance(error, FloatingPointError):
        return Problem(500, f"The scores of {model!r} are not finite", code="not_finite")
    log("text failed", level=logging.ERROR, error=error, model=job.target.label)
    return Problem(500, f"A text of {model!r} cannot go on; the server's log says why", code="text_failed")


class Pieces:
    """The pieces of a request's texts, in the order in which their tokens come.

    Attributes:
        n_tokens: How many tokens there were, starts of targets aside.
    """

    def __init__(self, writer: Writer, jobs: Sequence[Job], tokenizer: TextTokenizer) -> None:
        self._writer, self._jobs = writer, jobs
        self._texts = [_Text(job, tokenizer) for job in jobs]
        self.n_tokens = 0

    def start_of(self, index: int) -> list[int]:
        """What the model was given of text `index`'s start after its first part, its own choices among it."""
        return self._texts[index].start

    def cancel(self) -> None:
        """Write no further; nobody waits for it."""
        self._writer.cancel(self._jobs)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        tokens: asyncio.Queue = self._jobs[0].tokens
        while any(text.finish is None for text in self._texts):
            job, token = await tokens.get()
            if isinstance(token, Exception):
                raise token
            text = self._texts[job.index]
            if text.finish is not None:  # a stop string was before it
                continue
            if token.is_start and not token.finish:
                text.start.append(token.token_id)
                continue
            self.n_tokens += token.token_id is not None and not token.is_start
            piece = text.add(token)
            if piece.finish and not token.finish:
                self._writer.cancel([job])
            yield piece
