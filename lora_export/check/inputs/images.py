"""An image file as Pillow reads it, in colour."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_export.errors import InputRefused, refused_if_it_fails

if TYPE_CHECKING:
    from PIL import Image

# A small file can say that it is larger than memory; a photograph has fewer.
MOST_PIXELS = 50_000_000


def read_image(path: str) -> Image.Image:
    """The image in `path`.

    Raises:
        InputRefused: It is no image that Pillow reads, or has more than `MOST_PIXELS`.
    """
    from PIL import Image, UnidentifiedImageError

    what, next_step = "A file is no image that Pillow reads", "save it again as PNG or JPEG"
    with refused_if_it_fails(what, where=path, next_step=next_step):
        try:
            with Image.open(path) as opened:
                width, height = opened.size
                if width * height > MOST_PIXELS:
                    raise InputRefused(
                        "An image is too large",
                        where=path,
                        expected=f"at most {MOST_PIXELS:,} pixels",
                        found=f"{width:,} × {height:,}",
                        next_step="make it smaller: the model does so before it looks at it",
                    )
                return opened.convert("RGB")
        except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
            raise InputRefused(what, where=path, found=str(error), next_step=next_step) from error
        except OSError as error:
            if error.errno is not None:
                raise
            raise InputRefused(what, where=path, found=str(error), next_step=next_step) from error
