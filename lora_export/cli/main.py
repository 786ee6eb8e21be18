"""The command line: parse, one pipeline call, render, exit code. Heavy imports wait until a command runs."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from lora_export import __version__
from lora_export.cli import options, text
from lora_export.cli.bench import bench
from lora_export.cli.check import check
from lora_export.cli.extract import extract
from lora_export.cli.fleet import fleet
from lora_export.cli.names import base_and_adapters, named
from lora_export.cli.output import Display, guarded
from lora_export.cli.quantize_options import quantization_of
from lora_export.cli.run import run
from lora_export.cli.serve import serve_command
from lora_export.cli.verify import verify_command
from lora_export.errors import UsageProblem
from lora_export.named import expanded, refuse_missing, refuse_no_folder
from lora_export.quiet import leave_quantized_layers_out

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class _InOrder(click.Group):
    """Commands as they are added, which is the order of the work, and not by letter."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings=_CONTEXT, no_args_is_help=True)
@click.version_option(__version__, prog_name="lora-export")
def main() -> None:
    """Take LoRA adapters from PyTorch to ONNX Runtime, with proof.

    BASE and ADAPTER are folders or hub ids. OUT is an export: the folder that merge (a merged export) or dynamic (a
    dynamic export) writes.

    Exit codes: 0 done, 1 a gate failed, 2 usage, 3 input refused, 4 environment, 5 latency undecided, 6 a defect.
    """
    # Nothing here needs a network once its inputs are on disk.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not os.environ.get("LORA_EXPORT_DEBUG"):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # Transformers' bars too; `Display` has its own
    collect_rarely()
    leave_quantized_layers_out()


def collect_rarely() -> None:
    """Let Python look for garbage cycles seldom: importing torch and Transformers makes millions of objects that stay,
    and looking through them again and again takes a tenth of an export. At the end, when all of them go, not at all."""
    gc.set_threshold(200_000, 20, 20)
    atexit.register(gc.freeze)


def _export(mode: str, paths: Sequence[str], flags: options.ExportFlags, *, how: ExportHow) -> None:
    display = Display(as_json=flags.as_json, quiet=flags.quiet)
    with guarded(display):
        base, adapters = base_and_adapters(paths, flags.names)
        if mode == "dynamic" and not adapters and not how.targets:
            if not expanded(paths[0]).exists():
                refuse_no_folder(paths[0], kind="base or adapter")
            raise UsageProblem("Nothing to serve: no adapter and no --targets", next_step="name at least one of them")
        display.start(f"lora-export {mode}")
        from lora_export import pipeline
        from lora_export.export import describe
        from lora_export.export.plan import Request

        provider, reason = describe.fuse_provider(flags.provider)
        display.say(f"fusing for {provider} ({reason})")
        request = Request(
            base=base,
            adapters=adapters,
            mode=mode,
            task=flags.task,
            dtype=flags.dtype,
            provider=provider,
            weights=how.weights,
            convert_rank=how.convert_rank,
            residual_base=flags.residual_base,
            pad_token_id=flags.pad_token_id,
            quantization=quantization_of(flags, provider),
            graph=flags.graph,
            pooling=flags.pooling,
        )
        if flags.dry_run:
            found = describe.describe_plan(request, flags.out, how.targets, sign_key=flags.sign_key)
            display.result(found, text.plan_text)
            return
        choice = pipeline.ExportOptions(
            out=flags.out,
            overwrite=flags.overwrite,
            use_cache=not flags.no_cache,
            targets=how.targets,
            sign_key=flags.sign_key,
            required_inputs=how.inputs == options.REQUIRED,
        )
        manifest = pipeline.export(request, choice, progress=display.progress, remark=display.say)
        display.result(describe.describe_export(flags.out, manifest), text.export_text)


@dataclass(frozen=True)
class ExportHow:
    """What only one of `merge` and `dynamic` asks for."""

    weights: tuple[float, ...] = ()
    targets: tuple[str, ...] = ()
    convert_rank: float | None = None
    inputs: str = options.OPTIONAL


@main.command(short_help="fold adapters into one static graph (one task)")
@click.argument("paths", nargs=-1, required=True, metavar="[BASE] [ADAPTER]...")
@click.option(
    "--weight", "weights", multiple=True, type=float, help="Weight of an adapter's delta, in their order.  [default: 1]"
)
@options.export_options
def merge(paths: tuple[str, ...], weights: tuple[float, ...], flags: options.ExportFlags) -> None:
    """Fold adapters into the base's weights and write one static graph.

    BASE may be left out if the adapters record theirs; without an adapter, the base alone is exported. Several
    adapters are folded in together, as the weighted sum of their deltas.

    \b
    Examples:
      lora-export merge all-MiniLM-L6-v2/ adapters/topic -o topic-onnx
      lora-export merge llama/ style tone --weight 0.7 --weight 0.3 -o blend-onnx
    """
    _export("merge", paths, flags, how=ExportHow(weights=weights))


