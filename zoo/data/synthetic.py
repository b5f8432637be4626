"""Drawn defects for validation: where no real one may be looked at, good images are spoilt in known places."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

# A defect is drawn again while its pixels differ by less than this on average: it would be a label without a defect.
VISIBLE = 12.0
_LEAST = 0.1  # opacity below which a pixel is left alone, so that the mask is exact


def draw_defect(image: np.ndarray, seed: int, side: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """An image with one defect: a stain, a scratch, a piece of the image in the wrong place, or foreign texture.

    Args:
        image: uint8 (H, W, C).
        seed: decides all.
        side: length in pixels that sizes go by (a defect is 4 to 30 % of it long); the shorter side when absent.

    Returns:
        The image uint8 (H, W, C) and the mask bool (H, W): no pixel outside it has changed.
    """
    height, width = image.shape[:2]
    rng = np.random.default_rng(seed)
    side = min(height, width) if side is None else min(side, height, width)
    for attempt in range(6):
        shape, paint = (_blob, _stain) if attempt >= 3 else _KINDS[rng.integers(len(_KINDS))]
        # As many small defects as large ones on a scale of doublings.
        box = [max(3, round(side * 2 ** rng.uniform(np.log2(0.04), np.log2(0.3)))) for _ in range(2)]
        box = [min(box[0], height), min(box[1], width)]
        top, left = (int(rng.integers(0, whole - part + 1)) for whole, part in zip((height, width), box, strict=True))
        opacity = shape(box, rng)
        opacity[opacity < _LEAST] = 0
        place = np.s_[top : top + box[0], left : left + box[1]]
        before = image[place].astype(np.float32)
        after = np.rint(before + opacity[..., None] * (paint(image, box, before, rng) - before)).clip(0, 255)
        inside = opacity > 0
        if inside.any() and np.abs(after - before).max(-1)[inside].mean() >= VISIBLE:
            break
    spoilt, mask = image.copy(), np.zeros((height, width), dtype=bool)
    spoilt[place], mask[place] = after.astype(np.uint8), inside
    return spoilt, mask


def _smooth(box: list[int], rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise float32 (*box), about -1 to 1."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((box[1], box[0]), Image.Resampling.BICUBIC))


def _blob(box: list[int], rng: np.random.Generator) -> np.ndarray:
    """Opacity float32 (*box) of a lump with a ragged outline."""
    y, x = (np.abs((np.arange(n) + 0.5) * 2 / n - 1) for n in box)
    height = 1 - (y[:, None] ** 2 + x**2) + 0.5 * _smooth(box, rng, int(rng.integers(3, 7)))
    edge = rng.uniform(0.1, 0.6)
    opacity = np.clip(height / edge, 0, 1).astype(np.float32)
    if not (opacity >= _LEAST).any():
        opacity[box[0] // 2, box[1] // 2] = 1
    return opacity


def _line(box: list[int], rng: np.random.Generator) -> np.ndarray:
    """Opacity float32 (*box) of a bent scratch from one end of the box to another."""
    fine = 4
    height, width = box[0] * fine, box[1] * fine
    ends = np.array([[rng.uniform(0, 1), 0.05], [rng.uniform(0, 1), 0.95]])
    if rng.random() < 0.5:
        ends = ends[:, ::-1]
    bend = ends.mean(0) + rng.uniform(-0.3, 0.3, 2)
    t = np.linspace(0, 1, 12)[:, None]
    curve = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * bend + t**2 * ends[1]
    picture = Image.new("L", (width, height))
    thick = fine * rng.uniform(1.0, max(1.5, max(box) / 16))
    points = [(float(x) * width, float(y) * height) for y, x in curve]
    ImageDraw.Draw(picture).line(points, fill=255, width=max(2, round(thick)), joint="curve")
    return np.array(picture.resize((box[1], box[0]), Image.Resampling.BOX), dtype=np.float32) / 255


def _stain(image: np.ndarray, box: list[int], before: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Darker or lighter, away from what is there, slightly tinted."""
    middle = before.mean()
    dark = rng.random() < (middle - 60) / 135
    target = rng.uniform(0, middle * 0.5) if dark else rng.uniform((middle + 255) / 2, 255)
    tint = target + _tint(before, rng)
    strength = rng.uniform(0.5, 0.95)
    return before + strength * (tint - before)


def _graft(image: np.ndarray, box: list[int], before: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A piece from elsewhere, turned over or upside down, with another light."""
    top, left = (int(rng.integers(0, whole - part + 1)) for whole, part in zip(image.shape, box, strict=False))
    piece = image[top : top + box[0], left : left + box[1]].astype(np.float32)
    piece = piece[::-1] if rng.random() < 0.5 else piece[:, ::-1]
    return piece * rng.uniform(0.6, 1.5) + rng.uniform(-20, 20)


def _texture(image: np.ndarray, box: list[int], before: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grains that the image does not have, on what is there."""
    cells = max(2, max(box) // int(rng.integers(2, 6)))
    grains = _smooth(box, rng, cells)[..., None] * rng.uniform(40, 110)
    return before + grains + _tint(before, rng)


def _tint(before: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A shift of each channel (C,): the more colour there is, the more; grey stays grey."""
    colour = min(1.0, float(before.std(-1).mean()) / 10)
    return rng.normal(0, 12 * colour, before.shape[-1:])


_KINDS: list[tuple[Callable, Callable]] = [(_blob, _stain), (_line, _stain), (_blob, _graft), (_blob, _texture)]
