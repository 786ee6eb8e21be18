"""The command `run`."""

from __future__ import annotations

from pathlib import Path

import click

from lora_export.artifact import read_manifest
from lora_export.cli import options, text
from lora_export.cli.output import Display, guarded


@click.command(short_help="try an export on a text, an image or a sound")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, metavar="TEXT...")
@click.option(
    "--adapter",
    "blend",
    multiple=True,
    metavar="NAME[=WEIGHT]",
    callback=options.parse_blend,
    help="Adapter to run with; repeat with weights to blend.  [default: none]",
)
@click.option("--max-new-tokens", default=40, show_default=True, help="Tokens to generate (decoders).")
@click.option("--raw", is_flag=True, help="Give a decoder the text as it is, without the export's chat template.")
@click.option("--pairs", is_flag=True, help="Take TEXTs two and two, as rerankers and other classifiers of pairs do.")
@options.run_on
@options.as_json
def run(
    out: Path,
    inputs: tuple[str, ...],
    blend: dict[str, float],
    max_new_tokens: int,
    raw: bool,
    pairs: bool,
    provider: str | None,
    as_json: bool,
) -> None:
    """Run the export OUT on TEXT (or image files, or WAV files) and print what it says.

    A decoder answers TEXT as the first message of a chat where the export has a chat template, and goes on with it
    otherwise.

    \b
    Example:
      lora-export run served --adapter topic "Open a socket and listen for connections."
    """
    display = Display(as_json=as_json, quiet=False)
    with guarded(display):
        manifest = read_manifest(out)
        for name in blend:
            manifest.require_served(name)
        from lora_export import trial

        stream = display.stream if len(inputs) == 1 and not as_json else None
        found = trial.run_trial(
            out, inputs, blend, provider=provider, max_new_tokens=max_new_tokens, is_raw=raw, of_pairs=pairs,
            stream=stream,
        )  # fmt: skip
        display.result(found, text.trial_text)
