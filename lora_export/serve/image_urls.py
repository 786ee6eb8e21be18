"""Images in requests: as OpenAI's API takes them, `data:image/png;base64,…`. No address is fetched."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence

import numpy as np

from lora_export.runtime.images import ImageSteps, read_image
from lora_export.serve.problems import Problem

_FORM = "data:image/png;base64,…"


def pixels_of(urls: Sequence[object], steps: ImageSteps) -> list[np.ndarray]:
    """The images in `urls` after `steps`, float32 `[3, height, width]` each.

    Raises:
        Problem: One of them is no image in that form.
        InputRefused: The bytes of one are no image, or it is too large.
    """
    return [steps.pixels(read_image(io.BytesIO(_bytes_of(url)), "input")) for url in urls]


def _bytes_of(url: object) -> bytes:
    head, comma, content = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise Problem(400, f"An image is given as {_FORM}; no address is fetched", param="input", code="no_image")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise Problem(400, "An image's base64 is damaged", param="input", code="no_image") from None
