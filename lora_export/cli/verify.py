"""The command `verify`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from lora_export.cli import options
from lora_export.cli.names import moved
from lora_export.cli.output import Display, guarded


@click.command(name="verify", short_help="compare an export with its manifest (exit 1 if a file differs)")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--sources", is_flag=True, help="Also compare the base and the adapters with their recorded hashes.")
@options.base
@options.moved_adapters
@click.option(
    "--signature-key", type=click.Path(path_type=Path), help="Public key (PEM) that the export must be signed with."
)
@options.as_json
@options.quiet
def verify_command(
    out: Path, sources: bool, base: str | None, adapters: dict, signature_key: Path | None, as_json: bool, quiet: bool
) -> None:
    """Compare every file of the export OUT with its manifest; exit 1 if one is missing, changed or extra.

    Offline, in the time it takes to read the files. Reports are left out, as they are written later. Without
    --signature-key this finds damage, not deceit: who can change a file can change the manifest too.

    \b
    Example:
      lora-export verify served --sources --signature-key release.pub
    """
    display = Display(as_json=as_json, quiet=quiet)
    with guarded(display):
        from lora_export.integrity.verify import verify

        overrides = None
        if sources or base or adapters:
            from lora_export.integrity.sources import SourceOverrides

            overrides = SourceOverrides(base, moved(out, adapters))
        found = verify(out, overrides, signature_key=signature_key)
        display.result(found.to_dict(), verification_text)
        sys.exit(0 if found.passed else 1)


def verification_text(value: dict) -> str:
    """`integrity.Verification` for people."""
    size = f"{value['n_files']} files, {value['n_bytes'] / 1e6:,.1f} MB"
    problems = value["problems"]
    if value["passed"]:
        lines = [f"✓ intact: {value['folder']}, {size}, as its manifest says"]
    else:
        lines = [f"✕ not as it was exported: {value['folder']} ({size})"]
    lines += [f"  {problem['kind']:<9}  {problem['name']}  {problem['detail']}".rstrip() for problem in problems]
    wrong = {problem["name"] for problem in problems}
    same = [name for name in value["sources"] if name not in wrong]
    lines += [f"  sources    as they were: {', '.join(same)}"] if same else []
    if value["signature"] != "bad":
        key = "; --signature-key checks it" if value["signature"] == "present, not checked" else ""
        lines.append(f"  signature  {value['signature']}{key}")
    return "\n".join(lines)
