"""Images become the pixels that Transformers' processors make of them."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import transformers
from PIL import ExifTags, Image
from transformers.image_utils import load_image

from lora_export.errors import InputRefused
from lora_export.runtime import images


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(2).integers(0, 256, (height, width, 3), np.uint8))


PROCESSORS = {
    "vit": lambda: transformers.ViTImageProcessor(size={"height": 16, "width": 20}),
    "clip": lambda: transformers.CLIPImageProcessor(size={"shortest_edge": 18}, crop_size=15),
    "bit": lambda: transformers.BitImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 18}),
    "deit": lambda: transformers.DeiTImageProcessor(size={"height": 20, "width": 20}, crop_size=16),
}


@pytest.mark.parametrize("size", [(40, 31), (17, 60), (16, 16)], ids=str)
@pytest.mark.parametrize("kind", PROCESSORS)
def test_pixels_are_those_of_transformers(kind, size, tmp_path):
    PROCESSORS[kind]().save_pretrained(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    expected = processor([picture(*size)], return_tensors="np")["pixel_values"][0]
    found = images.open_image_steps(tmp_path / "absent", tmp_path).pixels(picture(*size))
    assert found.shape == expected.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


OLD = {
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
    "resample": 3,
}


@pytest.mark.parametrize("size", [(260, 240), (90, 226)], ids=str)
@pytest.mark.parametrize(
    "more", [{}, {"do_center_crop": None, "crop_size": None}, {"do_center_crop": False}, {"crop_size": 20}], ids=str
)
@pytest.mark.parametrize(
    "kind", ["ViTFeatureExtractor", "DeiTFeatureExtractor", "CLIPFeatureExtractor", "BitImageProcessor"]
)
def test_what_old_settings_leave_out_is_as_in_transformers(kind, more, size, tmp_path):
    """A size that is one number, and no word on the crop or on its size."""
    field = "feature_extractor_type" if kind.endswith("Extractor") else "image_processor_type"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({field: kind, "size": 228} | OLD | more))
    processor = getattr(transformers, kind.replace("FeatureExtractor", "ImageProcessor")).from_pretrained(tmp_path)
    expected = processor([picture(*size)], return_tensors="np")["pixel_values"][0]
    found = images.open_image_steps(tmp_path, tmp_path).pixels(picture(*size))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_transformers_turns_it(orientation, tmp_path):
    path, exif = tmp_path / "a.png", Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture(7, 5).save(path, exif=exif)
    found, expected = images.read_image(str(path)), load_image(str(path))
    assert found.mode == "RGB" and found.size == ((7, 5) if orientation < 5 else (5, 7))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_processor_type": "ConvNextImageProcessor"}, "does not say how images become"),
        ({"do_resize": False}, "does not say how images become"),
        ({"size": {"height": 16, "width": 16, "longest_edge": 3}}, "A setting of the images"),
        ({"size": {"height": 1e9, "width": 16}}, "A setting of the images"),
        ({"image_mean": [0.5]}, "A setting of the images"),
        ({"image_std": [0, 1, 1]}, "A setting of the images"),
        ({"do_center_crop": True, "crop_size": 17}, "A setting of the images"),
        ({"resample": "x"}, "A setting of the images"),
    ],
)
def test_other_settings_are_refused(changes, said, tmp_path):
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputRefused, match=said) as refused:
        images.open_image_steps(tmp_path, tmp_path)
    assert refused.value.where == str(path)


def test_an_image_that_would_become_too_large_is_refused():
    steps = images.ImageSteps(224, 2, None, None, None, None)
    with pytest.raises(InputRefused, match="An image is too narrow"):
        steps.pixels(Image.new("RGB", (1, 300_000)))
    steps = images.ImageSteps(2, 2, None, None, None, None)
    assert steps.pixels(Image.new("RGB", (200, 1))).shape == (3, 2, 400)
    with pytest.raises(InputRefused, match="An image is too narrow"):
        steps.pixels(Image.new("RGB", (201, 1)))


def test_what_is_cut_off_becomes_no_numbers():
    steps = images.ImageSteps(64, 2, (64, 48), 1 / 255, None, None)
    tracemalloc.start()
    found = steps.pixels(picture(2, 398))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (3, 64, 48) and most < 10 * found.nbytes < 4 * 3 * 64 * 64 * 199


@pytest.mark.parametrize("kind", ["EPS", "TIFF", "ICNS"])
def test_formats_that_no_client_needs_are_not_read(kind, tmp_path):
    path = tmp_path / "a.png"
    picture(32, 32).save(path, kind)
    assert Image.open(path).format == kind  # Pillow would; of EPS, by Ghostscript
    with pytest.raises(InputRefused, match="no image that Pillow reads as PNG, JPEG, WEBP, GIF, BMP"):
        images.read_image(str(path))


@pytest.mark.parametrize("kind", images.FORMATS)
def test_formats_that_are_read(kind, tmp_path):
    path = tmp_path / "a"
    picture(6, 5).save(path, kind)
    assert images.read_image(str(path)).size == (6, 5)


def test_images_that_are_none_or_too_large_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("P", (7, 5)).save(path)
    assert (images.read_image(str(path)).mode, images.read_image(str(path)).size) == ("RGB", (7, 5))
    whole = path.read_bytes()
    for content in (b"", b"GIF89a", whole[:60], whole.replace(b"PLTE", b"PLTX")):
        path.write_bytes(content)
        with pytest.raises(InputRefused, match="no image that Pillow reads") as refused:
            images.read_image(str(path))
        assert refused.value.where == str(path)
    path.write_bytes(whole[:16] + (60_000).to_bytes(4, "big") * 2 + whole[24:])
    monkeypatch.setattr(Image, "_decompression_bomb_check", lambda size: None)
    with pytest.raises(InputRefused):
        images.read_image(str(path))
    monkeypatch.setattr(images, "MOST_PIXELS", 34)
    path.write_bytes(whole)
    with pytest.raises(InputRefused, match="An image is too large") as refused:
        images.read_image(str(path))
    assert refused.value.found == "7 × 5"
