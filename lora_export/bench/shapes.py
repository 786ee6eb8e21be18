"""Shapes of workloads as people write them: `BATCHxSEQUENCE` or `BATCHxSEQUENCE@PAST`."""

from __future__ import annotations

Shape = tuple[int, int, int]  # batch, sequence, past


def parse_shape(text: str) -> Shape:
    """`4x128` or `4x1@128` as (batch, sequence, past).

    Raises:
        ValueError: It is neither.
    """
    size, _, past = text.partition("@")
    batch, sequence = (int(part) for part in size.split("x"))
    return batch, sequence, int(past or 0)


def shape_text(shape: Shape) -> str:
    """The inverse of `parse_shape`."""
    batch, sequence, past = shape
    return f"{batch}x{sequence}@{past}" if past else f"{batch}x{sequence}"
