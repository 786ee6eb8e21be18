"""What the command line prints: results and errors for people or as JSON, progress on a terminal, exit codes."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, assert_never

import click

from lora_export.cli.mapped_files import told_if_unreadable
from lora_export.cli.pace import SLOW_SECONDS, Pace, time_shown
from lora_export.compat import untested
from lora_export.errors import Defect, EnvironmentUnusable, LoraExportError, issue_tracker, of_the_system

if TYPE_CHECKING:
    from lora_export.report.as_json import Report

_LINE_SECONDS = 30.0  # between lines of one stage where no terminal is
_MOST_COUNTED = 100_000  # above, what is counted are bytes or elements, of which a share tells more
_BAR_WIDTH = 28


def exit_code_of(verdict: str) -> int:
    """0 pass or not gated, 1 fail, 5 ambiguous."""
    from lora_export.verdict import Verdict

    match Verdict(verdict):
        case Verdict.PASS | Verdict.NOT_GATED:
            return 0
        case Verdict.FAIL:
            return 1
        case Verdict.AMBIGUOUS:
            return 5
        case other:
            assert_never(other)


def print_to_reader(text: str, *, end: str = "\n", err: bool = False) -> None:
    """Print to standard output or standard error. A reader that has gone (`| head`) changes nothing else: what is left
    to print goes nowhere, and the command ends with the exit code that it would have had."""
    stream = sys.stderr if err else sys.stdout
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")  # half of a surrogate pair, from somebody's JSON
    try:
        click.echo(text + end, nl=False, err=err)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def defect(error: Exception) -> Defect:
    """What to say of an error that is nobody's input: where it came from, where to report it, with which versions."""
    from lora_export.artifact import versions

    found = {"python": platform.python_version(), **versions(), "onnxruntime": _onnxruntime_version()}
    return Defect(
        "This is a defect of lora-export or of one of its libraries, not of your input",
        where=_place_of(error),
        found=f"{type(error).__name__}: {' '.join(str(error).split())[:600]}",
        next_step=f"report it, with the command and what LORA_EXPORT_DEBUG=1 shows: {issue_tracker()}\n  versions: "
        + ", ".join(f"{name} {version}" for name, version in found.items()),
    )


def _place_of(error: Exception) -> str:
    """The innermost line of this package, and that of the library which it called."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "lora_export" in Path(frame.filename).parts]
    places = [f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}" for frame in (*ours[-1:], *frames[-1:])]
    return ", in ".join(dict.fromkeys(places))


def _onnxruntime_version() -> str:
    for distribution in ("onnxruntime-gpu", "onnxruntime"):
        with contextlib.suppress(PackageNotFoundError):
            return f"{version(distribution)} ({distribution})"
    return "not installed"


class Display:
    """Prints a command's result to standard output, and progress to standard error."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._shows_progress = sys.stderr.isatty() and not (as_json or quiet)
        self._started = time.monotonic()
        self._line_open = False
        self._stage, self._pace, self._line_written = "", Pace(self._started), -math.inf
        self._streamed = ""

    def start(self, what: str) -> None:
        """Say at once that the command is alive, as its libraries take seconds to load, and which are untested."""
        for sentence in untested():
            self.say(sentence)
        if self._shows_progress:
            self._draw(f"{what}: loading")

    def progress(self, stage: str, done: int, total: int) -> None:
        """Draw a bar for a stage, once the command has taken over a second; where no terminal is, a line a stage, and
        of a long one how far it is every half a minute.

        Stages with one total that go on where the one before ended are one piece of work.
        """
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._line_written = stage, -math.inf
        self._pace = self._pace.at(now, done, total)
        left = self._pace.left(now)
        if not self._shows_progress:
            if now - self._line_written >= _LINE_SECONDS and not (self.as_json or self.quiet):
                is_first = self._line_written == -math.inf
                so_far = f"{done:,} of {total:,}" if total < _MOST_COUNTED else f"{done / total:.0%}"
                of_total = "" if is_first and not left else f", {so_far}{left}"
                self._line_written = now
                print_to_reader(f"after {time_shown(now - self._started)}: {stage}{of_total}", err=True)
            return
        if now - self._started < SLOW_SECONDS:
            return
        share = min(1.0, done / total) if total else 0.0
        bar = ("█" * round(share * _BAR_WIDTH)).ljust(_BAR_WIDTH, "░")
        self._draw(f"{stage:<28} {bar} {share:4.0%}{left}" if total > 1 else f"{stage} …")

    def _draw(self, text: str) -> None:
        print_to_reader(f"\r\033[K{text}", end="", err=True)
        self._line_open = True

    def clear(self) -> None:
        """Remove the progress line."""
        if self._line_open:
            print_to_reader("\r\033[K", end="", err=True)
            self._line_open = False

    def say(self, text: str) -> None:
        """A remark for people, on standard error."""
        if not (self.as_json or self.quiet):
            self.clear()
            print_to_reader(text, err=True)

    def stream(self, part: str) -> None:
        """A part of the result as it is made; `result` then adds what is left."""
        self.clear()
        self._streamed += part
        print_to_reader(part, end="")

    def result(self, value: dict, render: Callable[[dict], str]) -> None:
        """The command's result, as JSON or text."""
        self.clear()
        if self.as_json:
            print_to_reader(json.dumps(value, indent=2, sort_keys=True, default=str, allow_nan=False))
        elif not self.quiet:
            print_to_reader(render(value).removeprefix(self._streamed))

    def error(self, error: LoraExportError, raised: BaseException | None = None) -> None:
        """An error, on standard error; as JSON on standard output where that was asked for.

        Args:
            raised: What LORA_EXPORT_DEBUG=1 shows the traceback of.
        """
        self.clear()
        if raised is not None and os.environ.get("LORA_EXPORT_DEBUG"):
            print_to_reader("".join(traceback.format_exception(raised)), err=True)
        if self.as_json:
            print_to_reader(json.dumps(error.to_dict(), indent=2, sort_keys=True))
        else:
            print_to_reader(f"{click.style('error:', fg='red', bold=True)} {error}", err=True)


