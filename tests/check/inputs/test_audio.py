"""Sound files as spectrograms."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import transformers

from lora_export.artifact import read_manifest
from lora_export.check.inputs.audio import read_features
from lora_export.errors import InputRefused


def write_wav(path: Path, samples: np.ndarray, rate: int = 16000) -> Path:
    """`samples` `[frames, channels]` int16."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def tone(n: int = 6000) -> np.ndarray:
    return (8000 * np.sin(np.arange(n) / 9)).astype(np.int16)


def test_files_become_what_the_extractor_makes_of_their_samples(exports, tmp_path):
    folder = exports["whisper-merged"]
    mono = write_wav(tmp_path / "mono.wav", tone()[:, None])
    stereo = write_wav(tmp_path / "stereo.wav", np.stack([tone(), 0 * tone()], axis=1))
    found = read_features(folder, [str(mono), str(stereo)], read_manifest(folder))
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    sounds = [tone() / 32768, tone() / 65536]
    expected = extractor(sounds, sampling_rate=16000, return_tensors="np")["input_features"]
    assert found.shape == (2, 8, 100) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_is_no_such_file_is_refused(exports, own, tmp_path):
    folder = own(exports["whisper-merged"])
    manifest = read_manifest(folder)
    (tmp_path / "text.wav").write_text("no sound")
    for name, what in (("text.wav", "The input is no WAV file"), ("absent.wav", "There is no such WAV file")):
        with pytest.raises(InputRefused, match=what):
            read_features(folder, [str(tmp_path / name)], manifest)
    slow = write_wav(tmp_path / "slow.wav", tone()[:, None], rate=8000)
    with pytest.raises(InputRefused, match="not sampled as the model takes it") as refused:
        read_features(folder, [str(slow)], manifest)
    assert (refused.value.expected, refused.value.found) == ("16 bits at 16000 Hz", "16 bits at 8000 Hz")
    sound = write_wav(tmp_path / "sound.wav", tone()[:, None])
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {"feature_size": 10}))
    with pytest.raises(InputRefused, match="does not make what the encoder takes") as refused:
        read_features(folder, [str(sound)], manifest)
    assert (refused.value.expected, refused.value.found) == ("8 bands, 100 frames", "10 bands, 100 frames")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputRefused, match="has no feature extractor"):
        read_features(folder, [str(slow)], manifest)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda whole: whole[:-3], "The sound is cut off"),
        (lambda whole: whole[:44], "The sound is cut off"),
        (lambda whole: whole[:22] + b"\0\0" + whole[24:], "The input is no WAV file"),
        (lambda whole: whole[:16] + b"\xff\xff\xff\x7f" + whole[20:], "The input is no WAV file"),
        (lambda whole: whole[:30], "The input is no WAV file"),
    ],
    ids=["odd", "empty", "no channels", "size", "header"],
)
def test_files_that_lie_about_their_size_are_refused(damage, what, exports, tmp_path):
    folder = exports["whisper-merged"]
    path = write_wav(tmp_path / "a.wav", tone(100)[:, None])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputRefused, match=what) as refused:
        read_features(folder, [str(path)], read_manifest(folder))
    assert refused.value.where == str(path)
