"""The error tree. Every message says what, where, what was expected, what was found and the next step.

An error has its exit code; only `lora_export.cli` exits with it, and library callers catch `LoraExportError`. Whatever
else is raised is a defect, of this package or of a library.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import ClassVar


def closest(name: str, names: Sequence[str], *, alike: float = 0.6) -> str | None:
    """That of `names` which is spelled most like `name`; None where none is.

    Args:
        alike: The least ratio of letters that the two have in common and in order: of `topik` and `topic` 0.8.
    """
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=alike)), None)


def nearest(name: str, names: Sequence[str]) -> str | None:
    """A question that names what `name` may have been meant to be, or None."""
    found = closest(name, names)
    return None if found is None else f"did you mean {found!r}?"


# Of what was found, which somebody else may have written: a message is to be read.
_MOST_FOUND = 2000


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
        if found is not None and len(found) > _MOST_FOUND:
            found = f"{found[:_MOST_FOUND]}…"
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


class Defect(LoraExportError):
    """A mistake in this package, or a library that has changed (exit 6).

    It is never raised: it is what the command line makes of an error that is none of these.
    """

    exit_code = 6


def some_of(names: Sequence[str], most: int) -> str:
    """The first `most` names and how many more there are: a, b and 3 more."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


_OF_THE_SYSTEM = re.compile(r"unable to .*file <(?P<file>[^>]*)>.*\((?P<torch>\d+)\)$|\(os error (?P<rust>\d+)\)")
_NO_SUCH_FILE = re.compile(r"No such file or directory: \"?(?P<file>[^\"]+)\"?")
# Python, ONNX Runtime and C++ (std::thread): the limit of threads is reached, or there is no memory for one's stack.
_NO_THREAD = re.compile(r"can't start new thread|pthread_create failed|Resource temporarily unavailable")
# What code raises that is called in a way it does not know: a library has changed, or an input has led there.
_OF_CODE = (TypeError, AttributeError, NameError, ImportError, NotImplementedError)
_PACKAGE = str(Path(__file__).parent)


@contextlib.contextmanager
def refused_if_it_fails(
    what: str,
    *,
    where: str | Callable[[], str],
    next_step: str,
    found: Callable[[Exception], str] | None = None,
) -> Iterator[None]:
    """While a library works on the user's input: turn what it raises into a refusal that says `what` failed.

    An error of this package passes, and so do one that this package's own code raises by mistake and one of the system
    (a full disk). A refusal for what may be a library's change names versions and where to report it.

    Args:
        found: What the library's error says, for people; None for its own words.

    Raises:
        InputRefused: The library raised.
        MemoryError: It asked for more memory than there is.
    """
    try:
        yield
    except (LoraExportError, MemoryError):
        raise
    except Exception as error:
        if (of_system := of_the_system(error)) is not None:
            raise of_system from error
        if "allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        is_of_the_system = isinstance(error, OSError) and error.errno is not None
        if is_of_the_system or (isinstance(error, _OF_CODE) and _raised_here(error)):
            raise
        if isinstance(error, _OF_CODE):
            next_step += f"; if an earlier release of {_versions()} did it, report that: {issue_tracker()}"
        where = where if isinstance(where, str) else where()
        raise InputRefused(what, where=where, found=(found or told)(error), next_step=next_step) from error


def of_the_system(error: BaseException) -> OSError | None:
    """The system's error that a library tells in words.

    torch: "unable to open file <…> in read-only mode: Too many open files (24)"; safetensors: "I/O error: No space left
    on device (os error 28)"; Python: "can't start new thread". Of a file that is there and cannot be opened, whatever
    the reason, safetensors says that there is none, without a number.
    """
    if isinstance(error, OSError):
        found = _NO_SUCH_FILE.fullmatch(str(error)) if error.errno is None else None
        if found is None or not os.path.lexists(found["file"]):
            return None
        return OSError(errno.EIO, "It is there and could not be opened", found["file"])
    if isinstance(error, RuntimeError) and _NO_THREAD.search(str(error)):
        return OSError(errno.EAGAIN, str(error).strip())
    if (found := _OF_THE_SYSTEM.search(str(error))) is None:
        return None
    number = int(found["torch"] or found["rust"])
    return OSError(number, os.strerror(number), found["file"])


def told(error: BaseException, n_characters: int = 400) -> str:
    """What an error says, on one line, and its kind where that tells something."""
    said = " ".join(str(error).split())[:n_characters]
    return said if isinstance(error, ValueError | RuntimeError) and said else f"{type(error).__name__}: {said}"


def _raised_here(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename.startswith(_PACKAGE)


def _versions() -> str:
    found = []
    for name in ("transformers", "peft", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} (here {version(name)})")
    return " or ".join(found)


def issue_tracker() -> str:
    """Where defects are reported: the address in the package's metadata."""
    try:
        urls = metadata("lora-export").get_all("Project-URL") or ()
    except PackageNotFoundError:  # run from a source tree that is not installed
        urls = ()
    return dict(entry.split(", ", 1) for entry in urls).get("Issues", "`urls` in pyproject.toml")
