"""How to write an export, as opposed to what is exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExportOptions:
    """How to write an export, as opposed to what (`Request`).

    Attributes:
        targets: Modules to give LoRA inputs besides those that the adapters touch: paths, or their last parts.
        zeros_for_missing_head: Export a head that the checkpoint lacks as zeros (a benchmark's base).
        sign_key: Private key (PEM) to sign the folder with.
        required_inputs: Adapter inputs have no defaults in the graph, for hosts that cannot feed optional inputs.
    """

    out: Path
    overwrite: bool = False
    use_cache: bool = True
    targets: tuple[str, ...] = ()
    zeros_for_missing_head: bool = False
    sign_key: Path | None = None
    required_inputs: bool = False
