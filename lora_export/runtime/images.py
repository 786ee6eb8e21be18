"""Images as a graph's inputs, by the settings in an export, as Transformers makes them with Pillow. Needs Pillow."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from lora_export.errors import EnvironmentUnusable, InputRefused, refused_if_it_fails
from lora_export.reading import first_settings

if TYPE_CHECKING:
    from PIL import Image

# A small file can say that it is larger than memory; a photograph has fewer.
MOST_PIXELS = 50_000_000
# Pillow opens others, too: EPS runs Ghostscript, without a limit of time.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# The longer edge by the shorter one, as Transformers bounds it for Qwen2-VL: a line of pixels is made no larger.
_MOST_RATIO = 200
_SETTINGS = "preprocessor_config.json"
# Kinds that are made by the steps below and nothing else.
_KINDS = ("ViT", "DeiT", "CLIP", "Bit")
_ENDINGS = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
# Whose size, if it is a number, is that of the shorter edge: `default_to_square = False` of their classes.
_BY_SHORTER_EDGE = ("CLIP", "Bit")
# Who cut the middle out where the settings do not say, and its height and width where they do not.
_CROPPING, _CROPPED = ("CLIP", "Bit", "DeiT"), 224
_NEEDED = ("do_resize", "size", "resample", "do_normalize", "image_mean", "image_std")
_RESCALED = 1 / 255


def read_image(file: str | BinaryIO, where: str | None = None, *, n_before: int = 0) -> Image.Image:
    """The image in `file`, in colour, turned as its EXIF orientation says: what `load_image` of Transformers gives.

    Args:
        where: Its place, for a message, of a file that is no path.
        n_before: Pixels of others that it may have no more than `MOST_PIXELS` with.

    Raises:
        InputRefused: It is no image of `FORMATS`, or has more than `MOST_PIXELS`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    where = where or str(file)
    what, next_step = f"A file is no image that Pillow reads as {', '.join(FORMATS)}", "save it again as PNG or JPEG"
    with refused_if_it_fails(what, where=where, next_step=next_step):
        try:
            with Image.open(file, formats=FORMATS) as opened:
                _require_size(opened, where, n_before)
                opened.load()
                _require_size(opened, where, n_before)  # a format may learn it from what it reads
                ImageOps.exif_transpose(opened, in_place=True)
                return opened.convert("RGB")
        except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
            raise InputRefused(what, where=where, found=str(error), next_step=next_step) from error
        except OSError as error:
            if error.errno is not None:
                raise
            raise InputRefused(what, where=where, found=str(error), next_step=next_step) from error


def _require_size(image: Image.Image, where: str, n_before: int) -> None:
    if n_before + image.width * image.height > MOST_PIXELS:
        raise InputRefused(
            "An image is too large",
            where=where,
            expected=f"at most {MOST_PIXELS:,} pixels{' of all images together' if n_before else ''}",
            found=f"{image.width:,} × {image.height:,}{f' after {n_before:,} pixels' if n_before else ''}",
            next_step="make it smaller: the model does so before it looks at it",
        )


@dataclass(frozen=True)
class ImageSteps:
    """What an image goes through, in this order; None for a step that is left out.

    Attributes:
        size: Height and width, or the length of the shorter edge.
        resample: Pillow's number of the filter.
        crop: Height and width of what is cut from the middle.
        factor: What values from 0 to 255 are multiplied by.
        mean, std: Subtracted, and divided by, for each colour.
    """

    size: tuple[int, int] | int
    resample: int
    crop: tuple[int, int] | None
    factor: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    def pixels(self, image: Image.Image) -> np.ndarray:
        """The colours of `image` after all steps, float32 `[3, height, width]`.

        Raises:
            InputRefused: It is so narrow, or would become so large, as no image may be.
        """
        image = image.resize(self._resized(image.width, image.height), resample=self.resample)
        if self.crop is not None:  # before there are numbers: they take four times the memory
            height, width = self.crop
            top, left = (image.height - height) // 2, (image.width - width) // 2
            image = image.crop((left, top, left + width, top + height))
        values = np.asarray(image, np.float32).transpose(2, 0, 1)
        if self.factor is not None:
            values = (values.astype(np.float64) * self.factor).astype(np.float32)
        if self.mean is not None:
            mean, std = (np.array(each, np.float32)[:, None, None] for each in (self.mean, self.std))
            values = (values - mean) / std
        return np.ascontiguousarray(values)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size[1], self.size[0]
        longer = int(self.size * max(width, height) / min(width, height))
        if longer > _MOST_RATIO * self.size or self.size * longer > MOST_PIXELS:
            raise InputRefused(
                "An image is too narrow",
                expected=f"one edge at most {_MOST_RATIO} times the other, and {MOST_PIXELS:,} pixels when resized",
                found=f"{width} × {height}",
            )
        return (self.size, longer) if width <= height else (longer, self.size)


