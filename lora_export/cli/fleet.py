"""The command `fleet`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import click

from lora_export.cli import options
from lora_export.cli.output import Display, guarded
from lora_export.named import require_there


@dataclass(frozen=True)
class FleetFlags:
    """The options of `fleet`."""

    task: str | None
    dtype: str | None
    provider: str | None
    pooling: str | None
    targets: tuple[str, ...]
    workers: int | None
    ray: str | None
    rows: int
    timeout: float
    max_memory: float | None
    limit: int | None
    only_changed: bool
    tolerances: dict[str, float]
    dry_run: bool
    as_json: bool
    quiet: bool


_options = options.as_flags(
    FleetFlags,
    options.task,
    options.dtype,
    options.run_on,
    options.pooling,
    click.option(
        "--targets", multiple=True, help="Modules to serve besides the adapters' own; repeat.  (or all-linear)"
    ),
    click.option("--workers", type=click.IntRange(min=1), help="Workers.  [default: one on each core]"),
    click.option(
        "--ray",
        is_flag=False,
        flag_value="local",
        metavar="[ADDRESS]",
        help="Let Ray run the workers: the cluster at ADDRESS (auto, ray://…), or Ray started here.",
    ),
    click.option("--rows", default=8, show_default=True, type=click.IntRange(min=1), help="Rows to compare each on."),
    click.option("--timeout", default=600.0, show_default=True, type=click.FloatRange(1), help="Seconds an adapter."),
    click.option(
        "--max-memory",
        type=click.FloatRange(0, min_open=True),
        help="GB a worker.  [default: its part of what is free]",
    ),
    click.option("--limit", type=click.IntRange(min=1), help="Only so many adapters of the list."),
    click.option("--only-changed", is_flag=True, help="Report, and exit by, what this run did; count the others."),
    options.tolerances,
    options.dry_run,
    options.as_json,
    options.quiet,
)


@click.command(short_help="pack, check and record many adapters for one dynamic export")
@click.argument("source", metavar="LIST", type=click.Path(path_type=Path))
@click.argument("base")
@click.option("-o", "--out", required=True, help="The export to make or to renew: a folder, or an address (s3://…).")
@_options
def fleet(source: Path, base: str, out: str, flags: FleetFlags) -> None:
    """Pack, check and record every adapter of LIST for one dynamic graph of BASE.

    LIST is a CSV, JSON lines or Parquet file with a column `path` (and `name`, `revision`, `data`), or a folder of
    adapters. One that cannot be exported, differs from PEFT or breaks its worker is recorded and left out; the others
    are served. Run again, it does what has changed. Writes OUT/reports/fleet.html, .json, .csv, .junit.xml and, with
    pyarrow, .parquet. Exit 1 if an adapter differs or broke its workers, 3 if all were refused.

    \b
    Example:
      lora-export fleet customers.csv all-MiniLM-L6-v2/ -o served
    """
    display = Display(as_json=flags.as_json, quiet=flags.quiet)
    with guarded(display):
        require_there("list of adapters", source)
        display.start("lora-export fleet")
        from lora_export import pipeline
        from lora_export.fleet.options import FleetOptions
        from lora_export.fleet.roster import is_address
        from lora_export.fleet.run import describe_fleet
        from lora_export.report.as_json import json_value
        from lora_export.report.fleet import render_fleet_text

        place = out if is_address(out) else Path(out)
        how = FleetOptions(
            out=place, task=flags.task, dtype=flags.dtype, provider=flags.provider, pooling=flags.pooling,
            targets=flags.targets, n_workers=flags.workers, ray=flags.ray, n_rows=flags.rows, seconds=flags.timeout,
            limit=flags.limit, only_changed=flags.only_changed,
            n_bytes=None if flags.max_memory is None else int(flags.max_memory * 1e9), tolerances=flags.tolerances,
        )  # fmt: skip
        if flags.dry_run:
            display.result(describe_fleet(source, base, how), _described)
            return
        report, files = pipeline.fleet(source, base, how, progress=display.progress)
        written = "\n".join(f"wrote {path}" for path in files.values())
        display.result(json_value(report), lambda _: render_fleet_text(report) + written)
        sys.stdout.flush()
        sys.exit(report.exit_code)


def _described(value: dict) -> str:
    n_workers = value["workers"] or "the cluster's"
    lines = [
        f"would make {value['folder']} of {value['adapters']} adapters of {value['kinds']} kinds; wrote nothing",
        f"read     {value['bytes'] / 1e6:.1f} MB of adapters, {n_workers} workers",
        *([f"embeds   by {value['embedding']}"] if value["embedding"] else []),
        *(f"refused  {name}: {reason}" for name, reason in value["refused"].items()),
        *(f"not here {name}" for name in value["not_here"]),
    ]
    return "\n".join(lines)
