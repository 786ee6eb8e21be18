"""All renderings of a report into a folder, each file at once or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lora_export.check.divergence_results import ARRAYS, SCRIPT
from lora_export.check.results import CheckReport
from lora_export.report.as_json import Report, file_name, render_json
from lora_export.report.html import render_bench_html, render_check_html
from lora_export.report.junit import render_bench_junit, render_check_junit
from lora_export.report.markdown import render_bench_markdown, render_check_markdown
from lora_export.staging import write_whole

_MOST_OF_A_REASON = 500


def write_reports(report: Report, folder: Path) -> dict[str, Path]:
    """Write `check.*` or `bench.*`; returns the paths by suffix ("html", "md", "junit.xml", "json").

    All are rendered before any is written, so a report that cannot be rendered leaves the folder as it was.
    """
    if isinstance(report, CheckReport):
        contents = {"html": render_check_html(report), "md": render_check_markdown(report)}
        contents["junit.xml"] = render_check_junit(report)
    else:
        contents = {"html": render_bench_html(report), "md": render_bench_markdown(report)}
        contents["junit.xml"] = render_bench_junit(report)
    contents["json"] = render_json(report)
    folder.mkdir(parents=True, exist_ok=True)
    return {suffix: write_whole(folder / file_name(report, suffix), text) for suffix, text in contents.items()}


@contextlib.contextmanager
def written_if_stopped(write: Callable[[str], object], has_results: Callable[[], bool]) -> Iterator[None]:
    """Where what is inside raises, write what was measured before as a partial report; the exception goes on.

    Args:
        write: Writes it, given what stopped the measurements.
        has_results: Whether anything was measured; if not, an earlier report stays.
    """
    try:
        yield
    except BaseException as error:
        if has_results():
            with contextlib.suppress(OSError):  # a full disk may be what stopped it: that is to be told
                write(f"{type(error).__name__}: {' '.join(str(error).split())[:_MOST_OF_A_REASON]}".rstrip(": "))
        raise


def write_reproduction(files: Mapping[str, bytes], folder: Path) -> dict[str, Path]:
    """Write the files that reproduce a failure; the paths by name. Those of an earlier failure are removed."""
    for name in {SCRIPT, ARRAYS} - set(files):
        (folder / name).unlink(missing_ok=True)
    return {name: write_whole(folder / name, content) for name, content in files.items()}
