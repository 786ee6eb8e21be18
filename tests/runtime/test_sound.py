"""Sounds become the spectrograms that Transformers' extractor makes of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import transformers

from lora_export.errors import InputRefused
from lora_export.runtime.sound import open_log_mel, open_samples


@pytest.mark.parametrize("n_bands", [80, 128])
@pytest.mark.parametrize("seconds", [0.01, 0.37, 3])
def test_a_spectrogram_is_that_of_transformers(n_bands, seconds, tmp_path):
    extractor = transformers.WhisperFeatureExtractor(feature_size=n_bands, chunk_length=3)
    extractor.save_pretrained(tmp_path)
    rng, n = np.random.default_rng(1), int(16000 * seconds)
    samples = (0.3 * np.sin(np.arange(n) / 9) + 0.05 * rng.standard_normal(n)).astype(np.float32)
    found = open_log_mel(tmp_path, tmp_path).features(samples)
    expected = extractor(samples, sampling_rate=16000, return_tensors="np")["input_features"][0]
    assert found.shape == expected.shape == (n_bands, 300) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_sound_is_never_cut(tmp_path):
    transformers.WhisperFeatureExtractor(chunk_length=1).save_pretrained(tmp_path)
    ears = open_log_mel(tmp_path, tmp_path)
    for n, found in ((16001, "1.00006 s"), (0, "0 s")):
        with pytest.raises(InputRefused, match="longer than the model takes at a time, or there is none") as refused:
            ears.features(np.zeros(n, np.float32))
        assert (refused.value.expected, refused.value.found) == ("at most 1 s", found)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"feature_extractor_type": "Wav2Vec2FeatureExtractor"}, "does not say how sounds become"),
        ({"dither": 0.1}, "does not say how sounds become"),
        ({"hop_length": None}, "A setting of the sounds is missing"),
        ({"do_normalize": True}, "does not say how sounds become"),
        ({"n_fft": "400"}, "A setting of the model is not what it should be"),
    ],
)
def test_other_settings_are_refused(changes, said, tmp_path):
    transformers.WhisperFeatureExtractor().save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputRefused, match=said) as refused:
        open_log_mel(tmp_path, tmp_path)
    assert "preprocessor_config.json" in refused.value.where
    with pytest.raises(InputRefused, match="does not say how sounds become"):
        open_log_mel(tmp_path / "absent", tmp_path / "absent")


@pytest.mark.parametrize("is_normalized", [True, False])
def test_samples_are_those_of_transformers(is_normalized, tmp_path):
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=is_normalized)
    extractor.save_pretrained(tmp_path)
    samples = np.random.default_rng(1).standard_normal(700).astype(np.float32) * 0.2 + 0.1
    expected = extractor(samples, sampling_rate=16000, return_tensors="np")["input_values"][0]
    found = open_samples(tmp_path, tmp_path).features(samples)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(InputRefused, match="does not say how sounds become"):
        open_log_mel(tmp_path, tmp_path)
    settings = tmp_path / "preprocessor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"do_normalize": "no"}))
    with pytest.raises(InputRefused, match="not true or false"):
        open_samples(tmp_path, tmp_path)
