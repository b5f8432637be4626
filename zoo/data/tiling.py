"""Large images in overlapping tiles: where they lie, cutting them out, and one seamless map from the tiles' maps.

zoo/export/predictor.py holds the same arithmetic in numpy.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import UsageError


def check_tiles(tile: int, overlap: int | None) -> tuple[int, int]:
    """(side, overlap) in pixels; an absent overlap is a quarter of the side.

    Raises:
        UsageError: no such tiling.
    """
    if tile < 2:
        raise UsageError(f"tile={tile}: tiles have a side of at least 2 pixels")
    overlap = tile // 4 if overlap is None else overlap
    if not 0 <= overlap <= tile // 2:
        raise UsageError(f"tile_overlap={overlap}: tiles of {tile} pixels share 0 to {tile // 2}")
    return tile, overlap


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the fewest tiles that cover `length` and share `overlap` pixels or more, evenly spread."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


def places(size: Sequence[int], tile: int, overlap: int) -> list[tuple[int, int]]:
    """(top, left) of every tile of an image of `size` = (height, width), row by row."""
    rows, columns = (starts(side, tile, overlap) for side in size)
    return [(top, left) for top in rows for left in columns]


def cut(image: Tensor, place: tuple[int, int], tile: int) -> Tensor:
    """The tile (..., tile, tile) of an image (..., H, W) at (top, left).

    An image smaller than a tile goes on to the right and below with its last pixels, so that its texture keeps the
    scale that a model knows.
    """
    top, left = place
    part = image[..., top : top + tile, left : left + tile]
    for axis in (-2, -1):
        missing = tile - part.shape[axis]
        if missing > 0:
            last = part.narrow(axis, part.shape[axis] - 1, 1)
            part = torch.cat([part, last.expand(*_repeated(part, axis, missing))], dim=axis)
    return part


def _repeated(part: Tensor, axis: int, count: int) -> list[int]:
    shape = list(part.shape)
    shape[axis] = count
    return shape


def split(images: Tensor, tile: int, overlap: int) -> Tensor:
    """All tiles (B, N, C, tile, tile) of images (B, C, H, W), in the order of `places`."""
    found = places(images.shape[-2:], tile, overlap)
    return torch.stack([cut(images, place, tile) for place in found], dim=1)


def window(tile: int, overlap: int) -> Tensor:
    """Weights float32 (tile, tile) of a tile's pixels in the blend: the product of a ramp along either axis, which is
    min(1, (distance to the nearer end + 0.5) / overlap).
    """
    step = torch.arange(tile, dtype=torch.float32) + 0.5
    ramp = (torch.minimum(step, tile - step) / max(overlap, 1)).clamp(max=1)
    return ramp[:, None] * ramp


def blend(tiles: Tensor, size: Sequence[int], overlap: int) -> Tensor:
    """Weighted means (B, C, *size), float32, of what tiles (B, N, C, tile, tile) say of each pixel.

    Where all tiles agree, so does the result, and it crosses from one tile to the next without a step.

    Raises:
        ValueError: N is not the number of tiles of an image of this size.
    """
    tile = tiles.shape[-1]
    found = places(size, tile, overlap)
    if tiles.shape[1] != len(found):
        raise ValueError(f"an image of {tuple(size)} has {len(found)} tiles of {tile} pixels, not {tiles.shape[1]}")
    blender = Blender((len(tiles), tiles.shape[2]), size, tile, overlap, tiles.device)
    for number, place in enumerate(found):
        blender.add(tiles[:, number], place)
    return blender.result()


class Blender:
    """A blend that grows tile by tile, in memory of the size of its result.

    Args:
        leading: (B, C).
        size: (height, width) of the image.
    """

    def __init__(
        self, leading: Sequence[int], size: Sequence[int], tile: int, overlap: int, device: torch.device | str = "cpu"
    ):
        self.size = tuple(size)
        grown = [max(side, tile) for side in size]
        self.window, self.tile = window(tile, overlap).to(device), tile
        self.total = torch.zeros(*leading, *grown, device=device)
        self.weight = torch.zeros(*grown, device=device)

    def add(self, values: Tensor, place: tuple[int, int]) -> None:
        """Takes what the tile at `place` says, (B, C, tile, tile)."""
        inside = (..., slice(place[0], place[0] + self.tile), slice(place[1], place[1] + self.tile))
        self.total[inside] += self.window * values
        self.weight[inside] += self.window

    def result(self) -> Tensor:
        """(B, C, H, W), without what lies beyond the image."""
        return (self.total / self.weight)[..., : self.size[0], : self.size[1]]


def inspect_by_tiles(
    inference: Callable[[Tensor], tuple[Tensor, Tensor]],
    image: Tensor,
    tile: int,
    overlap: int,
    img_size: tuple[int, int],
    batch_size: int = 8,
) -> tuple[Tensor, Tensor]:
    """What a detector says of one large image, by tiles, `batch_size` of them at a time.

    Args:
        inference: (score (B,), map (B, 1, h, w)) of images float (B, C, *img_size) in [0, 1].
        image: (1, C, H, W), uint8 or float in [0, 1].
        tile, overlap: in pixels of the image.
        img_size: what tiles are resized to for `inference`.

    Returns:
        The largest score of any tile, (1,), and the blended map (1, 1, H, W) at the size of the image; float32.
    """
    found = places(image.shape[-2:], tile, overlap)
    blender = Blender((1, 1), image.shape[-2:], tile, overlap, image.device)
    best = torch.full((1,), -math.inf, device=image.device)
    for first in range(0, len(found), batch_size):
        some = found[first : first + batch_size]
        pixels = torch.cat([cut(image, place, tile) for place in some])
        pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        scores, maps = inference(resize(pixels, img_size))
        best = torch.maximum(best, scores.float().max())
        for one, place in zip(resize(maps.float(), (tile, tile)), some, strict=True):
            blender.add(one[None], place)
    return best, blender.result()


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, averaging where it shrinks, float (B, C, H, W) -> (B, C, *size)."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    if size[1] == 1 < size[0]:
        # torch 2.14 strides wrongly through a single column.
        return resize(images.mT, (size[1], size[0])).mT
    return F.interpolate(images, size, mode="bilinear", antialias=True)
