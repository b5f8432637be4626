"""Samples of anomaly detection: good images or tiles of them to learn from, and images with masks to judge by."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo.data.anomaly_layouts import Photo
from zoo.data.dicts import Refused, as_tensor, unreadable
from zoo.data.images import open_image
from zoo.data.labelled import Samples
from zoo.data.masks import fit_image, fit_mask, inner_size, pad_to, read_mask, size_of
from zoo.data.sampler import EpochSampler, Unreadable, mix, split_key
from zoo.data.synthetic import draw_defect
from zoo.data.tiling import cut, places
from zoo.errors import UsageError

# Decoded images that a worker keeps while their tiles come in mixed order.
KEPT = 4
# Bytes of resized images that a process keeps from one epoch to the next: to decode a large photo takes a hundred times
# as long as a training step sees it.
KEPT_BYTES = 2**29


class Look(NamedTuple):
    """How images are looked at: whole, resized to `img_size` = (height, width), or by tiles of their own pixels."""

    img_size: tuple[int, int]
    resize: str
    in_chans: int
    tile: int | None
    overlap: int


class Kept:
    """Resized whole images, up to KEPT_BYTES of them; whoever gets one must not change it."""

    def __init__(self) -> None:
        self._pixels: dict[int, np.ndarray] = {}
        self._room = KEPT_BYTES

    def get(self, number: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The pixels of an image, made only where they are not kept."""
        pixels = self._pixels.get(number)
        if pixels is None:
            pixels = make()
            if pixels.nbytes <= self._room:
                self._room -= pixels.nbytes
                self._pixels[number] = pixels
        return pixels


class GoodImages(Samples):
    """{"image": uint8 (C, H, W), "path"}; changes at random depend on (seed, epoch, number of the image) alone."""

    def __init__(self, photos: Sequence[Photo], look: Look, seed: int, augment: Callable | None):
        self.photos, self.look, self.seed, self.augment = photos, look, seed, augment
        self._whole = Kept()

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any] | Unreadable:
        epoch, index = split_key(key)
        photo = self.photos[index]
        try:
            pixels = self._whole.get(index, lambda: whole(open_image(photo.path, self.look.in_chans), self.look))
        except Exception as error:  # damaged files surface as OSError, SyntaxError, ValueError, struct.error, ...
            return unreadable(photo.path, error)
        # A copy: what is kept must not change with what augmentation or a reader does to it.
        return {"image": self._finish(pixels.copy(), epoch, index), "path": photo.path}

    def _finish(self, pixels: np.ndarray, epoch: int, index: int) -> Tensor:
        if self.augment is not None:
            nowhere = np.zeros(pixels.shape[:2], dtype=bool)
            pixels, _ = self.augment(pixels, nowhere, mix("sample", self.seed or 0, epoch, index))
        return as_tensor(pixels)


class GoodTiles(GoodImages):
    """Tiles of good images, each in the place that prediction cuts it from, resized to `img_size`.

    Attributes:
        counts: tiles of each image.
    """

    def __init__(self, photos: Sequence[Photo], look: Look, seed: int, augment: Callable | None):
        super().__init__(photos, look, seed, augment)
        self.sizes = [_size(photo.path) for photo in photos]
        self.counts = [len(self._places(number)) for number in range(len(photos))]
        self.ends = np.cumsum(self.counts)
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any] | Unreadable:
        epoch, index = split_key(key)
        number = int(np.searchsorted(self.ends, index, side="right"))
        place = self._places(number)[index - int(self.ends[number]) + self.counts[number]]
        path = self.photos[number].path
        try:
            pixels = self._open(number)
        except Exception as error:  # damaged files surface as OSError, SyntaxError, ValueError, struct.error, ...
            return unreadable(path, error)
        return {"image": self._finish(self._tile(pixels, place), epoch, index), "path": path}

    def _places(self, number: int) -> list[tuple[int, int]]:
        return places(self.sizes[number], self.look.tile or 0, self.look.overlap)

    def _tile(self, pixels: np.ndarray, place: tuple[int, int]) -> np.ndarray:
        tile = cut(torch.from_numpy(pixels).permute(2, 0, 1), place, self.look.tile or 0)
        array = tile.permute(1, 2, 0).numpy()
        return fit_image(_picture(array), self.look.img_size)

    def _open(self, number: int) -> np.ndarray:
        if number in self._kept:
            self._kept.move_to_end(number)
        else:
            self._kept[number] = _pixels(open_image(self.photos[number].path, self.look.in_chans))
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return self._kept[number]


