"""Sound files as a speech export's input: 16-bit WAV, through the feature extractor in the exported folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_export.artifact import Manifest
from lora_export.contract import ENCODER
from lora_export.errors import InputRefused
from lora_export.runtime.arrays import numpy_dtype
from lora_export.runtime.sound import read_wav


def read_features(folder: Path, files: Sequence[str], manifest: Manifest) -> np.ndarray:
    """The files' spectrograms, `[batch, bands, frames]` in the export's dtype, padded or cut to the encoder's length.

    Raises:
        InputRefused: The folder has no feature extractor, or one of another model, or a file is no 16-bit WAV of its
            sampling rate.
    """
    extractor = _extractor(folder)
    sounds = [read_wav(Path(file), extractor.sampling_rate, where=file) for file in files]
    found = extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="np")["input_features"]
    spec = next(spec for spec in manifest.graphs[ENCODER].inputs if spec.name == "input_features")
    if found.shape[1:] != spec.dims[1:]:
        raise InputRefused(
            "The feature extractor does not make what the encoder takes",
            where=f"{folder}: preprocessor_config.json",
            expected=f"{spec.dims[1]} bands, {spec.dims[2]} frames",
            found=f"{found.shape[1]} bands, {found.shape[2]} frames",
            next_step="export from a base folder whose preprocessor_config.json belongs to its weights",
        )
    return np.asarray(found, numpy_dtype(spec.dtype))


def read_samples(folder: Path, file: str) -> np.ndarray:
    """A file as the model of `folder` takes one sound: samples `[1, n]`, or a spectrogram `[1, frames, bands]`.

    Raises:
        InputRefused: As of `read_features`.
    """
    extractor = _extractor(folder)
    sound = read_wav(Path(file), extractor.sampling_rate, where=file)
    return extractor([sound], sampling_rate=extractor.sampling_rate, return_tensors="np")["input_values"]


def _extractor(folder: Path):
    from transformers import AutoFeatureExtractor

    try:
        return AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputRefused(
            "The exported folder has no feature extractor, so sound cannot be turned into inputs",
            where=str(folder),
            expected="preprocessor_config.json",
            next_step="export from a base folder that holds it",
        ) from error
