"""`session.inputs`: what a host has becomes what Transformers' tokenizer or processor makes of it."""

from __future__ import annotations

import wave

import numpy as np
import pytest
import transformers
from PIL import Image

from lora_export import AdapterSession, InputRefused, Seq2SeqSession, UsageProblem

TEXTS = ["Open a socket.", "Größe, and a longer text than the others are", "x"]


@pytest.mark.parametrize("rows", [TEXTS, [("who?", text) for text in TEXTS]], ids=["texts", "pairs"])
def test_texts_are_the_tokenizer_s(exports, rows):
    session = AdapterSession(exports["classifier-dynamic"], "cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exports["classifier-dynamic"])
    pairs = list(zip(*rows, strict=True)) if isinstance(rows[0], tuple) else [rows]
    expected = tokenizer(*map(list, pairs), return_tensors="np", padding=True, return_token_type_ids=True)
    found = session.inputs(rows, "plain")
    assert set(found) == {"input_ids", "attention_mask", "token_type_ids"}
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])
    assert session.run(found, ["plain", "shades", None])["logits"].shape == (3, 4)


def test_sources_targets_and_sounds(exports, tmp_path):
    session = Seq2SeqSession(exports["t5-dynamic"], "cpu")
    together = session.generate(session.inputs(TEXTS), "t5-all", max_new_tokens=6)
    assert together == [session.generate(session.inputs([text]), "t5-all", max_new_tokens=6)[0] for text in TEXTS]
    session = Seq2SeqSession(exports["whisper-dynamic"], "cpu")
    samples = (8000 * np.sin(np.arange(6000) / 9)).astype("<i2")
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000)
        file.writeframes(samples.tobytes())
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(exports["whisper-dynamic"])
    expected = extractor(samples / 32768, sampling_rate=16000, return_tensors="np")["input_features"]
    for given in (tmp_path / "a.wav", (samples / 32768).astype(np.float32)):
        np.testing.assert_allclose(session.inputs([given])["input_features"], expected, atol=2e-5)


def test_images(exports, tmp_path):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8))
    image.save(tmp_path / "a.png")
    processor = transformers.AutoImageProcessor.from_pretrained(exports["vit-dynamic"])
    found = AdapterSession(exports["vit-dynamic"], "cpu").inputs([tmp_path / "a.png"] * 2, "sights")["pixel_values"]
    np.testing.assert_allclose(found, processor([image] * 2, return_tensors="np")["pixel_values"], atol=1e-5)


def test_what_cannot_be_made_is_refused(exports, tmp_path):
    session = AdapterSession(exports["classifier-dynamic"], "cpu")
    for rows in ("one text", [], [tmp_path]):
        with pytest.raises(UsageProblem):
            session.inputs(rows)
    with pytest.raises(UsageProblem, match="not made of files or texts alone"):
        AdapterSession(exports["clip-dynamic"], "cpu").inputs(["x"])
    with pytest.raises(InputRefused, match="There is no such image file"):
        AdapterSession(exports["vit-dynamic"], "cpu").inputs([tmp_path / "absent.png"])
