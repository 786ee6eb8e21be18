"""`Admission`: when free rows of a scheduler are given to texts that wait, and which prompts are read in one run.

A run takes as long as it takes to read all weights, or to calculate with its tokens, whichever is longer (the roofline
model: Williams et al., CACM 52, 2009). Prompts in one run are padded to the longest. So a prompt joins others where
that is no longer than a run of its own besides theirs: short ones do, and long ones that are alike.

Where that would be shorter, more texts wait than there are free rows, and others are at work, free rows are filled
together: once they have been idle for as long, all together, as half a step of all rows takes. What that costs and what
it saves are then alike, however long the texts are (the rule of a ski rental: Karlin et al., Algorithmica 3, 1988).
"""

from __future__ import annotations

from collections.abc import Sequence

# The tokens that are calculated with in the time that reading the weights takes: SmolLM2-135M on two cores takes as
# long for 18 as for one; an H100 has 990 Tflop/s in float16 for 3.35 TB/s.
_FREE_TOKENS = {"cpu": 16, "cuda": 256}
# How long free rows wait to be filled together, in steps of all rows.
_PATIENCE = 0.5


class Admission:
    """Of a scheduler with `n_rows` rows on `provider`, whose runs have at most `chunk` tokens of prompts."""

    def __init__(self, n_rows: int, chunk: int, provider: str) -> None:
        self._n_rows, self._chunk, self._free_tokens = n_rows, chunk, _FREE_TOKENS[provider]
        self._n_idle = 0  # free rows times steps, since rows were filled the last time

    def is_due(self, n_free: int, waiting: Sequence[Sequence[int]]) -> bool:
        """Whether rows are filled before the next step.

        Args:
            waiting: The prompts that wait, the next one first.
        """
        if 0 < n_free < min(len(waiting), self._n_rows) and self.saved([len(waiting[0])], len(waiting[1])) > 0:
            self._n_idle += n_free
            if self._n_idle < _PATIENCE * self._n_rows:
                return False
        self._n_idle = 0
        return True

    def saved(self, together: Sequence[int], other: int) -> int:
        """What it saves, in tokens, if a prompt of `other` tokens joins those of `together`; negative if it costs.

        Args:
            together: The lengths of prompts in one run.
        """
        tokens, joined = len(together) * max(together), (len(together) + 1) * max(*together, other)
        if joined > self._chunk:
            return -joined
        return self._time(tokens) + self._time(other) - self._time(joined)

    def _time(self, n_tokens: int) -> int:
        """Of a run, in tokens that are calculated with."""
        return max(n_tokens, self._free_tokens)
