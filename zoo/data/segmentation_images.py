"""Samples of segmentation: images with the class of each pixel, cropped and changed at random for training."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from zoo.data.dicts import DictLoader, Refused, unreadable
from zoo.data.images import open_image
from zoo.data.labelled import Samples
from zoo.data.masks import fit_image, size_of
from zoo.data.sampler import Unreadable, mix, split_key
from zoo.data.segmentation_classes import ClassList, read_classes
from zoo.data.segmentation_layouts import Scene
from zoo.errors import UsageError

# Bytes of decoded images and masks that a process keeps at most, over all splits; the rest is read again each time.
KEPT_BYTES = 2**32
Pixels = tuple[np.ndarray, np.ndarray]


class Scenes(Samples):
    """{"image": uint8 (C, H, W), "mask": int64 (H, W), "path", "blank": whether no pixel of the file has a class}.

    Args:
        scenes: images and masks.
        classes: what masks mean.
        in_chans: 3, or 1 for grey.
        ignore_index: what stands for no class in what comes out.
        seed: of random changes, which depend on (seed, epoch, number of the image) alone; None in evaluation.
        augment: makes (image, mask, seed) into a changed image and mask.
        size: (height, width) that whole images are resized to; None to leave them.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        classes: ClassList,
        in_chans: int,
        ignore_index: int,
        seed: int | None = None,
        augment: Callable[[np.ndarray, np.ndarray, int], Pixels] | None = None,
        size: tuple[int, int] | None = None,
    ):
        self.scenes, self.classes, self.in_chans, self.ignore_index = scenes, classes, in_chans, ignore_index
        self.seed, self.augment, self.size = seed, augment, size
        self.kept: dict[int, Pixels] = {}

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any] | Unreadable | Refused:
        epoch, index = split_key(key)
        found = self.kept[index] if index in self.kept else self.read(index)
        if isinstance(found, Unreadable | Refused):
            return found
        pixels, labels = found
        blank = bool((labels == self.classes.void).all())
        if self.augment is not None:
            pixels, labels = self.augment(pixels, labels, mix("sample", self.seed or 0, epoch, index))
        mask = torch.from_numpy(labels.astype(np.int64))
        if self.ignore_index != self.classes.void:
            mask[mask == self.classes.void] = self.ignore_index
        # A copy: what is kept must not change with what a reader does to it.
        image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        return {"image": image, "mask": mask, "path": self.scenes[index].path, "blank": blank}

    def read(self, index: int) -> Pixels | Unreadable | Refused:
        """Image uint8 (H, W, C) and mask (H, W) as `read_classes` gives it."""
        path, mask = self.scenes[index]
        try:
            picture = open_image(path, self.in_chans)
        except Exception as error:  # damaged files surface as OSError, SyntaxError, ValueError, struct.error, ...
            return unreadable(path, error)
        size = (picture.height, picture.width)
        try:
            labels = read_classes(mask, path, size, self.classes)
        except UsageError as error:
            return Refused(str(error))
        except Exception as error:  # as above
            return Unreadable(path, f"its mask {mask}: {unreadable(mask, error).reason}")
        wanted = self.size or size
        return fit_image(picture, wanted), fit_labels(labels, wanted)

    def preload(self, room: int) -> int:
        """Decodes images in threads and keeps them, up to `room` bytes; the bytes they take.

        Workers that are forked afterwards share them. Damaged images are left to be found again when asked for.

        Raises:
            UsageError: a mask contradicts its image.
        """
        taken = 0
        with ThreadPoolExecutor(4) as pool:
            for start in range(0, len(self), 64):  # so that no more is decoded than there is room for
                numbers = range(start, min(start + 64, len(self)))
                for index, found in zip(numbers, pool.map(self.read, numbers), strict=True):
                    if isinstance(found, Refused):
                        raise UsageError(found.message)
                    if isinstance(found, Unreadable):
                        continue
                    taken += sum(part.nbytes for part in found)
                    if taken > room:
                        return taken - sum(part.nbytes for part in found)
                    self.kept[index] = found
        return taken


class SceneLoader(DictLoader):
    """Batches {"image", "mask", "path"} of `Scenes`.

    Args:
        on_blank: called in the main process with the path of every image of which no pixel has a class.
    """

    def __init__(self, *args: Any, on_blank: Callable[[str], None] | None = None, **arguments: Any):
        super().__init__(*args, **arguments)
        self.on_blank = on_blank

    def __iter__(self):
        for batch in super().__iter__():
            blank = batch.pop("blank")
            for path in (path for path, empty in zip(batch["path"], blank.tolist(), strict=True) if empty):
                if self.on_blank is not None:
                    self.on_blank(path)
            yield batch


def fit_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(*size) of (H, W): of each pixel the class that lies at its middle."""
    if labels.shape == tuple(size):
        return labels
    rows, columns = (
        np.minimum(((np.arange(to) + 0.5) * (of / to)).astype(np.int64), of - 1)
        for to, of in zip(size, labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]


def count_classes(scenes: Sequence[Scene], classes: ClassList) -> tuple[np.ndarray, np.ndarray]:
    """int64 (K,) pixels of each class in all masks, and pixels with any class in the masks where a class occurs.

    Damaged files are left out.

    Raises:
        UsageError: a mask holds values that stand for nothing.
    """
    pixels, around = (np.zeros(len(classes.names), np.int64) for _ in range(2))

    def count(scene: Scene) -> np.ndarray | UsageError | None:
        try:
            labels = read_classes(scene.mask, scene.path, size_of(scene.path), classes)
        except UsageError as error:
            return error
        except Exception:  # damaged files surface as OSError, SyntaxError, ValueError, struct.error, ...
            return None
        return np.bincount(labels.ravel(), minlength=classes.void + 1)[: len(classes.names)]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(count, scenes):
            if isinstance(found, UsageError):
                raise found
            if found is not None:
                pixels += found
                around += np.where(found > 0, found.sum(), 0)
    return pixels, around
