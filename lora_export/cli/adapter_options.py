"""Options of how base and adapters are read."""

from __future__ import annotations

import click

from lora_export.sentence import AUTO, NONE, Pooling


def parse_rank(context: click.Context, option: click.Parameter, value: str | None) -> float | None:
    """A rank as a whole number, or a share of the energy as a number between 0 and 1."""
    try:
        return None if value is None else int(value) if value.isdigit() and int(value) else _share(float(value))
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a rank nor a share between 0 and 1", context, option) from None


def _share(value: float) -> float:
    if not 0 < value < 1:
        raise ValueError
    return value


convert_rank = click.option(
    "--convert-rank",
    metavar="RANK|SHARE",
    callback=parse_rank,
    help="Serve tuners other than LoRA as the nearest pair of this rank, or with this share of the energy.",
)


residual_base = click.option(
    "--residual-base",
    is_flag=True,
    help="BASE is what the adapters' start (PiSSA, CorDA, LoftQ, LoRA-GA) left of the original: add them as they are.",
)


pad_token_id = click.option(
    "--pad-token-id",
    type=click.IntRange(min=0),
    help="Padding token that a classifier on a decoder was trained with.  [default: the adapter's, else the base's]",
)


pooling = click.option(
    "--pooling",
    type=click.Choice((AUTO, NONE, *map(str, Pooling))),
    help="Make an embedding of a text part of the graph, as the sentence-transformers folder says (auto) or so.",
)
