"""The error tree. Every message says what, where, what was expected, what was found and the next step.

An error has its exit code; only `lora_export.cli` exits with it, and library callers catch `LoraExportError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class LoraExportError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        what: One sentence: what is wrong.
        where: The file, module or option it is about.
        expected: What was expected there.
        found: What was found instead.
        next_step: What the user can do now.
    """

    exit_code: ClassVar[int] = 3

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        next_step: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.found, self.next_step = what, where, expected, found, next_step
        rows = (("where", where), ("expected", expected), ("found", found), ("next", next_step))
        super().__init__("\n".join([what, *(f"  {label + ':':<10}{text}" for label, text in rows if text)]))

    def to_dict(self) -> dict[str, str | int | None]:
        """The error as JSON-ready values, for `--json`."""
        return {
            "error": type(self).__name__,
            "exit_code": self.exit_code,
            "what": self.what,
            "where": self.where,
            "expected": self.expected,
            "found": self.found,
            "next": self.next_step,
        }


class UsageProblem(LoraExportError):
    """The command's arguments contradict each other (exit 2)."""

    exit_code = 2


class InputRefused(LoraExportError):
    """An input is unsupported, malformed, unsafe or does not fit the base (exit 3)."""

    exit_code = 3


class EnvironmentUnusable(LoraExportError):
    """The machine lacks something the command needs: a provider, memory, disk (exit 4)."""

    exit_code = 4


def some_of(names: Sequence[str], most: int) -> str:
    """The first `most` names and how many more there are: a, b and 3 more."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
