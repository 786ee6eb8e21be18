"""Sounds as a speech model's inputs: WAV files as samples, and samples as they are or as Whisper's spectrogram.

NumPy only.

The spectrogram is that of Whisper (Radford et al., arXiv 2212.04356, section 2.2, and `whisper/audio.py`), as
Transformers' `WhisperFeatureExtractor` makes it: with filters after Slaney's Auditory Toolbox (1998).
"""

from __future__ import annotations

import functools
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lora_export.errors import InputRefused
from lora_export.named import no_such
from lora_export.reading import CONFIG, first_settings, model_settings, size_in

_SETTINGS = "preprocessor_config.json"
_OF_SPECTROGRAMS, _OF_SAMPLES = "WhisperFeatureExtractor", "Wav2Vec2FeatureExtractor"
# Of Slaney's scale: linear up to the break, with a step of 200/3 Hz a mel, then 27 steps to 6.4 times the frequency.
_BREAK_HZ, _HZ_A_MEL, _RATIO, _STEPS = 1000.0, 200 / 3, 6.4, 27
# The end of the highest band, at any rate.
_HIGHEST_HZ = 8000.0
_LEAST_POWER, _DECADES = 1e-10, 8.0
# A size of a WAV file's samples that its writer did not know: it wrote to a pipe. 0x7FFFF000, 0x80000000, 0xFFFFFFFF.
_LEAST_UNKNOWN = 0x7FFFF000


@dataclass(frozen=True)
class LogMel:
    """Makes spectrograms of sounds.

    Attributes:
        rate: Samples a second.
        n_samples: Of a whole input; shorter sounds are followed by silence.
        hop: Samples from a frame to the next.
        window: Samples of a frame.
    """

    rate: int
    n_samples: int
    n_bands: int
    hop: int
    window: int

    def features(self, samples: np.ndarray) -> np.ndarray:
        """Log power by band and frame, float32 `[bands, frames]`, of samples in [-1, 1), float32 `[n]`.

        Raises:
            InputRefused: There are none, or more than an input takes.
        """
        if not 0 < len(samples) <= self.n_samples:
            raise InputRefused(
                "The sound is longer than the model takes at a time, or there is none",
                expected=f"at most {self.n_samples / self.rate:g} s",
                found=f"{len(samples) / self.rate:g} s",
                next_step="cut it where nobody speaks",
            )
        whole = np.zeros(self.n_samples)
        whole[: len(samples)] = samples
        padded = np.pad(whole, self.window // 2, mode="reflect")
        n_frames = self.n_samples // self.hop  # one more is made, and left out
        frames = np.lib.stride_tricks.sliding_window_view(padded, self.window)[:: self.hop][:n_frames]
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self.window) / self.window)
        power = np.abs(np.fft.rfft(frames * hann)) ** 2
        logs = np.log10(np.maximum(_filters(self.n_bands, self.window, self.rate) @ power.T, _LEAST_POWER))
        return ((np.maximum(logs, logs.max() - _DECADES) + 4) / 4).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _filters(n_bands: int, window: int, rate: int) -> np.ndarray:
    """Triangles of equal area over the frequencies of a frame, `[bands, window / 2 + 1]`."""
    edges = _hertz(np.linspace(0, _mels(_HIGHEST_HZ), n_bands + 2))
    frequencies = np.linspace(0, rate // 2, window // 2 + 1)
    rising = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]


def _mels(hertz: float) -> float:
    above = max(hertz, _BREAK_HZ)
    return min(hertz, _BREAK_HZ) / _HZ_A_MEL + np.log(above / _BREAK_HZ) * _STEPS / np.log(_RATIO)


def _hertz(mels: np.ndarray) -> np.ndarray:
    least = _BREAK_HZ / _HZ_A_MEL
    above = np.exp(np.maximum(mels - least, 0) * np.log(_RATIO) / _STEPS)
    return np.minimum(mels, least) * _HZ_A_MEL * above


def open_log_mel(place: Path, export: Path) -> LogMel:
    """By the settings in `place`, a folder of `export`, or else in the export's own.

    Raises:
        InputRefused: There are none, or they are not Whisper's.
    """
    fields, where = _settings(place, export, _OF_SPECTROGRAMS, refused=("dither", "do_normalize"))
    names = ("sampling_rate", "chunk_length", "feature_size", "hop_length", "n_fft")
    rate, seconds, n_bands, hop, window = (_size(fields, name, where) for name in names)
    return LogMel(rate, rate * seconds, n_bands, hop, window)


@dataclass(frozen=True)
class Samples:
    """Makes inputs of sounds for a model that takes samples, such as Wav2Vec2 and HuBERT.

    Attributes:
        rate: Samples a second.
        is_normalized: Whether a sound's samples get mean 0 and variance 1.
        least: Samples of the shortest sound, of which the model's convolutions make one frame.
    """

    rate: int
    is_normalized: bool
    least: int = 1

    def features(self, samples: np.ndarray) -> np.ndarray:
        """The samples `[n]` in float32 as the model takes them.

        Raises:
            InputRefused: There are fewer than the model makes a frame of.
        """
        if len(samples) < self.least:
            raise InputRefused(
                "The sound is shorter than the model takes",
                expected=f"at least {self.least} samples, {self.least / self.rate:g} s",
                found=f"{len(samples)} samples",
            )
        if self.is_normalized:
            samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
        return samples.astype(np.float32)


