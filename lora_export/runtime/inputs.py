"""What a host has, as a graph's inputs: texts, pairs of texts, image files, sounds. NumPy, and what reads the files.

Texts need the package `tokenizers`, images Pillow. Nothing is cut: what is too long for the model is for it to refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_export.contract import ENCODER, GraphContract
from lora_export.errors import UsageProblem
from lora_export.named import no_such
from lora_export.reading import is_file, model_settings
from lora_export.runtime.arrays import numpy_dtype
from lora_export.runtime.images import open_image_steps, read_image
from lora_export.runtime.sound import open_log_mel, open_samples, read_wav
from lora_export.runtime.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from lora_export.runtime.adapter_session import AdapterSession
    from lora_export.runtime.bank import RowAdapter
    from lora_export.runtime.seq2seq_session import Seq2SeqSession

# A text, two of them, the path of an image or a WAV file, or a sound's samples.
Given = str | tuple[str, str] | Path | np.ndarray


def inputs_of(
    session: AdapterSession | Seq2SeqSession, rows: Sequence[Given], adapter: RowAdapter = None
) -> dict[str, np.ndarray]:
    """The inputs of `rows` by name, by the tokenizer or processor that `adapter` was trained with.

    1. Texts: `input_ids`, `attention_mask` and, of pairs, `token_type_ids`, int64 `[rows, longest]`, filled up on the
       right.
    2. Images: `pixel_values` `[rows, 3, height, width]`, where the processor is one that `open_image_steps` knows.
    3. Sounds: for Whisper `input_features` `[rows, bands, frames]`, for Wav2Vec2 and its kin `input_values`
       `[rows, samples]`, where all are of one length.

    Raises:
        UsageProblem: The graph takes something else, such as images beside texts.
        InputRefused, EnvironmentUnusable: A file, a tokenizer or a processor cannot be used.
    """
    if isinstance(rows, str | tuple) or not len(rows):
        raise UsageProblem("`rows` is one text, or there is none", expected="a list", next_step="write [text]")
    several = session.manifest.graphs.get(ENCODER)
    contract = session.manifest.contract if several is None else several
    place, export = session.preprocessing(adapter), session.folder
    signal = next((spec for spec in contract.inputs if spec.name in _SIGNALS), None)
    if signal is None and any(spec.name == "input_ids" for spec in contract.inputs):
        pad = session.manifest.pad_token_id
        pad = model_settings(export).get("pad_token_id") or 0 if pad is None else pad
        return _of_texts(rows, session.tokenizer(adapter), contract, pad=pad)
    if signal is None or len(contract.inputs) > 1:
        raise UsageProblem(
            "The graph's inputs are not made of files or texts alone here",
            where=str(export),
            found=", ".join(spec.name for spec in contract.inputs),
            next_step="make them with the processor of Transformers that the base has",
        )
    made = list(map(_SIGNALS[signal.name](place, export), rows))
    if len({array.shape for array in made}) > 1:
        raise UsageProblem("Sounds of different lengths are no batch", next_step="run each alone")
    return {signal.name: np.stack(made).astype(numpy_dtype(signal.dtype))}


def _of_texts(
    rows: Sequence[Given], tokenizer: TextTokenizer, contract: GraphContract, *, pad: int
) -> dict[str, np.ndarray]:
    if wrong := next((row for row in rows if not isinstance(row, str | tuple)), None):
        raise UsageProblem("The graph takes texts", found=type(wrong).__name__)
    pairs = [tokenizer.encode_pair(*row) if isinstance(row, tuple) else (tokenizer.encode_source(row), None)
             for row in rows]  # fmt: skip
    longest = max(len(ids) for ids, _ in pairs)
    ids = np.full((len(rows), longest), pad, np.int64)
    mask, types = np.zeros_like(ids), np.zeros_like(ids)
    for row, (own, own_types) in enumerate(pairs):
        ids[row, : len(own)], mask[row, : len(own)] = own, 1
        types[row, : len(own)] = 0 if own_types is None else own_types
    has_types = any(spec.name == "token_type_ids" for spec in contract.inputs)
    return {"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": types} if has_types else {})


def _pixels(place: Path, export: Path) -> Callable[[Given], np.ndarray]:
    steps = open_image_steps(place, export)

    def seen(row: Given) -> np.ndarray:
        if not isinstance(row, str | Path) or not is_file(Path(row)):
            raise no_such("image file", str(row))
        return steps.pixels(read_image(str(row)))

    return seen


def _sounds(open_settings: Callable, place: Path, export: Path) -> Callable[[Given], np.ndarray]:
    ears = open_settings(place, export)

    def heard(row: Given) -> np.ndarray:
        samples = row if isinstance(row, np.ndarray) else read_wav(Path(row), ears.rate, where=str(row))
        return ears.features(samples)

    return heard


# What makes a graph's input of a row, by the input's name.
_SIGNALS = {
    "pixel_values": _pixels,
    "input_features": partial(_sounds, open_log_mel),
    "input_values": partial(_sounds, open_samples),
}
