"""What the command line prints: results and errors for people or as JSON, progress on a terminal, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, assert_never

import click

from lora_export.errors import EnvironmentUnusable, LoraExportError

if TYPE_CHECKING:
    from lora_export.report.as_json import Report

_SLOW_SECONDS = 1.0
_BAR_WIDTH = 28


def exit_code_of(verdict: str) -> int:
    """0 pass or not gated, 1 fail, 5 ambiguous."""
    from lora_export.verify.results import Verdict

    match Verdict(verdict):
        case Verdict.PASS | Verdict.NOT_GATED:
            return 0
        case Verdict.FAIL:
            return 1
        case Verdict.AMBIGUOUS:
            return 5
        case other:
            assert_never(other)


class Display:
    """Prints a command's result to standard output, and progress to standard error if that is a terminal."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._shows_progress = sys.stderr.isatty() and not (as_json or quiet)
        self._started = time.monotonic()
        self._line_open = False

    def start(self, what: str) -> None:
        """Say at once that the command is alive: its libraries take seconds to load."""
        if self._shows_progress:
            self._draw(f"{what}: loading")

    def progress(self, stage: str, done: int, total: int) -> None:
        """Draw a bar for a stage, once the command has taken over a second."""
        if not self._shows_progress or time.monotonic() - self._started < _SLOW_SECONDS:
            return
        share = min(1.0, done / total) if total else 0.0
        bar = ("█" * round(share * _BAR_WIDTH)).ljust(_BAR_WIDTH, "░")
        self._draw(f"{stage:<28} {bar} {share:4.0%}" if total > 1 else f"{stage} …")

    def _draw(self, text: str) -> None:
        click.echo(f"\r\033[K{text}", nl=False, err=True)
        self._line_open = True

    def clear(self) -> None:
        """Remove the progress line."""
        if self._line_open:
            click.echo("\r\033[K", nl=False, err=True)
            self._line_open = False

    def say(self, text: str) -> None:
        """A remark for people, on standard error."""
        if not (self.as_json or self.quiet):
            self.clear()
            click.echo(text, err=True)

    def result(self, value: dict, render: Callable[[dict], str]) -> None:
        """The command's result, as JSON or text."""
        self.clear()
        if self.as_json:
            click.echo(json.dumps(value, indent=2, sort_keys=True, default=str, allow_nan=False))
        elif not self.quiet:
            click.echo(render(value))

    def error(self, error: LoraExportError) -> None:
        """An error, on standard error; as JSON on standard output where that was asked for."""
        self.clear()
        if self.as_json:
            click.echo(json.dumps(error.to_dict(), indent=2, sort_keys=True))
        else:
            click.echo(f"{click.style('error:', fg='red', bold=True)} {error}", err=True)


def conclude(report: Report, text: str, files: dict[str, Path], display: Display) -> NoReturn:
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
            click.echo(command, err=display.as_json or display.quiet)
    job_summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if job_summary:
        try:
            with Path(job_summary).open("a", encoding="utf-8") as file:
                file.write(markdown.read_text(encoding="utf-8") + "\n")
        except OSError as error:
            click.echo(f"the job summary was not written: {error}", err=True)  # the verdict stands without it


@contextlib.contextmanager
def guarded(display: Display) -> Iterator[None]:
    """Turn this package's errors, and a full memory or a broken pipe, into one message and an exit code."""
    try:
        yield
    except LoraExportError as error:
        display.error(error)
        sys.exit(error.exit_code)
    except MemoryError:
        display.error(EnvironmentUnusable("The machine has too little memory", next_step="see --dry-run for the need"))
        sys.exit(EnvironmentUnusable.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        display.clear()
        click.echo("interrupted; nothing was published", err=True)
        sys.exit(130)
    except Exception:
        display.say("The error below is a defect of lora-export, not of your input; please report it.")
        raise
    finally:
        display.clear()
