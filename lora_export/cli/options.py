"""Click options that several commands share, each written once with its help."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import click

from lora_export.base.tasks import Task
from lora_export.bench.shapes import Shape, parse_shape
from lora_export.cli.adapter_options import convert_rank, pad_token_id, pooling, residual_base
from lora_export.cli.quantize_options import accuracy_level, asymmetric, block_size, keep, quantize, quantize_method

_DTYPES = ("float32", "float16", "bfloat16")

Decorator = Callable[[Callable], Callable]


def named_paths(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str | None, str]:
    """`NAME=PATH` values as a dict; a bare `PATH` has the key None."""
    found: dict[str | None, str] = {}
    for value in values:
        name, separator, path = value.partition("=")
        found[name if separator else None] = path if separator else value
    return found


def parse_shapes(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[Shape, ...]:
    """`BATCHxSEQUENCE[@PAST]` values as (batch, sequence, past)."""
    shapes = []
    for value in values:
        try:
            shapes.append(parse_shape(value))
        except ValueError:
            raise click.BadParameter(f"{value!r} is not BATCHxSEQUENCE or BATCHxSEQUENCE@PAST, such as 4x128") from None
    return tuple(shapes)


out = click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
overwrite = click.option("--overwrite", is_flag=True, help="Replace what an earlier run wrote in that folder.")
dtype = click.option("--dtype", type=click.Choice(_DTYPES), help="Dtype of the export.  [default: the checkpoint's]")
task = click.option(
    "--task",
    type=click.Choice(tuple(map(str, Task))),
    help="Task of the model.  [default: the adapters' task_type, else the architecture's]",
)
fuse_for = click.option(
    "--provider",
    type=click.Choice(("cpu", "cuda")),
    help="Provider to fuse the graph for; needs no GPU.  [default: cuda if usable here, else cpu]",
)
run_on = click.option(
    "--provider",
    type=click.Choice(("cpu", "cuda")),
    help="Provider to run on; never another than asked for.  [default: cuda if usable, else cpu]",
)
names = click.option(
    "--name", "names", multiple=True, help="Name of an adapter, in their order; repeat.  [default: its folder's name]"
)
no_cache = click.option("--no-cache", is_flag=True, help="Build the graph anew and keep nothing of it.")
graph = click.option("--graph", metavar="PATH", help="Put the adapters onto this graph, which another tool wrote.")
dry_run = click.option("--dry-run", is_flag=True, help="Say what would be read, done and written; write nothing.")
sign_key = click.option(
    "--sign-key",
    type=click.Path(path_type=Path),
    help="Sign what is written with this private key (PEM); needs lora-export[sign].",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
quiet = click.option("--quiet", is_flag=True, help="Print nothing but errors.")
base = click.option("--base", help="Where the base is now, if it has moved since the export.")
moved_adapters = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=PATH",
    callback=named_paths,
    help="Where an adapter is now, if it has moved; repeat.",
)


def parse_limits(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """`MEASURE=LIMIT` values as numbers by measure."""
    found = {}
    for value in values:
        measure, _, limit = value.partition("=")
        try:
            found[measure] = _limit(limit)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not MEASURE=LIMIT, such as top1=0.98") from None
    return found


def _limit(text: str) -> float:
    """A number that something can be above: NaN would let everything pass."""
    number = float(text)
    if math.isnan(number) or number < 0:
        raise ValueError
    return number


def parse_ratio(context: click.Context, option: click.Parameter, value: str | None) -> float | None:
    """A ratio of latencies."""
    try:
        return None if value is None else _limit(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is no ratio, such as 1.10", context, option) from None


tolerances = click.option(
    "--tolerance",
    "tolerances",
    multiple=True,
    metavar="MEASURE=LIMIT",
    callback=parse_limits,
    help="Limit to use instead: of error, features, rounding, kl, top1, perplexity, effect or effect_share; of a "
    "quantized export also of weights, scales, cost_kl, cost_top1, cost_perplexity or cost_effect; repeat.",
)


OPTIONAL, REQUIRED = "optional", "required"
inputs = click.option(
    "--inputs",
    type=click.Choice((OPTIONAL, REQUIRED)),
    default=OPTIONAL,
    show_default=True,
    help="Adapter inputs: with defaults in the graph, or fed in every run (JavaScript cannot feed optional ones).",
)


replace = click.option("--replace", is_flag=True, help="Put an adapter in the place of the one that has its name.")


def together(*options: Decorator) -> Decorator:
    """One decorator of several, listed in `--help` in the order given."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@dataclass(frozen=True)
class ExportFlags:
    """The options of `merge` and `dynamic` together."""

    out: Path
    overwrite: bool
    task: str | None
    dtype: str | None
    provider: str | None
    names: tuple[str, ...]
    residual_base: bool
    pad_token_id: int | None
    pooling: str | None
    quantize: str | None
    quantize_method: str | None
    block_size: str | None
    asymmetric: bool
    accuracy_level: str | None
    keep: tuple[str, ...]
    graph: str | None
    no_cache: bool
    sign_key: Path | None
    dry_run: bool
    as_json: bool
    quiet: bool


@dataclass(frozen=True)
class ExamineFlags:
    """The options of `check` and `bench` together."""

    base: str | None
    adapters: dict[str | None, str]
    provider: str | None
    as_json: bool
    quiet: bool


@dataclass(frozen=True)
class AddFlags:
    """The options of `add`."""

    names: tuple[str, ...]
    convert_rank: float | None
    residual_base: bool
    base: str | None
    replace: bool
    sign_key: Path | None
    as_json: bool
    quiet: bool


@dataclass(frozen=True)
class ExtractFlags:
    """The options of `extract` that it shares with others."""

    out: Path
    overwrite: bool
    task: str | None
    dry_run: bool
    as_json: bool
    quiet: bool


def as_flags(kind: type, *options: Decorator) -> Decorator:
    """`options` as one argument `flags` of `kind`, a dataclass with a field for each."""
    names = [field.name for field in fields(kind)]

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def packed(**given: object) -> object:
            flags = kind(**{name: given.pop(name) for name in names})
            return command(flags=flags, **given)

        return together(*options)(packed)

    return decorate


export_options = as_flags(
    ExportFlags,
    *(
        out,
        overwrite,
        task,
        dtype,
        fuse_for,
        names,
        residual_base,
        pad_token_id,
        pooling,
        quantize,
        quantize_method,
        block_size,
        asymmetric,
        accuracy_level,
        keep,
        graph,
        no_cache,
        sign_key,
        dry_run,
        as_json,
        quiet,
    ),
)
examine_options = as_flags(ExamineFlags, base, moved_adapters, run_on, as_json, quiet)
add_options = as_flags(AddFlags, names, convert_rank, residual_base, base, replace, sign_key, as_json, quiet)
extract_options = as_flags(ExtractFlags, out, overwrite, task, dry_run, as_json, quiet)


def parse_blend(context: click.Context, option: click.Parameter, values: Sequence[str]) -> dict[str, float]:
    """`NAME[=WEIGHT]…` as weights by adapter name."""
    blend = {}
    for value in values:
        name, _, weight = value.partition("=")
        try:
            blend[name] = float(weight or 1)
        except ValueError:
            raise click.BadParameter(f"the weight of {value!r} is no number", context, option) from None
    return blend