def open_samples(place: Path, export: Path) -> Samples:
    """By the settings in `place`, a folder of `export`, or else in the export's own; convolutions are the model's.

    Raises:
        InputRefused: There are none, or they are not Wav2Vec2's.
    """
    fields, where = _settings(place, export, _OF_SAMPLES)
    if not isinstance(is_normalized := fields.get("do_normalize", True), bool):
        raise InputRefused("A setting of the sounds is not true or false", where=f"{where}: do_normalize")
    return Samples(_size(fields, "sampling_rate", where), is_normalized, _least_samples(export))


def _least_samples(export: Path) -> int:
    """Of how many the convolutions of Wav2Vec2 and its kin, without padding, make one frame; 1 where there are none.

    SEW makes one of `squeeze_factor` frames.
    """
    config, where = model_settings(export), export / CONFIG
    kernels, strides = (config.get(name) or [] for name in ("conv_kernel", "conv_stride"))
    are_lists = isinstance(kernels, list) and isinstance(strides, list) and len(kernels) == len(strides)
    if not are_lists or not all(type(size) is int and size > 0 for size in (*kernels, *strides)):
        raise InputRefused(
            "A setting of the model is not what it should be",
            where=f"{where}: conv_kernel, conv_stride",
            expected="as many sizes in each, whole numbers above zero",
            found=f"{kernels}, {strides}"[:200],
        )
    least = size_in(config, "squeeze_factor", where=where) or 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        least = (least - 1) * stride + kernel
    return least


def _settings(place: Path, export: Path, kind: str, *, refused: Sequence[str] = ()) -> tuple[Mapping, Path]:
    """The settings of an extractor of this kind, none of the `refused` among them, and where they stand."""
    fields, where = first_settings(_SETTINGS, place, export)
    if fields.get("feature_extractor_type") != kind or any(fields.get(name) for name in refused):
        without = f" without {' and '.join(refused)}" if refused else ""
        raise InputRefused(
            "The exported folder does not say how sounds become the model's inputs in a way that is known here",
            where=str(where),
            expected=f"{kind}{without}",
            found=str(fields.get("feature_extractor_type") or ("other settings" if fields else "no such file")),
            next_step="export from a base folder that holds its preprocessor_config.json, or run it from Python with "
            "Transformers' own extractor",
        )
    return fields, where


def _size(fields: Mapping, name: str, where: Path) -> int:
    found = size_in(fields, name, where=where)
    if found is None:
        raise InputRefused("A setting of the sounds is missing", where=f"{where}: {name}", expected="a whole number")
    return found


def read_wav(file: Path | BinaryIO, sampling_rate: int, *, where: str) -> np.ndarray:
    """The mean of a file's channels, float32 in [-1, 1).

    Args:
        where: Its place, for a message.

    Raises:
        InputRefused: It is no 16-bit WAV of this sampling rate, or ends before all that it says it has.
    """
    try:
        with wave.open(str(file) if isinstance(file, Path) else file, "rb") as opened:
            rate, width, n_channels = opened.getframerate(), opened.getsampwidth(), opened.getnchannels()
            n_said = opened.getnframes() * width * n_channels
            raw = opened.readframes(opened.getnframes())
    except FileNotFoundError:
        raise no_such("WAV file", where) from None
    # Of a chunk that says a wrong size, the module raises errors that are not its own.
    except (OSError, EOFError, wave.Error, RuntimeError, ValueError) as error:
        found = str(error) or "it ends too early"
        raise InputRefused("The input is no WAV file", where=where, found=found) from error
    if (rate, width) != (sampling_rate, 2):
        raise InputRefused(
            "The sound is not sampled as the model takes it",
            where=where,
            expected=f"16 bits at {sampling_rate} Hz",
            found=f"{8 * width} bits at {rate} Hz",
            next_step=f"convert it, e.g. with ffmpeg -i IN -ar {sampling_rate} -sample_fmt s16 OUT.wav",
        )
    is_whole = len(raw) == n_said or n_said > _LEAST_UNKNOWN - width * n_channels
    if not is_whole or len(raw) % (width * n_channels) or not raw:
        raise InputRefused(
            "The sound is cut off, or there is none",
            where=where,
            expected=f"{f'{n_said} bytes: ' if n_said and not is_whole else ''}whole samples of {n_channels} channels",
            found=f"{len(raw)} bytes",
        )
    samples = np.frombuffer(raw, "<i2").astype(np.float32) / 2**15
    return samples.reshape(-1, n_channels).mean(axis=1)
