"""Shapes of workloads as people write them: `BATCHxSEQUENCE` or `BATCHxSEQUENCE@PAST`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_export.artifact import Manifest
from lora_export.contract import SINGLE
from lora_export.errors import UsageProblem
from lora_export.reading import model_settings

Shape = tuple[int, int, int]  # batch, sequence, past


def parse_shape(text: str) -> Shape:
    """`4x128` or `4x1@128` as (batch, sequence, past).

    Raises:
        ValueError: It is neither.
    """
    size, at, past = text.partition("@")
    batch, sequence = (int(part) for part in size.split("x"))
    shape = (batch, sequence, int(past) if at else 0)
    if min(shape) < 0 or batch == 0:
        raise ValueError(f"{text!r} has no rows, or less than no tokens or past")
    return shape


def shape_text(shape: Shape) -> str:
    """The inverse of `parse_shape`."""
    batch, sequence, past = shape
    return f"{batch}x{sequence}@{past}" if past else f"{batch}x{sequence}"


def require_positions(folder: Path, manifest: Manifest, shapes: Sequence[Shape]) -> None:
    """Refuse a shape of more tokens than the model has positions, of none (speech and images have a length of their
    own), or a past for a graph that takes none."""
    settings = model_settings(folder)
    sizes = [settings.get(name) for name in ("max_position_embeddings", "n_positions")]
    most = next((size for size in sizes if isinstance(size, int) and size > 0), None)
    takes_past = any(contract.past for contract in manifest.graphs.values())
    for shape in shapes:
        _, sequence, past = shape
        if not sequence and SINGLE in manifest.graphs and _is_of_text(manifest):
            raise UsageProblem("The shape has no tokens", where=f"--shape {shape_text(shape)}")
        if past and not takes_past:
            raise UsageProblem(
                "The export has no cache, so there is no past to go on with",
                where=f"--shape {shape_text(shape)}",
                next_step=f"leave @{past} out",
            )
        if most is not None and sequence + past > most and SINGLE in manifest.graphs and _is_of_text(manifest):
            raise UsageProblem(
                "The shape has more tokens than the model has positions",
                where=f"--shape {shape_text(shape)}",
                expected=f"at most {most} tokens, past included",
                found=f"{sequence + past}",
            )


def _is_of_text(manifest: Manifest) -> bool:
    return any(spec.name == "input_ids" for spec in manifest.contract.inputs)
