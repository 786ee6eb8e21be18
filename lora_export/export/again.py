"""An export asked for again, as its manifest says that it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from lora_export.artifact import Manifest
from lora_export.export.plan import Request
from lora_export.export.pooling import pooling_again
from lora_export.integrity.sources import locate_graph_source
from lora_export.quantization import requested_of


def asked_again(
    manifest: Manifest, base: Path, adapters: Sequence[tuple[str, str | None]], *, mode: Literal["merge", "dynamic"]
) -> Request:
    """A request for other adapters on the same base, with the task, dtype, provider, pad token and quantization of
    an export; not with its given graph, nor with its embedding, which go by what they are asked for."""
    return Request(
        base=str(base),
        adapters=tuple(adapters),
        mode=mode,
        task=manifest.task,
        dtype=manifest.dtype,
        provider=manifest.provider,
        pad_token_id=manifest.pad_token_id,
        quantization=requested_of(manifest.quantization),
    )


def merged_again(manifest: Manifest, base: Path, adapters: Mapping[str, Path], *, folded: Sequence[str]) -> Request:
    """A request for an export with some of its adapters folded in, of its given graph and with its embedding, if any.

    Args:
        adapters: Where those of the manifest are now.
        folded: The names of those to fold.
    """
    given = manifest.given_graph
    return replace(
        asked_again(manifest, base, [(str(adapters[name]), name) for name in folded], mode="merge"),
        residual_base=any(record.residual_base for record in manifest.adapters),
        graph=None if given is None else str(locate_graph_source(given)),
        pooling=pooling_again(manifest.sentence_embedding, base, adapters),
    )
