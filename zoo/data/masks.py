"""Images with the masks that belong to them: read, checked, and brought to one size together."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from zoo.errors import UsageError

_ORIENTATION = 0x0112  # the EXIF tag
_ROUNDING = 1e-9  # of float64 sums over an image


def size_of(path: str | Path) -> tuple[int, int]:
    """(height, width) of an upright image, from its header alone.

    Raises:
        OSError and others of PIL: the file is damaged or no image.
    """
    with Image.open(path) as image:
        width, height = image.size
        try:
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
        except Exception:  # garbled EXIF surfaces as SyntaxError, struct.error, ...; the picture itself may be fine
            turned = False
    return (width, height) if turned else (height, width)


def read_mask(path: str, image: str, size: tuple[int, int], numbered: bool = False) -> np.ndarray:
    """Bool (H, W): where the defect is. Grey, palette, colour (any channel) and 16-bit pictures are taken.

    Args:
        path: of the mask.
        image: of its image, for messages.
        size: (height, width) of the image.
        numbered: any value but 0 is a defect; otherwise there may be one such value alone.

    Raises:
        UsageError: it has another size than its image, or is not binary.
        OSError and others of PIL: the file is damaged or no image.
    """
    with Image.open(path) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode not in ("1", "L", "P", "I", "F") and not picture.mode.startswith("I;16"):
            picture = picture.convert("RGB")
        values = np.asarray(picture)
    values = values.max(axis=2) if values.ndim == 3 else values
    if values.shape != tuple(size):
        raise other_size(path, values.shape, image, size)
    top = values.max()
    between = values[(values != 0) & (values != top)]
    if len(between) and not numbered:
        raise UsageError(
            f"the mask {path!r} is not binary: beside 0 and {top} it has values such as {between[0]}. Save it as PNG "
            "with two values (JPEG and resizing blur edges)"
        )
    return values != 0


def check_size(mask: str, image: str) -> None:
    """Raises UsageError when a mask's header says another size than its image's; damaged files are left to reading."""
    try:
        sizes = size_of(mask), size_of(image)
    except Exception:  # damaged files surface as OSError, SyntaxError, ValueError, struct.error, ...
        return
    if sizes[0] != sizes[1]:
        raise other_size(mask, sizes[0], image, sizes[1])


def fit_image(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """uint8 (*size, C) of a picture: bilinear, averaging over what one pixel covers where it shrinks."""
    if (image.height, image.width) != tuple(size):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.array(image, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def fit_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bool (*size) of a mask bool (H, W): pixels of which the defect covers half or more.

    A defect too thin for that anywhere does not vanish: then every pixel that it touches counts.
    """
    if mask.shape == tuple(size):
        return mask
    share = _covered(_covered(mask.astype(np.float64), size[0]).T, size[1]).T
    half = share >= 0.5 - _ROUNDING
    return half if half.any() or not mask.any() else share > _ROUNDING


def _covered(values: np.ndarray, wanted: int) -> np.ndarray:
    """(wanted, W) means of (H, W) over equal parts of the first axis, which need not be whole pixels.

    Pillow's box filter and nearest neighbours count a pixel as all or nothing, which moves edges.
    """
    edges = np.arange(wanted + 1) * (len(values) / wanted)
    below = np.minimum(edges.astype(np.int64), len(values) - 1)
    sums = np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0)])
    up_to = sums[below] + (edges - below)[:, None] * values[below]
    return np.diff(up_to, axis=0) * (wanted / len(values))


def inner_size(given: tuple[int, int], size: tuple[int, int], resize: str) -> tuple[int, int]:
    """The part of `size` that an image of `given` size (both (height, width)) takes: all of it when stretched; with
    "pad" as much as its shape allows, at the top left.
    """
    if resize == "stretch":
        return size
    scale = min(size[0] / given[0], size[1] / given[1])
    return tuple(max(1, min(whole, round(side * scale))) for side, whole in zip(given, size, strict=True))  # type: ignore


def pad_to(pixels: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """Goes on to the right and below, with the last pixels ("edge") or with nothing ("constant"), up to `size`."""
    missing = [(0, side - there) for side, there in zip(size, pixels.shape[:2], strict=True)]
    if not any(after for _, after in missing):
        return pixels
    return np.pad(pixels, missing + [(0, 0)] * (pixels.ndim - 2), mode=mode)  # type: ignore[call-overload]


def other_size(mask: str, size: tuple[int, ...], image: str, its_size: tuple[int, ...]) -> UsageError:
    """A mask of (height, width) `size` is not as large as its image."""
    return UsageError(
        f"the mask {mask!r} has {size[0]} x {size[1]} pixels (height x width), but its image {image!r} has "
        f"{its_size[0]} x {its_size[1]}; a mask must have the size of its image"
    )