def conclude(report: Report, text: str, files: dict[str, Path], *, display: Display) -> NoReturn:
    """Print a report (`text` is for people) and where it was written, tell GitHub, and exit with the verdict's code."""
    from lora_export.report.as_json import json_value

    written = "\n".join(f"wrote {path}" for path in files.values())
    display.result(json_value(report), lambda _: f"{text}\n{written}")
    _tell_github(report, files["md"], display)
    sys.exit(exit_code_of(report.verdict))


def _tell_github(report: Report, markdown: Path, display: Display) -> None:
    """In a job of GitHub Actions: annotate the run with what failed, and append the Markdown to the job's summary.

    The runner reads both streams, so where standard output is not for people the annotations go to standard error.
    """
    if os.environ.get("GITHUB_ACTIONS") == "true":
        from lora_export.report.github import annotations

        for command in annotations(report):
            print_to_reader(command, err=display.as_json or display.quiet)
    job_summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if job_summary:
        try:
            with Path(job_summary).open("a", encoding="utf-8") as file:
                file.write(markdown.read_text(encoding="utf-8") + "\n")
        except OSError as error:
            print_to_reader(f"the job summary was not written: {error}", err=True)  # the verdict stands without it


_NEXT_STEPS = {
    errno.EAGAIN: "free memory, or allow more threads (ulimit -u, the container's limit of processes)",
    errno.ENOMEM: "free memory; --dry-run tells the need",
    errno.EMFILE: "allow more open files (ulimit -n)",
}


def _system_error(error: OSError) -> EnvironmentUnusable:
    """A disk that is full, a file that may not be read or written, a connection that broke."""
    return EnvironmentUnusable(
        "The system refused what the command needs",
        where=str(error.filename) if error.filename is not None else None,
        found=error.strerror or str(error),
        next_step=_NEXT_STEPS.get(error.errno, "free the disk, or change the permissions or the path"),
    )


@contextlib.contextmanager
def guarded(display: Display) -> Iterator[None]:
    """Turn every error into one message and an exit code: exit 1 is left to gates. SIGTERM cleans up as Ctrl-C does."""
    try:
        with told_if_unreadable(display.error), _ended_by_signals():
            yield
    except LoraExportError as error:
        display.error(error, error)
        sys.exit(error.exit_code)
    except MemoryError:
        display.error(EnvironmentUnusable("The machine has too little memory", next_step="see --dry-run for the need"))
        sys.exit(EnvironmentUnusable.exit_code)
    except KeyboardInterrupt:
        display.clear()
        print_to_reader("interrupted; nothing was published", err=True)
        sys.exit(130)
    except OSError as error:
        display.error(_system_error(error))
        sys.exit(EnvironmentUnusable.exit_code)
    except Exception as error:
        found = of_the_system(error)
        told = defect(error) if found is None else _system_error(found)
        display.error(told, error)
        sys.exit(told.exit_code)
    finally:
        display.clear()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM ends as Ctrl-C does, and both do where a library makes another error of what they raise, as safetensors
    does while it makes a tensor."""
    if threading.current_thread() is not threading.main_thread():  # which may not set handlers
        yield
        return
    raised: list[BaseException] = []

    def end(number: int, _frame: object) -> NoReturn:
        raised.append(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number))
        raise raised[-1]

    # A shell starts what is in its background with SIGINT ignored; so it stays.
    numbers = [signal.SIGTERM, *([signal.SIGINT] * callable(signal.getsignal(signal.SIGINT)))]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    except Exception as error:
        if raised:
            raise raised[-1] from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