def open_image_steps(place: Path, export: Path) -> ImageSteps:
    """By the settings in `place`, a folder of `export`, or else in the export's own.

    Raises:
        InputRefused: There are none, or they are not those of ViT, DeiT, CLIP or BiT.
        EnvironmentUnusable: Pillow is not installed.
    """
    if importlib.util.find_spec("PIL") is None:
        raise EnvironmentUnusable("Images need the package `pillow`", next_step="pip install pillow")
    fields, where = first_settings(_SETTINGS, place, export)
    kind = str(fields.get("image_processor_type") or fields.get("feature_extractor_type") or "")
    missing = [name for name in _NEEDED if name not in fields]
    family = next((name for name in _KINDS if kind in {f"{name}{ending}" for ending in _ENDINGS}), None)
    if family is None or missing or not fields["do_resize"]:
        raise InputRefused(
            "The exported folder does not say how images become the model's inputs in a way that is known here",
            where=str(where),
            expected=f"an image processor of {', '.join(_KINDS)}, with {', '.join(_NEEDED)}",
            found=f"{kind or 'no kind'} without {', '.join(missing)}" if missing else kind,
            next_step="AutoImageProcessor.from_pretrained(FOLDER).save_pretrained(FOLDER) writes all of them; run "
            "other kinds from Python, with AdapterSession",
        )
    try:
        return _steps(fields, family)
    except (TypeError, ValueError, KeyError) as error:
        raise InputRefused(
            "A setting of the images is not what it should be", where=str(where), found=str(error)
        ) from None


def _steps(fields: Mapping, family: str) -> ImageSteps:
    """By the settings, and by what Transformers' class of a `family` of `_KINDS` does where they do not say."""
    size = _size(fields["size"], is_square=family not in _BY_SHORTER_EDGE)
    crop = None
    if fields.get("do_center_crop", family in _CROPPING):
        crop = _size(fields.get("crop_size", _CROPPED), is_square=True)
    size = size if fields["do_resize"] else None
    least = (min(size) if isinstance(size, tuple) else size) if size is not None else 0
    if crop is not None and max(crop) > least:
        raise ValueError(f"crop_size {crop} is larger than size {size}")
    if fields["resample"] not in range(6):
        raise ValueError(f"resample {fields['resample']!r} is no filter of Pillow")
    factor = float(fields.get("rescale_factor", _RESCALED)) if fields.get("do_rescale", True) else None
    mean, std = (
        tuple(map(float, fields[name])) if fields["do_normalize"] else None for name in ("image_mean", "image_std")
    )
    if mean is not None and (len(mean) != 3 or len(std) != 3 or not all(std)):
        raise ValueError("image_mean and image_std have no three colours")
    return ImageSteps(size, fields["resample"], crop, factor, mean, std)


def _size(given: object, *, is_square: bool) -> tuple[int, int] | int:
    """A size as settings write it: a number, height and width, or the shorter edge."""
    if isinstance(given, Mapping):
        found = given["shortest_edge"] if set(given) == {"shortest_edge"} else (given["height"], given["width"])
        extra = set(given) - {"shortest_edge"} if isinstance(found, int) else set(given) - {"height", "width"}
        if extra:
            raise ValueError(f"size has {', '.join(sorted(extra))}")
    else:
        found = (given, given) if is_square else given
    numbers = found if isinstance(found, tuple) else (found,)
    if not all(type(number) is int and 0 < number <= 10_000 for number in numbers):
        raise ValueError(f"size {given!r} is no size in pixels")
    return found
