"""The options of `--quantize`, and what they ask for."""

from __future__ import annotations

from typing import Protocol

import click

from lora_export.errors import UsageProblem
from lora_export.quantization import ACCURACY_LEVELS, BLOCK_SIZES, INT8_ACTIVATIONS, Method, Quantization

quantize = click.option(
    "--quantize",
    type=click.Choice(("int4", "int8")),
    help="Store the base's linear maps as integers (MatMulNBits); adapters stay floats.  [default: floats]",
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
    method = Method(flags.quantize_method or Method.RTN)
    if method is Method.HQQ and int(flags.accuracy_level or 0):
        raise UsageProblem(
            "MatMulNBits rounds no activations where a block's zero is a float, as hqq makes it",
            found=f"--accuracy-level {flags.accuracy_level}",
            next_step="leave --accuracy-level out, or choose --quantize-method k_quant",
        )
    default = INT8_ACTIVATIONS if provider == "cpu" else 0
    return Quantization(
        bits=int(flags.quantize.removeprefix("int")),
        block_size=int(flags.block_size or 32),
        symmetric=not flags.asymmetric,
        accuracy_level=default if flags.accuracy_level is None else int(flags.accuracy_level),
        method=method,
        keep=tuple(flags.keep),
    )
