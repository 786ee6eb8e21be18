"""The commands that judge an export, `check` and `bench`."""

from __future__ import annotations

from pathlib import Path

import click

from lora_export.bench.shapes import Shape
from lora_export.cli import options
from lora_export.cli.names import moved
from lora_export.cli.output import Display, conclude, guarded


@click.command()
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


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="BATCHxSEQUENCE[@PAST]",
    callback=options.parse_shapes,
    help="Workload to time; repeat.  [default: the task's usual ones]",
)
@click.option("--blocks", default=30, show_default=True, type=click.IntRange(min=6), help="Paired blocks a workload.")
@click.option(
    "--max-ratio",
    metavar="RATIO",
    callback=options.parse_ratio,
    help="Allowed latency relative to the base, where the budget says nothing of it.",
)
@click.option(
    "--budget",
    type=click.Path(path_type=Path),
    help='TOML file of allowances: [ratio] and [ratio."4x128"] by variant, [difference], [swap_us], [memory_mb], '
    "[device_memory_mb].",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Another export, or another tool's ONNX folder or file, to time in the same blocks.",
)
@options.examine_options
def bench(
    out: Path,
    shapes: tuple[Shape, ...],
    blocks: int,
    max_ratio: float | None,
    budget: Path | None,
    against: Path | None,
    flags: options.ExamineFlags,
) -> None:
    """Time the export OUT against its base and its merged form, side by side in paired blocks.

    With --against also against another export, or the graph of another tool (ONNX Runtime GenAI's builder, Optimum,
    ONNX Runtime's optimizer), fed by its inputs' names. Measures what changing the adapter takes and the peak memory of
    each variant, and records which provider runs which operators. What an allowance limits is a gate: exit 1 above it,
    5 if the machine was too noisy to say. Writes OUT/reports/bench.html, .json, .junit.xml and .md.

    \b
    Examples:
      lora-export bench served --shape 4x128 --max-ratio 1.10
      lora-export bench served --budget budget.toml --against yesterday/served
      lora-export bench served --shape 8x1@256 --against genai-builder/llama
    """
    display = Display(as_json=flags.as_json, quiet=flags.quiet)
    with guarded(display):
        adapters = moved(out, flags.adapters)
        display.start("lora-export bench")
        from lora_export import pipeline
        from lora_export.bench.plan import BenchOptions
        from lora_export.integrity.sources import SourceOverrides
        from lora_export.report.text import render_bench_text

        how = BenchOptions(
            provider=flags.provider, shapes=shapes, blocks=blocks, max_ratio=max_ratio, budget=budget, against=against
        )
        overrides = SourceOverrides(flags.base, adapters)
        report, files = pipeline.bench(out, overrides, how, progress=display.progress)
        conclude(report, render_bench_text(report), files, display=display)
