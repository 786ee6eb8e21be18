"""The command `extract`."""

from __future__ import annotations

import click

from lora_export.cli import options
from lora_export.cli.output import Display, guarded
from lora_export.errors import UsageProblem


@click.command(short_help="make an adapter of a full fine-tune")
@click.argument("base")
@click.argument("fine_tuned", metavar="FINETUNED")
@click.option("--rank", type=click.IntRange(min=1), help="Rank of every pair.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="Or for each module the smallest rank that holds this share of its difference's energy (sum of σ²).",
)
@click.option(
    "--leave-out",
    multiple=True,
    type=click.Choice(("biases", "embeddings", "others")),
    help="Keep the base's values of these where they differ, and report it; repeat. others: norms and the rest.",
)
@click.option("--exact", is_flag=True, help="Find all singular values of large modules too, for the plot (slow).")
@options.extract_options
def extract(
    base: str,
    fine_tuned: str,
    rank: int | None,
    energy: float | None,
    leave_out: tuple[str, ...],
    exact: bool,
    flags: options.ExtractFlags,
) -> None:
    """Turn the full fine-tune FINETUNED of BASE into a PEFT adapter, by truncated SVD of what differs.

    Give --rank or --energy. Linear weights become LoRA pairs, heads and norms are saved whole, and what an adapter
    cannot carry is refused. Writes reports/extract.html in the adapter's folder: the error against the rank.

    \b
    Example:
      lora-export extract all-MiniLM-L6-v2/ my-fine-tune/ --rank 16 -o adapters/mine
    """
    display = Display(as_json=flags.as_json, quiet=flags.quiet)
    with guarded(display):
        if (rank is None) == (energy is None):
            raise UsageProblem("Give either --rank or --energy", found="both" if rank else "neither")
        display.start("lora-export extract")
        from lora_export.extract.run import ExtractRequest, describe_extraction
        from lora_export.extract.svd import RankChoice
        from lora_export.pipeline import extract_adapter
        from lora_export.report.extract_text import describe_text, render_extract_text

        choice = RankChoice(rank, energy)
        request = ExtractRequest(base, fine_tuned, choice, flags.task, frozenset(leave_out), exact)
        if flags.dry_run:
            display.result(describe_extraction(request, flags.out, display.progress), describe_text)
            return
        report, files = extract_adapter(request, flags.out, overwrite=flags.overwrite, progress=display.progress)
        written = "\n".join(f"wrote {path}" for path in files.values())
        display.result(report.to_dict(), lambda _: render_extract_text(report) + written)
