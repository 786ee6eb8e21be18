"""`Admission`: when free rows of a scheduler are given to the texts that wait.

A run reads all weights, whether it has one short prompt or several. So where more texts wait than there are free rows,
these are filled together: once they have been idle for as long, all together, as half a step of all rows takes. What
that costs and what it saves are then alike, however long the texts are (the rule of a ski rental: Karlin et al.,
Algorithmica 3, 1988). Where all that wait have room, none is held back.
"""

from __future__ import annotations

from collections.abc import Sequence

# How long free rows wait to be filled together, in steps of all rows.
_PATIENCE = 0.5


class Admission:
    """Of a scheduler with `n_rows` rows, whose runs have at most `chunk` tokens of prompts."""

    def __init__(self, n_rows: int, chunk: int) -> None:
        self._n_rows, self._chunk = n_rows, chunk
        self._n_idle = 0  # free rows times steps, since rows were filled the last time

    def is_due(self, n_free: int, waiting: Sequence[Sequence[int]]) -> bool:
        """Whether rows are filled before the next step.

        Args:
            waiting: The prompts that wait, the next one first.
        """
        if self._is_better_later(n_free, waiting):
            self._n_idle += n_free
            if self._n_idle < _PATIENCE * self._n_rows:
                return False
        self._n_idle = 0
        return True

    def _is_better_later(self, n_free: int, waiting: Sequence[Sequence[int]]) -> bool:
        """Whether others run, more wait than there are free rows, and the next two prompts fit one run."""
        return 0 < n_free < min(len(waiting), self._n_rows) and 2 * max(map(len, waiting[:2])) <= self._chunk
