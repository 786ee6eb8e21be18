"""`lora-export check`: is the export what was trained?"""

from __future__ import annotations

from pathlib import Path

import click

from lora_export.cli import options
from lora_export.cli.names import moved
from lora_export.cli.output import Display, conclude, guarded
from lora_export.named import require_there


@click.command(short_help="compare an export with unmerged PEFT (exit 1 if it differs)")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--data",
    multiple=True,
    metavar="[NAME=]PATH",
    callback=options.named_paths,
    help="Examples (for one adapter): text lines, JSON lines with text and label_id, or a folder of images; repeat.",
)
@click.option(
    "--rows",
    "n_rows",
    type=click.IntRange(min=1),
    help="Rows of each data file to compare on, at the most.  [default: 128; fewer where the base is large]",
)
@options.tolerances
@click.option("--merged", type=click.Path(path_type=Path), help="A merged export to compare this dynamic one with.")
@click.option("--dry-run", is_flag=True, help="Say what would be compared, compare nothing.")
@options.examine_options
def check(
    out: Path,
    data: dict[str | None, str],
    n_rows: int | None,
    tolerances: dict[str, float],
    merged: Path | None,
    dry_run: bool,
    flags: options.ExamineFlags,
) -> None:
    """Compare the export OUT with its adapters in unmerged PEFT; exit 1 if it differs.

    Each adapter, the base, swaps, mixed rows, and for decoders caches, padding and greedy generation. An adapter
    without effect fails. Writes OUT/reports/check.html, .json, .junit.xml and .md, with the error by layer; of what
    failed first, the node that differs, and reproduce.py, which shows it with onnxruntime and numpy alone.

    \b
    Example:
      lora-export check served --data topic=heldout/topic.jsonl
    """
    display = Display(as_json=flags.as_json, quiet=flags.quiet)
    with guarded(display):
        adapters = moved(out, flags.adapters, data)
        for path in data.values():
            require_there("data file", path)
        require_there("export", merged)
        display.start("lora-export check")
        from lora_export import pipeline
        from lora_export.check.context import CheckOptions
        from lora_export.integrity.sources import SourceOverrides
        from lora_export.report.text import render_check_text

        files_of_data = {name: Path(path) for name, path in data.items()}
        how = CheckOptions(
            provider=flags.provider, data=files_of_data, merged=merged, n_rows=n_rows, tolerances=tolerances
        )
        overrides = SourceOverrides(flags.base, adapters)
        if dry_run:
            display.result(
                {"compared": list(pipeline.plan_check(out, overrides, how))}, lambda it: "\n".join(it["compared"])
            )
            return
        report, files = pipeline.check(out, overrides, how, progress=display.progress, remark=display.say)
        conclude(report, render_check_text(report), files, display=display)
