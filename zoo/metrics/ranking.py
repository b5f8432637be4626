"""How well scores rank defective pixels or images above good ones: AUROC, AUPR and the largest F1."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from zoo.errors import UsageError
from zoo.metrics.base import BinnedScores, checked_flags, checked_maps, checked_scores
from zoo.metrics.bins import ordered, score_of
from zoo.metrics.curves import Steps, align, auroc, average_precision, largest_f1


class _Ranking(BinnedScores):
    def _split(self, values: np.ndarray, defective: np.ndarray) -> None:
        """Takes scores and flags of one shape."""
        keys = ordered(values)
        for kind, flags in zip(self.key_types, (~defective, defective), strict=True):
            self._add(kind, keys[flags])

    def _steps(self) -> tuple[Steps, np.ndarray]:
        good, bad = (self._bins(kind) for kind in self.key_types)
        steps = align(good, bad)
        return steps, steps.weigh(bad.counts)


class PixelScores(_Ranking):
    """Every pixel is one sample, over all images together."""

    key_types: ClassVar[dict[str, torch.dtype]] = {"good_pixels": torch.int32, "bad_pixels": torch.int32}

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Takes maps (B, 1, H, W) or (B, H, W), floating, and masks of the same size, bool or 0 and 1, True defective.

        Raises:
            UsageError: other shapes, scores that are not finite, masks that are not binary.
        """
        self._split(*checked_maps(maps, masks))


class ImageScores(_Ranking):
    """Every image is one sample."""

    key_types: ClassVar[dict[str, torch.dtype]] = {"good_images": torch.int32, "bad_images": torch.int32}

    def update(self, scores: Tensor, targets: Tensor) -> None:
        """Takes scores (B,), floating, and targets (B,), bool or 0 and 1, True defective.

        Raises:
            UsageError: other shapes, scores that are not finite, targets that are not binary.
        """
        if scores.ndim != 1 or scores.shape != targets.shape:
            raise UsageError(
                f"scores {tuple(scores.shape)} and targets {tuple(targets.shape)} do not belong together: both must be "
                "(B,), one number an image."
            )
        self._split(checked_scores(scores, "scores"), checked_flags(targets, "targets"))


class _AUROC(_Ranking):
    def compute(self) -> Tensor:
        """Area under the ROC curve, a scalar; ties count half. NaN if all samples are good or all are defective."""
        value, error = auroc(*self._steps())
        self._warn(error)
        return self._value(value)


class _AUPR(_Ranking):
    def compute(self) -> Tensor:
        """Average precision, a scalar: the area under the precision-recall curve as a step function, not by trapezoids,
        which would promise what no threshold gives (scikit-learn's `average_precision_score`). NaN without defects."""
        value, error = average_precision(*self._steps())
        self._warn(error)
        return self._value(value)


class _F1Max(_Ranking):
    def compute(self) -> dict[str, Tensor]:
        """{"f1", "threshold"}, scalars: the largest F1 of `score > threshold`, and the float32 just below the highest
        score from which on that calls samples defective. Both NaN without defects."""
        value, error, key = largest_f1(*self._steps())
        self._warn(error)
        lowest = score_of(np.array([key]))[0] if value == value else np.float32("nan")
        below = np.nextafter(lowest, np.float32("-inf"))
        return {"f1": self._value(value), "threshold": self._value(float(below))}


class PixelAUROC(PixelScores, _AUROC):
    """Area under the ROC curve over pixels; bounded state, see `BinnedScores`."""


class PixelAUPR(PixelScores, _AUPR):
    """Average precision over pixels; bounded state, see `BinnedScores`."""


class PixelF1Max(PixelScores, _F1Max):
    """Largest F1 over pixels and its threshold; bounded state, see `BinnedScores`."""


class ImageAUROC(ImageScores, _AUROC):
    """Area under the ROC curve over images; bounded state, see `BinnedScores`."""


class ImageAUPR(ImageScores, _AUPR):
    """Average precision over images; bounded state, see `BinnedScores`."""


class ImageF1Max(ImageScores, _F1Max):
    """Largest F1 over images and its threshold; bounded state, see `BinnedScores`."""
