"""`Admission`: when free rows of a scheduler are given to texts that wait, and which prompts are read in one run.

A run has a fixed cost, above all to read all weights, and a cost for each of its tokens. Prompts in one run are padded
to the longest. So a prompt joins others where its padding costs less than the fixed part of a run of its own.

Free rows wait to be filled together where all of this holds: joining saves something, more texts wait than rows are
free, and other rows are at work. They are filled once the time that they were idle, summed over rows, is half of what a
step of all rows takes: of 8 rows, 2 free ones at the second step, as 2 · 2 = 8 / 2. Waiting then costs as much as it
saves, however long the texts are (the rule of a ski rental: Karlin et al., Algorithmica 3, 1988).
"""

from __future__ import annotations

from collections.abc import Sequence

# What a run costs whatever it runs, in tokens of prompts. On two cores, 8 layers of 1024 in float32 take 12 ms and
# 0.43 ms a token, SmolLM2-135M 14 ms and 0.77. For CUDA it is an estimate: an H100 has 990 Tflop/s in float16 for
# 3.35 TB/s.
_RUN_IN_TOKENS = {"cpu": 24, "cuda": 256}
# How long free rows wait to be filled together, in steps of all rows.
_PATIENCE = 0.5


class Admission:
    """Of a scheduler with `n_rows` rows on `provider`, whose runs have at most `chunk` tokens of prompts.

    Args:
        has_gaps: Whether the rows that become free stay where they are, apart: then no run is of several.
    """

    def __init__(self, n_rows: int, chunk: int, provider: str, *, has_gaps: bool = False) -> None:
        self._n_rows, self._chunk, self._run_in_tokens = n_rows, chunk, _RUN_IN_TOKENS[provider]
        self._has_gaps = has_gaps
        self._n_idle = 0  # free rows times steps, since rows were filled the last time

    def is_due(self, n_free: int, waiting: Sequence[Sequence[int]]) -> bool:
        """Whether rows are filled before the next step.

        Args:
            waiting: The prompts that wait, the next one first.
        """
        is_full = 0 < n_free < min(len(waiting), self._n_rows)
        if is_full and not self._has_gaps and self.saved([len(waiting[0])], len(waiting[1])) > 0:
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
        return self._run_in_tokens + tokens + other - joined
