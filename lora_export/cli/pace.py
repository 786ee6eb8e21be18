"""How fast a command's work goes, and how long the rest of it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Work that takes less needs no word.
SLOW_SECONDS = 1.0
_FEWEST_STEPS = 2


def time_left(n_done: int, n_left: int, seconds: float) -> str:
    """How long `n_left` steps will take if they take as long as `n_done` took; nothing before it can be told.

    Returns:
        Such as ", 3.4 a second, 4 min 10 s left"; of thousands a second, which are bytes, without the rate.
    """
    if n_done <= 0 or n_left <= 0 or seconds < SLOW_SECONDS:
        return ""
    rate = n_done / seconds
    return f"{'' if rate >= 1000 else f', {rate:.3g} a second'}, {time_shown(n_left * seconds / n_done)} left"


def time_shown(seconds: float) -> str:
    """Seconds to be read at a glance: 12 s, 4 min 10 s, 13.9 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole / 3600:.1f} h"


@dataclass(frozen=True)
class Pace:
    """How far a command has come with one piece of work, whose parts may have names of their own.

    Attributes:
        began, done_then: When it was first told how much was done, and how much that was.
        n_steps: How often more was done since; steps differ in size, so one alone tells nothing of the others.
    """

    began: float
    done_then: int = 0
    done: int = 0
    total: int = 0
    n_steps: int = 0

    def at(self, now: float, done: int, total: int) -> Pace:
        """The pace now: of other work, if there is another total or less is done."""
        if total != self.total or done < self.done:
            return Pace(now, done, done, total)
        return replace(self, done=done, n_steps=self.n_steps + (done > self.done))

    def left(self, now: float) -> str:
        """See `time_left`: by all that was done, which is work of this kind and not its beginning."""
        if self.n_steps < _FEWEST_STEPS:
            return ""
        return time_left(self.done - self.done_then, self.total - self.done, now - self.began)
