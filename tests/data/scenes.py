"""Drawn images with masks in folders, as the tests of segmentation data want them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from zoo.data import Segmentation

SIZE = (20, 26)  # height, width
CLASSES = "sky\nroad\ncar\n"
CHANGES = {"scale": (0.6, 1.8), "hflip": 0.5, "vflip": 0.5, "rotate": 20, "brightness": 0.2, "contrast": 0.2}


def truth_of(number, size=SIZE):
    """Rectangles of classes 1 and 2 on 0, and a corner without a class."""
    mask = np.zeros(size, np.uint8)
    mask[3 : 9 + number % 4, 4:15] = 1
    mask[11:18, 8 + number % 5 : 24] = 2
    mask[0, -3:] = 255
    return mask


def put(folder: Path, number: int, mask=None, size=SIZE):
    """An image whose pixels tell the class (60 a class, 240 for none) and its mask."""
    mask = truth_of(number, size) if mask is None else mask
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    values = np.where(mask == 255, 240, mask * 60).astype(np.uint8)
    Image.fromarray(np.stack([values, values, np.full_like(values, number)], -1)).save(
        folder / "images" / f"{number:02d}.png"
    )
    Image.fromarray(mask).save(folder / "masks" / f"{number:02d}.png")


def make(root, **options):
    return Segmentation(str(root), **({"crop_size": (16, 20), "batch_size": 4, "num_workers": 0} | options))


def epoch_of(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return list(loader)


def names(batches):
    return [Path(path).stem for batch in batches for path in batch["path"]]


def same(first, second):
    return len(first) == len(second) and all(
        a["path"] == b["path"] and torch.equal(a["image"], b["image"]) and torch.equal(a["mask"], b["mask"])
        for a, b in zip(first, second, strict=True)
    )
