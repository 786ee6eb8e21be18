"""`Count`: the tokens of a request whose texts are written."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from lora_export.serve.guard import Seen
from lora_export.serve.models import Target
from lora_export.serve.pieces import Piece, Pieces
from lora_export.serve.service import Service


class Count:
    """The tokens of a request, for its answer, the log and the metrics."""

    def __init__(self, service: Service, seen: Seen, target: Target, *, n_prompt: int) -> None:
        self._metrics, self._seen, self._model = service.metrics, seen, target.label
        self._n_prompt, self._n_written = n_prompt, 0
        self._metrics.tokens.labels(self._label(), "prompt").inc(n_prompt)
        seen.fields["prompt_tokens"] = n_prompt

    async def of(self, pieces: Pieces) -> AsyncIterator[Piece]:
        """`pieces`, counted as they come, also where they are not read to their end."""
        try:
            async for piece in pieces:
                if not self._n_written:
                    seconds = time.monotonic() - self._seen.started
                    self._metrics.first_token_seconds.labels(self._label()).observe(seconds)
                self._n_written = pieces.n_tokens
                yield piece
        finally:
            self._metrics.tokens.labels(self._label(), "completion").inc(pieces.n_tokens)
            self._seen.fields["completion_tokens"] = pieces.n_tokens

    def _label(self) -> str:
        return self._metrics.label(self._model)

    @property
    def usage(self) -> dict:
        return {
            "prompt_tokens": self._n_prompt, "completion_tokens": self._n_written,
            "total_tokens": self._n_prompt + self._n_written,
        }  # fmt: skip
