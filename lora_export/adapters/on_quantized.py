"""What of an adapter a quantized base does not take: the table beside `support.py`, for `--quantize`.

Everything that is not in it is taken as on a base of floats. It drives the refusals and the docs' table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_export.adapters.initialization import changes_base
from lora_export.errors import InputRefused


@dataclass(frozen=True)
class NotTaken:
    """A refused combination.

    Attributes:
        what: The adapter's option, or what it holds.
        mode: "merge" or "dynamic".
        note: Why.
        way_out: What to do instead.
    """

    what: str
    mode: str
    note: str
    way_out: str


START = NotTaken(
    "init_lora_weights: PiSSA, OLoRA",
    "dynamic",
    "the start takes factors off the base's floats, and the graph has integers",
    "merge it with --quantize int4 (folded first, quantized after), or convert the adapter to plain LoRA with PEFT",
)
HEAD_ROWS = NotTaken(
    "trainable_token_indices on a head",
    "dynamic",
    "the rows would be off by the rounding of the head's own",
    "leave the head in floats with --keep, or merge it with --quantize int4",
)
NOT_TAKEN = (START, HEAD_ROWS)


def require_taken(config: Mapping[str, object], mode: str, adapter: str) -> None:
    """Refuse an adapter by what its `adapter_config.json` says.

    Raises:
        InputRefused: Its start changes the base, and the graph is dynamic.
    """
    if mode == START.mode and changes_base(config):
        refuse(START, adapter, f"adapter_config.json: init_lora_weights = {config['init_lora_weights']!r}")


def refuse(row: NotTaken, adapter: str, where: str) -> None:
    """Raise the refusal of `row`."""
    raise InputRefused(
        f"Adapter {adapter!r} has what `{row.mode} --quantize` does not take ({row.what}): {row.note}",
        where=where,
        next_step=row.way_out,
    )


def markdown_table() -> str:
    """The table as Markdown, for the docs; kept equal to it by a test."""
    rows = ["| with `--quantize` | | |", "|---|---|---|"]
    rows += [f"| {row.what} | refused by `{row.mode}` | {row.note}; instead: {row.way_out} |" for row in NOT_TAKEN]
    return "\n".join(rows) + "\n"
