"""Random changes of images in which masks move along; the one place that knows albumentations."""

import os
from typing import Any

import numpy as np

from zoo.errors import missing_extra


class Augmentation:
    """Flips, turns and changes of light, decided by a seed.

    Args:
        hflip, vflip: how often, 0 to 1.
        rotate: turns by up to so many degrees either way; what comes in from outside is the image mirrored.
        brightness, contrast: changes by up to this fraction either way.

    Raises:
        UsageError: albumentations is not installed.
    """

    def __init__(
        self,
        hflip: float = 0.0,
        vflip: float = 0.0,
        rotate: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
    ):
        a = _albumentations()
        steps: list[Any] = []
        if hflip:
            steps.append(a.HorizontalFlip(p=hflip))
        if vflip:
            steps.append(a.VerticalFlip(p=vflip))
        if rotate:
            import cv2

            steps.append(a.Affine(rotate=(-rotate, rotate), border_mode=cv2.BORDER_REFLECT_101, p=1.0))
        if brightness or contrast:
            limits = (-brightness, brightness), (-contrast, contrast)
            steps.append(a.RandomBrightnessContrast(*limits, p=1.0))
        self.steps = a.Compose(steps)

    def __call__(self, image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Changed image uint8 (H, W, C) and its mask bool (H, W); a function of its arguments alone."""
        self.steps.set_random_seed(seed & 0xFFFFFFFF)
        changed = self.steps(image=image, mask=mask.astype(np.uint8))
        pixels = changed["image"]
        return (pixels if pixels.ndim == 3 else pixels[:, :, None]), changed["mask"] > 0


# What comes in from outside an image: the mean of ImageNet, which normalisation makes about zero.
_OUTSIDE = {1: (116,), 3: (124, 116, 104)}


class SceneAugmentation:
    """Changes of scale, turns, crops, flips, and changes of light and colour, decided by a seed.

    Args:
        crop_size: (height, width) of what comes out; smaller images are put at a random place of it.
        in_chans: of the images, 1 or 3.
        void: value in masks of what comes in from outside.
        scale: smallest and largest factor of the size.
        hflip, vflip: how often, 0 to 1.
        rotate: turns by up to so many degrees either way; what comes in from outside is the image mirrored.
        brightness, contrast, saturation: changes by up to this fraction either way.
        hue: changes by up to this share of the circle of colours either way.

    Raises:
        UsageError: albumentations is not installed.
    """

    def __init__(
        self,
        crop_size: tuple[int, int],
        in_chans: int,
        void: int,
        scale: tuple[float, float] = (1.0, 1.0),
        hflip: float = 0.0,
        vflip: float = 0.0,
        rotate: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
    ):
        a = _albumentations()
        import cv2

        steps: list[Any] = []
        if tuple(scale) != (1.0, 1.0):
            limits = scale[0] - 1, scale[1] - 1
            # Plain "nearest" of OpenCV takes the upper left pixel, half a pixel away from where the image is.
            nearest = cv2.INTER_NEAREST_EXACT
            steps.append(a.RandomScale(limits, mask_interpolation=nearest, area_for_downscale="image", p=1.0))
        if rotate:
            steps.append(a.Affine(rotate=(-rotate, rotate), border_mode=cv2.BORDER_REFLECT_101, p=1.0))
        outside = {"border_mode": cv2.BORDER_CONSTANT, "fill": _OUTSIDE[in_chans], "fill_mask": void}
        steps.append(a.PadIfNeeded(*crop_size, position="random", **outside))
        steps.append(a.RandomCrop(*crop_size))
        if hflip:
            steps.append(a.HorizontalFlip(p=hflip))
        if vflip:
            steps.append(a.VerticalFlip(p=vflip))
        if brightness or contrast:
            steps.append(a.RandomBrightnessContrast((-brightness, brightness), (-contrast, contrast), p=1.0))
        if saturation or hue:
            light = {"brightness": (1.0, 1.0), "contrast": (1.0, 1.0)}
            colour = {"saturation": (1 - saturation, 1 + saturation), "hue": (-hue, hue)}
            steps.append(a.ColorJitter(**light, **colour, p=1.0))
        self.steps = a.Compose(steps)

    def __call__(self, image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Changed image uint8 (h, w, C) and mask (h, w) of its own type; a function of its arguments alone."""
        self.steps.set_random_seed(seed & 0xFFFFFFFF)
        changed = self.steps(image=image, mask=mask)
        pixels = changed["image"]
        return (pixels if pixels.ndim == 3 else pixels[:, :, None]), changed["mask"]


def _albumentations() -> Any:
    # It would ask the network for a newer version on import.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        import albumentations
        import cv2
    except ImportError as error:
        raise missing_extra("train", "albumentations") from error
    # Its own threads, beside a worker for each core, would only get in each other's way.
    cv2.setNumThreads(0)
    return albumentations