class JudgedImages(Samples):
    """{"image", "path", "mask" bool (1, H, W), "label", "kind", "has_mask"}; at their own size where there are tiles.

    With `resize: pad` also "inner_size" int64 (2,): (height, width) of what is image, at the top left.

    Args:
        photos: images as they are.
        spoilt: numbers of those to give once more, with a drawn defect, a function of (seed, number) alone.
    """

    def __init__(self, photos: Sequence[Photo], look: Look, spoilt: Sequence[int] = (), defect_seed: int = 0):
        self.photos, self.look, self.spoilt, self.defect_seed = photos, look, spoilt, defect_seed
        self._kept = Kept()

    def __len__(self) -> int:
        return len(self.photos) + len(self.spoilt)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any] | Unreadable | Refused:
        _, index = split_key(key)
        drawn = index >= len(self.photos)
        number = self.spoilt[index - len(self.photos)] if drawn else index
        photo = self.photos[number]
        try:
            pixels = self._fitted(number)
        except Exception as error:  # damaged files surface as OSError, SyntaxError, ValueError, struct.error, ...
            return unreadable(photo.path, error)
        mask = np.zeros(pixels.shape[:2], dtype=bool)
        if photo.mask is not None and not drawn:
            try:
                mask = read_mask(photo.mask, photo.path, size_of(photo.path), photo.numbered)
            except UsageError as error:
                return Refused(str(error))
            except Exception as error:  # as above
                return Unreadable(photo.path, f"its mask {photo.mask}: {unreadable(photo.mask, error).reason}")
        # An empty mask does not say where the defect is.
        kind, label, known = photo.kind, photo.label, photo.label == 0 or bool(mask.any())
        mask = fit_mask(mask, pixels.shape[:2])
        if drawn:
            pixels, mask = draw_defect(pixels, mix("defect", self.defect_seed, number), self.look.tile)
            kind, label, known = "synthetic", 1, True
        inner = pixels.shape[:2]
        if self.look.tile is None:
            pixels = pad_to(pixels, self.look.img_size, "edge")
            mask = pad_to(mask, self.look.img_size, "constant")
        sample: dict[str, Any] = {"image": as_tensor(pixels), "path": photo.path}
        sample |= {"mask": torch.from_numpy(mask)[None], "label": label, "kind": kind, "has_mask": known}
        if self.look.tile is None and self.look.resize == "pad":
            sample["inner_size"] = torch.tensor(inner)
        return sample

    def _fitted(self, number: int) -> np.ndarray:
        """An image at the size that it takes in `img_size`, or its own where there are tiles."""
        look = self.look

        def make() -> np.ndarray:
            image = open_image(self.photos[number].path, look.in_chans)
            if look.tile is not None:
                return _pixels(image)
            return fit_image(image, inner_size((image.height, image.width), look.img_size, look.resize))

        # Validation looks at an image twice, and again after some epochs; a test does so once.
        return self._kept.get(number, make).copy() if self.spoilt and look.tile is None else make()


class TileSampler(EpochSampler):
    """Every tile once, in mixed order, with the tiles of only a few images at a time: decoding a large image for each
    of its tiles would take most of the training.

    Args:
        counts: tiles of each image.
    """

    def __init__(self, counts: Sequence[int], seed: int = 0, rank: int = 0, world: int = 1):
        super().__init__(sum(counts), seed, True, rank, world)
        self.counts = counts

    def order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(mix("order", self.seed, epoch))
        firsts = np.cumsum([0, *self.counts])
        images = torch.randperm(len(self.counts), generator=generator).tolist()
        found: list[int] = []
        for start in range(0, len(images), KEPT):
            tiles = [n for image in images[start : start + KEPT] for n in range(firsts[image], firsts[image + 1])]
            found += [tiles[n] for n in torch.randperm(len(tiles), generator=generator).tolist()]
        return found


def whole(image: Any, look: Look) -> np.ndarray:
    """uint8 (*img_size, C) of a whole picture."""
    inner = inner_size((image.height, image.width), look.img_size, look.resize)
    return pad_to(fit_image(image, inner), look.img_size, "edge")


def without_padding(values: Tensor, inner_sizes: Tensor | None) -> Sequence[Tensor]:
    """Each of `values` (B, C, H, W) as (C, h, w), h and w being its row of `inner_sizes` int64 (B, 2); whole for None.

    What `resize: pad` adds to an image is no part of it: nobody asks whether it is good.
    """
    if inner_sizes is None:
        return list(values)
    return [value[:, :height, :width] for value, (height, width) in zip(values, inner_sizes.tolist(), strict=True)]


def _pixels(image: Any) -> np.ndarray:
    pixels = np.array(image, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _picture(pixels: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))


def _size(path: str) -> tuple[int, int]:
    try:
        return size_of(path)
    except Exception:  # damaged: as one tile, which reading then reports
        return (1, 1)