@main.command(short_help="write one graph whose adapters are inputs (many tasks in one batch)")
@click.argument("paths", nargs=-1, required=True, metavar="[BASE] [ADAPTER]...")
@click.option(
    "--targets",
    multiple=True,
    help="Also give this module adapter inputs: a path, its last parts, or all-linear; repeat.",
)
@options.convert_rank
@options.inputs
@options.export_options
def dynamic(
    paths: tuple[str, ...],
    targets: tuple[str, ...],
    convert_rank: float | None,
    inputs: str,
    flags: options.ExportFlags,
) -> None:
    """Write one graph whose adapters are inputs, and each adapter as a file beside it.

    BASE may be left out where the adapters record it.

    \b
    Examples:
      lora-export dynamic all-MiniLM-L6-v2/ adapters/topic adapters/kind -o served
      lora-export dynamic all-MiniLM-L6-v2/ adapters/topic --inputs required -o served-in-a-browser
    """
    _export("dynamic", paths, flags, how=ExportHow(targets=targets, convert_rank=convert_rank, inputs=inputs))


@main.command(short_help="pack one more adapter for a dynamic export")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("paths", nargs=-1, required=True, metavar="ADAPTER...")
@options.add_options
def add(out: Path, paths: tuple[str, ...], flags: options.AddFlags) -> None:
    """Pack one more adapter for the dynamic export OUT, without exporting its graph again.

    A signature of OUT ends with it, unless --sign-key makes it anew.

    \b
    Examples:
      lora-export add served adapters/language
      lora-export add served retrained/topic --replace
    """
    display = Display(as_json=flags.as_json, quiet=flags.quiet)
    with guarded(display):
        for path in paths:
            refuse_missing(path, kind="adapter")
        adapters = named(paths, flags.names)
        display.start("lora-export add")
        from lora_export import pipeline
        from lora_export.artifact import SIGNATURE
        from lora_export.export import describe
        from lora_export.integrity.sources import SourceOverrides

        was_signed = (out / SIGNATURE).exists()
        how = pipeline.AddOptions(flags.convert_rank, flags.residual_base, flags.sign_key, flags.replace)
        manifest = pipeline.add_adapter(
            out, adapters, SourceOverrides(flags.base), options=how, progress=display.progress, remark=display.say
        )
        if was_signed and flags.sign_key is None:
            display.say(f"removed {out / SIGNATURE}: it signed the folder without this adapter (--sign-key signs anew)")
        display.result(describe.describe_export(out, manifest), text.export_text)


@main.command(short_help="take an adapter out of a dynamic export")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@options.sign_key
@options.as_json
@options.quiet
def remove(out: Path, names: tuple[str, ...], sign_key: Path | None, as_json: bool, quiet: bool) -> None:
    """Take adapters out of the dynamic export OUT; its graph stays.

    A signature of OUT ends with it, unless --sign-key makes it anew.

    \b
    Example:
      lora-export remove served topic
    """
    display = Display(as_json=as_json, quiet=quiet)
    with guarded(display):
        from lora_export import pipeline
        from lora_export.artifact import SIGNATURE
        from lora_export.export import describe

        was_signed = (out / SIGNATURE).exists()
        manifest = pipeline.remove_adapters(out, names, sign_key=sign_key, remark=display.say)
        if was_signed and sign_key is None:
            display.say(f"removed {out / SIGNATURE}: it signed the folder with this adapter (--sign-key signs anew)")
        display.result(describe.describe_export(out, manifest), text.export_text)


main.add_command(check)
main.add_command(bench)
main.add_command(verify_command)
main.add_command(extract)
main.add_command(fleet)


@main.command(name="inspect", short_help="say what an adapter, a base or an export holds")
@click.argument("path")
@options.as_json
def inspect_command(path: str, as_json: bool) -> None:
    """Say what an adapter, base or export holds, and what would be done with it.

    \b
    Example:
      lora-export inspect adapters/topic
    """
    display = Display(as_json=as_json, quiet=False)
    with guarded(display):
        from lora_export.export import describe

        display.result(describe.inspect_path(path), text.inspect_text)


main.add_command(run)
main.add_command(serve_command)


if __name__ == "__main__":
    main()
