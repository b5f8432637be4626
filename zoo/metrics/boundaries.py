"""How close predicted outlines come to the true ones: the 95th percentile of distances, and boundary F1."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from zoo.errors import UsageError
from zoo.metrics.segmentation import PerImage


class _Outlines(PerImage):
    def _values(self, pred: Tensor, true: Tensor, valid: Tensor) -> Tensor:
        seen, truth, counts = (part.cpu().numpy() for part in (pred, true, valid))
        values = np.full(self.num_classes, np.nan)
        for number in self.classes:
            values[number] = self._value(counts & (seen == number), counts & (truth == number), counts)
        return torch.from_numpy(values)

    def _value(self, pred: np.ndarray, true: np.ndarray, valid: np.ndarray) -> float:
        """Of one class in one image, from bool (H, W); NaN where it does not count."""
        raise NotImplementedError


class HausdorffDistance95(_Outlines):
    """Of every image and class the 95th percentile of distances between outlines, in pixels; "hd95" and
    "hd95_per_class", averaged over images, then over classes. Small is good.

    The outline of a class are its pixels with one of the four neighbours outside it; beyond the edge of the image is
    outside, and so are ignored pixels. The distances from each pixel of either outline to the other outline are taken
    together, and the percentile is interpolated linearly (medpy's `hd95`; others take the larger of two percentiles).

    A class that only the image or only the prediction shows counts as the image's diagonal; with `empty="macmd"` as 0.

    Source: Huttenlocher et al. 1993, "Comparing Images Using the Hausdorff Distance" (TPAMI), with a percentile in
    place of the largest distance.
    """

    higher_is_better = False
    alarm = 0.0
    name = "hd95"

    def _value(self, pred: np.ndarray, true: np.ndarray, valid: np.ndarray) -> float:
        if not pred.any() or not true.any():
            return self._without(bool(pred.any()), bool(true.any()), math.hypot(*pred.shape))
        outlines = [mask & ~ndimage.binary_erosion(mask) for mask in (pred, true)]
        return float(np.percentile(np.concatenate(distances(*outlines)), 95))


class BoundaryF1(_Outlines):
    """Of every image and class the F1 of outlines within a tolerance; "boundary_f1" and "boundary_f1_per_class".

    The outline of a class are its pixels with one of the four neighbours in the image of another class. Precision is
    the share of the predicted outline that lies within the tolerance of the true one, recall that of the true outline
    within the tolerance of the predicted one. A class with only one outline has 0, one without any is left out.
    Averaged over images, then over classes (the paper: over the classes of an image, then over images).

    Source: Csurka et al. 2013, "What is a good evaluation measure for semantic segmentation?" (BMVC), whose tolerance
    is 0.75 % of the diagonal.
    """

    alarm = 0.0
    name = "boundary_f1"

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        classes: Sequence[int] | None = None,
        tolerance: float = 0.0075,
        **kwargs: Any,
    ) -> None:
        """Args: as `PixelClasses`, and
            tolerance: below 1 a share of the image's diagonal, else pixels.

        Raises:
            UsageError: a tolerance that is not positive.
        """
        super().__init__(num_classes, ignore_index, classes, _variant=f"{tolerance:g}_", **kwargs)
        if not 0 < tolerance < math.inf:
            raise UsageError(f"tolerance is {tolerance}: give a share of the diagonal below 1, or pixels from 1")
        self.tolerance = tolerance

    def _value(self, pred: np.ndarray, true: np.ndarray, valid: np.ndarray) -> float:
        # What an ignored neighbour is nobody knows: it makes no outline.
        outlines = [mask & ~ndimage.binary_erosion(mask | ~valid, border_value=1) for mask in (pred, true)]
        there = [bool(outline.any()) for outline in outlines]
        if not all(there):
            return self._without(there[0], there[1], 0.0)
        reach = self.tolerance if self.tolerance >= 1 else self.tolerance * math.hypot(*pred.shape)
        precision, recall = (float((distance <= reach).mean()) for distance in distances(*outlines))
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def distances(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From each pixel of `one` to the nearest of `other`, and back, in pixels; both bool (H, W) and not empty."""
    either = one | other
    rows, columns = np.flatnonzero(either.any(1)), np.flatnonzero(either.any(0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    a, b = one[box], other[box]
    return ndimage.distance_transform_edt(~b)[a], ndimage.distance_transform_edt(~a)[b]
