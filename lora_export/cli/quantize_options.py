"""The options of `--quantize`, and what they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import click

from lora_export.errors import UsageProblem
from lora_export.quantization import ACCURACY_LEVELS, AS_STORED, BLOCK_SIZES, INT8_ACTIVATIONS, Method, Quantization

quantize = click.option(
    "--quantize",
    type=click.Choice(("int4", "int8", AS_STORED)),
    help="Store the base's linear maps as integers (MatMulNBits), a quantized base's as they are with as-stored; "
    "adapters stay floats.  [default: floats]",
)
quantize_method = click.option(
    "--quantize-method",
    type=click.Choice((Method.RTN.value, Method.K_QUANT.value, Method.HQQ.value)),
    help="How scales are chosen: each is ONNX Runtime's own quantizer.  [default: rtn]",
)
block_size = click.option(
    "--block-size", type=click.Choice(tuple(map(str, BLOCK_SIZES))), help="Numbers to a scale.  [default: 32]"
)
asymmetric = click.option("--asymmetric", is_flag=True, help="With --quantize: give every block a zero of its own.")
accuracy_level = click.option(
    "--accuracy-level",
    type=click.Choice(tuple(map(str, ACCURACY_LEVELS))),
    help="MatMulNBits' attribute; 4 rounds activations to 8-bit integers.  [default: 4 for cpu, 0 for cuda]",
)
keep = click.option("--keep", multiple=True, metavar="MODULE", help="With --quantize: leave it in floats; repeat.")


class Flags(Protocol):
    """Their values."""

    quantize: str | None
    quantize_method: str | None
    block_size: str | None
    asymmetric: bool
    accuracy_level: str | None
    keep: tuple[str, ...]


def quantization_of(flags: Flags, provider: str) -> Quantization | None:
    """What the options of `--quantize` ask for.

    Raises:
        UsageProblem: One of them is given without it, or an accuracy level to products that have none.
    """
    given = {"--quantize-method": flags.quantize_method, "--block-size": flags.block_size}
    given |= {"--asymmetric": flags.asymmetric, "--keep": flags.keep, "--accuracy-level": flags.accuracy_level}
    if flags.quantize is None:
        if lone := [name for name, value in given.items() if value]:
            raise UsageProblem(f"{lone[0]} says how to quantize", next_step="add --quantize int4 or --quantize int8")
        return None
    if flags.quantize == AS_STORED:
        return _as_stored(flags, given, provider)
    method = Method(flags.quantize_method or Method.RTN)
    if method is Method.HQQ and int(flags.accuracy_level or 0):
        raise UsageProblem(
            "MatMulNBits rounds no activations where a block's zero is a float, as hqq makes it",
            found=f"--accuracy-level {flags.accuracy_level}",
            next_step="leave --accuracy-level out, or choose --quantize-method k_quant",
        )
    return Quantization(
        bits=int(flags.quantize.removeprefix("int")),
        block_size=int(flags.block_size or 32),
        symmetric=not flags.asymmetric,
        accuracy_level=_accuracy_level(flags, provider),
        method=method,
        keep=tuple(flags.keep),
    )


def _accuracy_level(flags: Flags, provider: str) -> int:
    default = INT8_ACTIVATIONS if provider == "cpu" else 0
    return default if flags.accuracy_level is None else int(flags.accuracy_level)


def _as_stored(flags: Flags, given: Mapping[str, object], provider: str) -> Quantization:
    choices = ("--quantize-method", "--block-size", "--asymmetric")
    if chosen := [name for name in choices if given[name]]:
        raise UsageProblem(
            f"--quantize {AS_STORED} takes the base's own integers, of which {chosen[0]} chooses nothing",
            next_step=f"leave {chosen[0]} out, or add --quantize int4 or --quantize int8 instead",
        )
    return Quantization(
        accuracy_level=_accuracy_level(flags, provider), method=Method.AS_STORED, keep=tuple(flags.keep)
    )
