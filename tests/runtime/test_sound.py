"""Sounds become the spectrograms that Transformers' extractor makes of them."""

from __future__ import annotations

import io
import json
import wave

import numpy as np
import pytest
import torch
import transformers

from lora_export.errors import InputRefused
from lora_export.runtime.sound import open_log_mel, open_samples, read_wav


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


TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "conv_dim": [4] * 3,
        "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2], "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip


@pytest.mark.parametrize("kind", ["Wav2Vec2", "SEW"])
def test_the_shortest_sound_is_that_of_the_model(kind, tmp_path):
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**TINY)).eval()
    model.config.save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    ears = open_samples(tmp_path, tmp_path)
    samples = np.random.default_rng(1).standard_normal(ears.least).astype(np.float32)
    with torch.no_grad():
        assert model(torch.tensor(ears.features(samples))[None]).last_hidden_state.shape[1] > 0
        with pytest.raises(RuntimeError):
            model(torch.tensor(samples)[None, :-1])
    with pytest.raises(InputRefused, match="The sound is shorter than the model takes") as refused:
        ears.features(samples[:-1])
    assert refused.value.expected.startswith(f"at least {ears.least} samples")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"conv_stride": [5, 2]}))
    with pytest.raises(InputRefused, match="A setting of the model is not what it should be"):
        open_samples(tmp_path, tmp_path)


def wav(size: int) -> io.BytesIO:
    """100 frames of two channels, in a file that says it has `size` bytes of them."""
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setnchannels(2), file.setsampwidth(2), file.setframerate(16000)
        file.writeframes(np.arange(200, dtype="<i2").tobytes())
    whole = made.getvalue()
    return io.BytesIO(whole[:40] + size.to_bytes(4, "little") + whole[44:])


@pytest.mark.parametrize("size", [400, 0x7FFFF000, 0x80000000, 0xFFFFFFFF], ids=hex)
def test_a_whole_sound_is_read_also_if_its_writer_did_not_know_its_size(size):
    np.testing.assert_array_equal(read_wav(wav(size), 16000, where="a"), (2 * np.arange(100) + 0.5) / 2**15)


@pytest.mark.parametrize("size", [404, 1_000_000, 0], ids=hex)
def test_a_sound_that_is_cut_off_is_refused(size):
    with pytest.raises(InputRefused, match="The sound is cut off, or there is none") as refused:
        read_wav(wav(size), 16000, where="a")
    assert refused.value.expected == f"{f'{size} bytes: ' if size else ''}whole samples of 2 channels"
