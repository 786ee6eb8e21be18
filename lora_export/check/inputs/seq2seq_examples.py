"""Inputs to compare an encoder-decoder on: sources and the targets to decode at, from text or seeded noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_export.artifact import Manifest
from lora_export.check.inputs.examples import MOST_TOKENS, SEED, Batch, Example, Examples
from lora_export.check.inputs.tokenizers import load_tokenizer
from lora_export.contract import ENCODER
from lora_export.errors import InputRefused
from lora_export.reading import CONFIG, read_json, size_in, tokens_in, vocabulary_size
from lora_export.runtime.arrays import numpy_dtype

_MOST_TARGETS = 48
_NOISE_TARGETS = 24


class Seq2SeqBatcher:
    """Turns rows into the inputs of a text-to-text export, or makes noise in the shape of a speech export's.

    A text is its own target: the decoder is given the start token and then the text, as in training on copying it.

    Args:
        tokenizer: See `tokenizers.tokenizer_of`; None for the one in `folder`.
    """

    noise_description = "seeded noise in the shape of spectrograms, decoded at seeded tokens"

    def __init__(
        self, folder: Path, manifest: Manifest, tokenizer: object = None, *, n_tokens: int = MOST_TOKENS
    ) -> None:
        self._folder = folder
        specs = {spec.name: spec for spec in manifest.graphs[ENCODER].inputs}
        self._features = specs.get("input_features")
        config, where = read_json(folder / CONFIG), folder / CONFIG
        longest = size_in(config, "max_position_embeddings", "max_target_positions", where=where) or MOST_TOKENS
        self._most_source, self._most_targets = min(n_tokens, longest), min(_MOST_TARGETS, n_tokens, longest)
        self._vocabulary = vocabulary_size(folder)
        starts = (tokens_in(config, f"{name}_token_id", where) for name in ("decoder_start", "bos", "pad"))
        self.start_id: int = next((tokens[0] for tokens in starts if tokens), 0)
        self.tokenizer = (tokenizer or load_tokenizer(folder)) if self.takes_text else None

    @property
    def takes_text(self) -> bool:
        return self._features is None

    def batches(self, examples: Examples, batch_size: int) -> list[Batch]:
        """The examples in batches; sources padded to the longest in the batch (on the right), targets likewise."""
        rows = examples.rows
        return [self.batch(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]

    def batch(self, rows: Sequence[Example], *, padding_side: str = "right") -> Batch:
        """One batch; `padding_side` is that of the sources, and `real` marks the targets that are no padding.

        Raises:
            InputRefused: The export takes speech, which is not read from files.
        """
        if not self.takes_text:
            raise InputRefused(
                "Data for a speech export is not read; it is compared on seeded noise",
                where=rows[0].text_or_file,
                next_step="leave out --data",
            )
        if pair := next((row.text_pair for row in rows if row.text_pair is not None), None):
            raise InputRefused(
                "An encoder-decoder takes one text a row", where=f"text_pair: {pair[:80]}",
                next_step="leave text_pair out",
            )  # fmt: skip
        encoded = self.tokenizer(
            [row.text_or_file for row in rows],
            return_tensors="np",
            padding=True,
            padding_side=padding_side,
            truncation=True,
            max_length=self._most_source,
        )
        inputs = {name: np.asarray(encoded[name], np.int64) for name in ("input_ids", "attention_mask")}
        texts = [ids[mask == 1] for ids, mask in zip(*inputs.values(), strict=True)]
        targets = [[self.start_id, *text[: self._most_targets - 1]] for text in texts]
        inputs["decoder_input_ids"], real = self._padded(targets)
        return Batch(inputs, real, tuple(row.label for row in rows), "decoder_input_ids")

    def _padded(self, targets: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.array([len(target) for target in targets])
        real = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(real.shape, self.tokenizer.pad_token_id, np.int64)
        ids[real] = np.concatenate(targets)
        return ids, real

    def noise(self, n_rows: int) -> Batch:
        """Seeded spectrograms, and seeded tokens to decode at."""
        rng = np.random.default_rng(SEED)
        shape = (n_rows, *self._features.dims[1:])
        targets = rng.integers(0, self._vocabulary, (n_rows, min(_NOISE_TARGETS, self._most_targets)))
        targets[:, 0] = self.start_id
        features = rng.standard_normal(shape).astype(numpy_dtype(self._features.dtype))
        inputs = {"input_features": features, "decoder_input_ids": targets}
        return Batch(inputs, np.ones(targets.shape, bool), (None,) * n_rows, "decoder_input_ids")
