"""Rows as a graph's inputs, with the tokenizer or processor in the exported folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_export.base.tasks import Task
from lora_export.check.inputs.examples import MOST_TOKENS, SEED, Batch, Example, Examples
from lora_export.check.inputs.tokenizers import load_tokenizer
from lora_export.contract import GraphContract
from lora_export.errors import InputRefused
from lora_export.runtime.arrays import numpy_dtype
from lora_export.runtime.images import read_image

# Inputs that are no texts: images, and sounds.
_SIGNALS = ("pixel_values", "input_values")
# What takes two texts a row: rerankers, entailment; questions and what they are about.
_OF_PAIRS = (Task.TEXT_CLASSIFICATION, Task.QUESTION_ANSWERING)
# A quarter of a second at 16 kHz, where an axis of samples varies.
_NOISE_SAMPLES = 4000


class Batcher:
    """Turns rows into a graph's inputs, with the tokenizer or processor in the exported folder.

    A row of multiple choice is a text with two endings: its second half, and that of the row before.

    Args:
        tokenizer: See `tokenizers.tokenizer_of`; None for the one in `folder`.
        pad_token_id: What the graph takes for padding (`Manifest.pad_token_id`); None for the tokenizer's.
        n_tokens: Most tokens of a row.
    """

    def __init__(
        self,
        folder: Path,
        task: Task,
        contract: GraphContract,
        *,
        tokenizer: object = None,
        pad_token_id: int | None = None,
        n_tokens: int = MOST_TOKENS,
    ) -> None:
        self._task, self._folder, self._pad_token_id = task, folder, pad_token_id
        self._n_tokens = n_tokens
        self._names = [spec.name for spec in contract.inputs]
        self._signal = next((spec for spec in contract.inputs if spec.name in _SIGNALS), None)
        self._image_processor = _load_image_processor(folder) if self.takes_images else None
        self.tokenizer = (tokenizer or load_tokenizer(folder)) if self.takes_text else None

    def batches(self, examples: Examples, batch_size: int) -> list[Batch]:
        """The examples in batches; texts padded to the longest in the batch (on the right)."""
        rows = examples.rows
        return [self.batch(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]

    def batch(self, rows: Sequence[Example], *, padding_side: str = "right") -> Batch:
        """One batch. Decoders get `position_ids` from the mask, and no past."""
        labels = tuple(row.label for row in rows)
        if self.takes_sounds:
            raise InputRefused(
                "Data of sounds is not read; the export is compared on seeded noise",
                where=rows[0].text_or_file,
                next_step="leave out --data",
            )
        if self.takes_images:
            return Batch({"pixel_values": self._pixel_values(rows)}, None, labels)
        texts = [row.text_or_file for row in rows]
        if self._task is Task.MULTIPLE_CHOICE:
            return self.choices([(text, (text[len(text) // 2 :], texts[i - 1][:99])) for i, text in enumerate(texts)])
        encoded = self._encoded(texts, padding_side, self._others(rows))
        inputs = {name: np.asarray(encoded[name], np.int64) for name in self._names if name in encoded}
        mask = np.asarray(encoded["attention_mask"], np.int64)
        if self._pad_token_id is not None:
            inputs["input_ids"] = np.where(mask == 1, inputs["input_ids"], self._pad_token_id)
        if "position_ids" in self._names:
            inputs["position_ids"] = np.maximum(mask.cumsum(axis=1) - 1, 0)
        if self._signal is not None:  # a dual encoder: images beside the texts, seeded noise
            inputs |= self.noise(len(rows)).inputs
        is_predicted = self._task is Task.TEXT_GENERATION
        return Batch(inputs, mask.astype(bool), labels, "input_ids" if is_predicted else None)

    def choices(self, rows: Sequence[tuple[str, Sequence[str]]]) -> Batch:
        """A batch of texts with endings to choose from, as many for each."""
        texts = [text for text, endings in rows for _ in endings]
        encoded = self._encoded(texts, "right", [ending for _, endings in rows for ending in endings])
        inputs = {name: np.asarray(encoded[name], np.int64) for name in self._names if name in encoded}
        by_row = {name: array.reshape(len(rows), -1, array.shape[1]) for name, array in inputs.items()}
        return Batch(by_row, None, (None,) * len(rows))

    def pairs(self, texts: Sequence[str], others: Sequence[str]) -> Batch:
        """A batch of pairs of texts: questions and what they are about."""
        encoded = self._encoded(texts, "right", others)
        inputs = {name: np.asarray(encoded[name], np.int64) for name in self._names if name in encoded}
        return Batch(inputs, np.asarray(encoded["attention_mask"], bool), (None,) * len(texts))

    def _others(self, rows: Sequence[Example]) -> list[str] | None:
        """The second texts of rows that have two; None where they have one.

        Raises:
            InputRefused: The task takes one.
        """
        pairs = [row.text_pair for row in rows if row.text_pair is not None]
        if not pairs:
            return None
        if self._task not in _OF_PAIRS or len(pairs) < len(rows):
            raise InputRefused(
                f"{self._task} takes one text a row" if len(pairs) == len(rows) else "Rows have one text or two each",
                where=f"text_pair: {pairs[0][:80]}",
                expected="pairs of texts for " + ", ".join(_OF_PAIRS),
                next_step="leave text_pair out",
            )
        return pairs

    def _encoded(self, texts: Sequence[str], padding_side: str, others: Sequence[str] | None = None):
        return self.tokenizer(
            list(texts),
            None if others is None else list(others),
            return_tensors="np",
            padding=True,
            padding_side=padding_side,
            truncation=True,
            max_length=min(self._n_tokens, self.tokenizer.model_max_length),
            # A tokenizer may leave them out where its config does not name them; the model then takes zeros.
            return_token_type_ids="token_type_ids" in self._names,
        )

    def _pixel_values(self, rows: Sequence[Example]) -> np.ndarray:
        images = [read_image(row.text_or_file) for row in rows]
        pixels = self._image_processor(images, return_tensors="np")["pixel_values"]
        return np.asarray(pixels, numpy_dtype(self._signal.dtype))

    def noise(self, n_rows: int) -> Batch:
        """Seeded noise of an image's or a sound's shape, where none is given."""
        shape = [dim if isinstance(dim, int) else _NOISE_SAMPLES for dim in self._signal.dims[1:]]
        values = np.random.default_rng(SEED).standard_normal((n_rows, *shape)).astype(numpy_dtype(self._signal.dtype))
        return Batch({self._signal.name: values}, None, (None,) * n_rows)

    @property
    def noise_description(self) -> str:
        """What `noise` is, in words."""
        return f"seeded noise in the shape of {'sounds' if self.takes_sounds else 'images'}"

    @property
    def takes_images(self) -> bool:
        """Whether a row is an image; a dual encoder's is a text, with an image beside it."""
        return self._signal is not None and not self.takes_sounds and "input_ids" not in self._names

    @property
    def takes_sounds(self) -> bool:
        return self._signal is not None and self._signal.name == "input_values"

    @property
    def takes_text(self) -> bool:
        return not self.takes_images and not self.takes_sounds


def _load_image_processor(folder: Path):
    """The image processor in an exported folder; None if there is none that can be loaded."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):
        return None
