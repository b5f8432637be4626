"""From a file to an upright picture of the asked-for channels; the same as zoo/export/predictor.py does."""

import io
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

_ORIENTATION = 0x0112  # the EXIF tag


def open_image(source: str | Path | bytes | IO[bytes] | Image.Image, in_chans: int) -> Image.Image:
    """A decoded picture, RGB or, for in_chans = 1, grey.

    Transparency is dropped, an EXIF orientation is applied, and of 16-bit grey the high byte is kept (PIL's own
    conversion would clip it at 255).

    Raises:
        ValueError: its pixels are floating-point numbers, whose black and white nothing says.
        OSError, SyntaxError, ValueError and others of PIL: the file is damaged or no image.
    """
    if isinstance(source, Image.Image):
        return _convert(source, in_chans)
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return _convert(image, in_chans)


def _convert(image: Image.Image, in_chans: int) -> Image.Image:
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # garbled EXIF surfaces as SyntaxError, struct.error, ...; the picture itself may be fine
        turned = False
    if turned:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        # PIL's own conversion would clip what lies outside 0 to 255, so that pictures of 0 to 1 became black.
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    image.load()
    mode = "L" if in_chans == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)
