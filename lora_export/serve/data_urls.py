"""Images and sounds in requests: `data:image/png;base64,…`, as OpenAI's API takes images. No address is fetched."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence

import numpy as np

from lora_export.runtime.images import ImageSteps, read_image
from lora_export.runtime.sound import Samples, read_wav
from lora_export.serve.problems import Problem
from lora_export.serve.room import Held

# Of Wav2Vec2 and its kin: a frame's samples, at 16 kHz.
_SAMPLES_A_FRAME = 320


def signals_of(urls: Sequence[object], steps: ImageSteps | Samples, held: Held) -> list[np.ndarray]:
    """The images or sounds in `urls` after `steps`: what the graph takes of each, float32.

    Args:
        held: What their request holds; it takes each.

    Raises:
        Problem: One of them is none in that form, nobody waits for them, or there is no room for them.
        InputRefused: The bytes of one are no image or no WAV file, or it is too large, or the images are together.
    """
    found: list[np.ndarray] = []
    n_pixels = 0
    for url in urls:
        held.take(0)  # before the work: somebody waits
        if isinstance(steps, ImageSteps):
            image = read_image(io.BytesIO(_bytes_of(url, "image", "png")), "input", n_before=n_pixels)
            found.append(steps.pixels(image))
            held.take_array(found[-1])
            n_pixels += max(image.width * image.height, found[-1].size // 3)
        else:
            found.append(signal_of(_bytes_of(url, "audio", "wav"), steps, held, where="input"))
    return found


def signal_of(file: bytes, steps: Samples, held: Held, *, where: str) -> np.ndarray:
    """The same of a WAV file."""
    found = steps.features(read_wav(io.BytesIO(file), steps.rate, where=where))
    held.take_array(found)
    return found


def frames_of(signal: np.ndarray) -> range:
    """What stands for a signal's tokens where a run's are counted: none of an image, one for 20 ms of a sound."""
    return range(len(signal) // _SAMPLES_A_FRAME if signal.ndim == 1 else 0)


def _bytes_of(url: object, kind: str, example: str) -> bytes:
    head, comma, content = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not comma or not head.startswith(f"data:{kind}/") or not head.endswith(";base64"):
        form = f"data:{kind}/{example};base64,…"
        raise Problem(400, f"An input is given as {form}; no address is fetched", param="input", code="no_data")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise Problem(400, "An input's base64 is damaged", param="input", code="no_data") from None
