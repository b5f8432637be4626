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
