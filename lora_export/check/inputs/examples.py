"""Inputs to compare on: real text or images, from a file or from the machine, in padded batches."""

from __future__ import annotations

import inspect
import json
import pkgutil
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_export.base.tasks import Task
from lora_export.check.inputs.tokenizers import load_tokenizer
from lora_export.contract import GraphContract
from lora_export.errors import InputRefused
from lora_export.runtime.arrays import numpy_dtype

SEED = 2106_09685
_BUILT_IN_ROWS = 16
MOST_TOKENS = 96


@dataclass(frozen=True)
class Example:
    """A text, or the path of an image, and its class if the data names one."""

    text_or_file: str
    label: int | None = None


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
    """Examples from a text file (a row a line), JSON lines (`text`, optionally `label_id`), or a folder of images.

    Raises:
        InputRefused: The file is missing, empty, or a line is not what its suffix promises.
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
        raise InputRefused("There is no such data file", where=str(path))
    if not rows:
        raise InputRefused("The data holds no examples", where=str(path))
    # An even spread, since files are often sorted by class.
    chosen = [rows[i * len(rows) // min(limit, len(rows))] for i in range(min(limit, len(rows)))]
    return Examples(tuple(chosen), f"{path} ({len(chosen)} of {len(rows)} rows)")


def _json_example(where: str, line: str) -> Example:
    try:
        fields = json.loads(line)
        return Example(str(fields["text"]), fields.get("label_id"))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputRefused(
            "A line of the data is not an example", where=where, expected='{"text": …, "label_id": …}', found=line[:80]
        ) from error


def built_in_examples(n_rows: int = _BUILT_IN_ROWS) -> Examples:
    """Docstrings of Python's standard library, short to long, the same on every machine with this Python."""
    texts = sorted(set(_docstrings()), key=lambda text: (len(text), text))
    strata = [texts[i * len(texts) // n_rows : (i + 1) * len(texts) // n_rows] for i in range(n_rows)]
    rng = random.Random(SEED)
    rows = [Example(rng.choice(stratum)) for stratum in strata]
    return Examples(tuple(rows), f"{n_rows} docstrings of Python's standard library, stratified by length")


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


class Batcher:
    """Turns rows into a graph's inputs, with the tokenizer or processor in the exported folder.

    Args:
        tokenizer: See `tokenizers.tokenizer_of`; None for the one in `folder`.
        pad_token_id: What the graph takes for padding (`Manifest.pad_token_id`); None for the tokenizer's.
    """

    noise_description = "seeded noise in the shape of images"

    def __init__(
        self,
        folder: Path,
        task: Task,
        contract: GraphContract,
        tokenizer: object = None,
        pad_token_id: int | None = None,
    ) -> None:
        self._task, self._folder, self._pad_token_id = task, folder, pad_token_id
        self._names = [spec.name for spec in contract.inputs]
        self._pixels = next((spec for spec in contract.inputs if spec.name == "pixel_values"), None)
        if self.takes_images:
            self._processor, self.tokenizer = _load_image_processor(folder), None
        else:
            self._processor = self.tokenizer = tokenizer or load_tokenizer(folder)

    def batches(self, examples: Examples, batch_size: int) -> list[Batch]:
        """The examples in batches; texts padded to the longest in the batch (on the right)."""
        rows = examples.rows
        return [self.batch(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]

    def batch(self, rows: Sequence[Example], *, padding_side: str = "right") -> Batch:
        """One batch. Decoders get `position_ids` from the mask, and no past."""
        labels = tuple(row.label for row in rows)
        if self.takes_images:
            return Batch({"pixel_values": self._pixel_values(rows)}, None, labels)
        encoded = self._processor(
            [row.text_or_file for row in rows],
            return_tensors="np",
            padding=True,
            padding_side=padding_side,
            truncation=True,
            max_length=min(MOST_TOKENS, self._processor.model_max_length),
            # A tokenizer may leave them out where its config does not name them; the model then takes zeros.
            return_token_type_ids="token_type_ids" in self._names,
        )
        inputs = {name: np.asarray(encoded[name], np.int64) for name in self._names if name in encoded}
        mask = np.asarray(encoded["attention_mask"], np.int64)
        if self._pad_token_id is not None:
            inputs["input_ids"] = np.where(mask == 1, inputs["input_ids"], self._pad_token_id)
        if "position_ids" in self._names:
            inputs["position_ids"] = np.maximum(mask.cumsum(axis=1) - 1, 0)
        if self._pixels is not None:  # a dual encoder: images beside the texts, seeded noise
            inputs |= self.noise(len(rows)).inputs
        is_predicted = self._task is Task.TEXT_GENERATION
        return Batch(inputs, mask.astype(bool), labels, "input_ids" if is_predicted else None)

    def _pixel_values(self, rows: Sequence[Example]) -> np.ndarray:
        from PIL import Image

        try:
            images = [Image.open(row.text_or_file).convert("RGB") for row in rows]
        except OSError as error:
            raise InputRefused("A file is no image that Pillow reads", found=str(error)) from error
        pixels = self._processor(images, return_tensors="np")["pixel_values"]
        return np.asarray(pixels, numpy_dtype(self._pixels.dtype))

    def noise(self, n_rows: int) -> Batch:
        """Seeded noise of an image's shape, where no image is given."""
        shape = (n_rows, *self._pixels.dims[1:])
        values = np.random.default_rng(SEED).standard_normal(shape).astype(numpy_dtype(self._pixels.dtype))
        return Batch({"pixel_values": values}, None, (None,) * n_rows)

    @property
    def takes_images(self) -> bool:
        """Whether a row is an image; a dual encoder's is a text, with an image beside it."""
        return self._pixels is not None and "input_ids" not in self._names

    @property
    def takes_text(self) -> bool:
        return not self.takes_images


def _load_image_processor(folder: Path):
    """The image processor in an exported folder; None if there is none that can be loaded."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):
        return None
