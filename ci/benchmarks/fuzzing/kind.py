"""A kind of input that comes from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fuzzing.mutations import Form


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        seeds: Valid inputs.
        words: See `mutations.mutated`.
        read: Reads an input's bytes as the commands do.
        floor_bytes: Memory that it may take beyond twice the input.
    """

    name: str
    form: Form
    seeds: tuple[bytes, ...]
    read: Callable[[bytes], object]
    words: tuple[object, ...] = ()
    floor_bytes: int = 32 << 20


def of_a_file(name: str, form: Form, file: Path, seeds: Sequence[bytes], read, words: Sequence[object] = ()) -> Kind:
    """A kind whose inputs are read from `file`."""

    def read_file(content: bytes) -> object:
        file.write_bytes(content)
        return read()

    return Kind(name, form, tuple(seeds), read_file, tuple(words))
