"""What a caller is told while a command works: how far it is, and what was decided for the user."""

from __future__ import annotations

from collections.abc import Callable

# Stage, how much of it is done, and of how much.
Progress = Callable[[str, int, int], None]
# A sentence about what was decided for the user.
Remark = Callable[[str], None]


def silent(stage: str, done: int, total: int) -> None:
    """The default progress: none."""


def mute(sentence: str) -> None:
    """The default remark: none."""
