"""Inputs to compare on: real text or images, from a file or from the machine, in padded batches."""

from __future__ import annotations

import inspect
import pkgutil
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_export.errors import InputRefused, some_of
from lora_export.named import no_such
from lora_export.reading import json_of

SEED = 2106_09685
BUILT_IN_ROWS = 16
MOST_TOKENS = 96


@dataclass(frozen=True)
class Example:
    """A text, or two of them, or the path of an image, and its class if the data names one."""

    text_or_file: str
    label: int | None = None
    text_pair: str | None = None


@dataclass(frozen=True)
class Batch:
    """Inputs of the rows of a batch.

    Attributes:
        inputs: Arrays by input name, `[batch, …]`.
        real: The mask of real positions `[batch, sequence]`; None for images.
        labels: The rows' classes, None where unknown.
        predicted: The input that a language model predicts the next tokens of; None for other models.
    """

    inputs: dict[str, np.ndarray]
    real: np.ndarray | None
    labels: tuple[int | None, ...]
    predicted: str | None = None

    @property
    def targets(self) -> np.ndarray | None:
        """The token that follows each position, `[batch, sequence]`, -1 where none does; None for other models."""
        if self.predicted is None:
            return None
        ids = self.inputs[self.predicted]
        found = np.full_like(ids, -1)
        is_followed = self.real[:, :-1] & self.real[:, 1:]
        found[:, :-1][is_followed] = ids[:, 1:][is_followed]
        return found


@dataclass(frozen=True)
class Examples:
    """Rows to compare on, and where they came from in words."""

    rows: tuple[Example, ...]
    description: str


def read_examples(path: Path, limit: int) -> Examples:
    """Examples from a text file (a row a line), JSON lines (`text`, optionally `text_pair` and `label_id`), or a folder
    of images.

    Raises:
        InputRefused: The file is missing, empty, a line is not what its suffix promises, or some lines have one text
            and others two.
    """
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp"))
        rows = tuple(Example(str(file)) for file in files)
    elif path.is_file():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise InputRefused("The data is not UTF-8 text", where=str(path), found=str(error)) from error
        parse = _json_example if path.suffix == ".jsonl" else lambda where, line: Example(line)
        rows = tuple(parse(f"{path}:{n}", line) for n, line in enumerate(lines, 1) if line.strip())
    else:
        raise no_such("data file", path)
    if not rows:
        raise InputRefused("The data holds no examples", where=str(path))
    if len({row.text_pair is None for row in rows}) > 1:
        raise InputRefused(
            "Some lines of the data have two texts, and others one",
            where=str(path),
            expected="text_pair in every line, or in none",
        )
    chosen = spread(rows, limit)
    return Examples(chosen, f"{path} ({len(chosen)} of {len(rows)} rows)")


def require_classes(examples: Examples, n_classes: int | None) -> None:
    """Refuse a label that is none of a head's classes.

    Args:
        n_classes: How many there are; None where labels are not looked at.

    Raises:
        InputRefused: There is one.
    """
    labels = {row.label for row in examples.rows} - {None}
    wrong = [label for label in sorted(labels) if n_classes is not None and not 0 <= label < n_classes]
    if wrong:
        raise InputRefused(
            "A label of the data is none of the head's classes",
            where=examples.description,
            expected=f"label_id from 0 to {n_classes - 1}",
            found=some_of(list(map(str, wrong)), 4),
        )


def spread(rows: Sequence[Example], most: int) -> tuple[Example, ...]:
    """At most so many of `rows`, evenly, since files are often sorted by class."""
    n_chosen = min(most, len(rows))
    return tuple(rows[i * len(rows) // n_chosen] for i in range(n_chosen))


def _json_example(where: str, line: str) -> Example:
    try:
        fields = json_of(line)
        text, label, pair = str(fields["text"]), fields.get("label_id"), fields.get("text_pair")
        if not isinstance(label, int | None) or not isinstance(pair, str | None):
            raise TypeError("a class is a number, and a second text a text")
        other = next((name for name in ("label", "labels") if isinstance(fields.get(name), int)), None)
        if label is None and other is not None:
            raise InputRefused(
                "A line of the data has its class under another name",
                where=where,
                expected="label_id",
                found=other,
            )
        return Example(text, label, pair)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputRefused(
            "A line of the data is not an example",
            where=where,
            expected='{"text": …, "text_pair": …, "label_id": …}',
            found=line[:80],
        ) from error


def built_in_examples(n_rows: int = BUILT_IN_ROWS) -> Examples:
    """Docstrings of Python's standard library, short to long, the same on every machine with this Python."""
    texts = sorted(set(_docstrings()), key=lambda text: (len(text), text))
    strata = [texts[i * len(texts) // n_rows : (i + 1) * len(texts) // n_rows] for i in range(n_rows)]
    rng = random.Random(SEED)
    rows = [Example(rng.choice(stratum)) for stratum in strata]
    return Examples(tuple(rows), f"{n_rows} docstrings of Python's standard library, stratified by length")


def as_pairs(examples: Examples) -> Examples:
    """Each text as two, of its first and its second half: what a model of pairs is asked."""
    halves = [row.text_or_file.split() for row in examples.rows]
    texts = [(" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])) for words in halves]
    rows = [Example(one, row.label, other) for row, (one, other) in zip(examples.rows, texts, strict=True)]
    return Examples(tuple(rows), f"{examples.description}, each as a pair of its halves")


def _docstrings() -> Iterator[str]:
    import argparse
    import collections
    import email.message
    import logging
    import pathlib
    import statistics
    import string
    import textwrap
    import threading

    for module in (
        argparse,
        collections,
        email.message,
        logging,
        pathlib,
        statistics,
        string,
        textwrap,
        threading,
        pkgutil,
    ):
        for _, thing in inspect.getmembers(module, lambda m: inspect.isfunction(m) or inspect.isclass(m)):
            text = " ".join((inspect.getdoc(thing) or "").split())
            if 10 <= len(text) <= 1200:
                yield text
