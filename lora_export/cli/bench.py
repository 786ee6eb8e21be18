"""`lora-export bench`: what does the export cost?"""

from __future__ import annotations

from pathlib import Path

import click

from lora_export.bench.shapes import Shape
from lora_export.cli import options
from lora_export.cli.names import moved
from lora_export.cli.output import Display, conclude, guarded
from lora_export.named import require_there


@click.command(short_help="time base, merged and dynamic (exit 1 if too slow, 5 if undecided)")
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
        require_there("budget", budget)
        require_there("graph", against)
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
