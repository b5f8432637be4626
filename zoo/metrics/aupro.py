"""AU-PRO: area under the per-region-overlap curve up to small false positive rates."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from zoo.errors import UsageError, unknown
from zoo.metrics.base import BinnedScores, checked_maps
from zoo.metrics.bins import DEFAULT_MAX_BINS, Bins, ordered
from zoo.metrics.curves import align, at_positions, every_threshold

SIZES = ("quartiles", "weighted")
# Upper half of a key: pixels of the component. Lower half: its score, made unsigned to keep the order within a size.
SIZE_SHIFT = 32
SIGN = 2**31


class AUPRO(BinnedScores):
    """Mean overlap of defects, each counting once whatever its size, averaged over false positive rates up to a limit.

    A component is an 8-connected blob of a mask, its overlap the share of its pixels above a threshold; the false
    positive rate (FPR) is the share of the anomaly-free pixels of all images above it. Limits are FPRs, and areas are
    divided by them.
    Two definitions, which can differ by a quarter at 1 % on the same maps, so never compare across them:

    * `thresholds="all"`: every distinct score, pixels at the threshold included, from the point (0, 0). As anomalib.
    * `thresholds=99` (or another count): the scores at equidistant positions, trunc(linspace(0, N - 1, 99)), of the
      N sorted anomaly-free scores, pixels strictly above, FPR = 1 - (p + 1) / N also among ties, and the point (1, 1).
      As L2BT.

    Sizes of components: None counts all; "quartiles" gives q1 to q4, where qk averages over the components not larger
    than the k-th linearly interpolated quartile of all sizes (q4 is all); "weighted" multiplies each overlap by
    (smallest size / size) and divides by the number of components, so that a perfect map reaches mean(smallest / size),
    not 1.

    Several AUPRO in a `torchmetrics.MetricCollection` share one state. It is bounded, see `BinnedScores`: exact for up
    to `max_bins` distinct scores, checked to 1e-4 beyond; sizes and the number of components are always exact.
    Without defects or without anomaly-free pixels every value is NaN.

    Source: Bergmann et al. 2020, "Uninformed Students" (CVPR), for the curve; Costanzino et al. 2025, "Learning to Be a
    Transformer to Pinpoint Anomalies" (IEEE Access), for the positions and the sizes.
    """

    key_types: ClassVar[dict[str, torch.dtype]] = {"good_pixels": torch.int32, "regions": torch.int64}

    def __init__(
        self,
        limits: Sequence[float] = (0.3, 0.1, 0.05, 0.01),
        thresholds: str | int = "all",
        sizes: str | None = None,
        max_bins: int = DEFAULT_MAX_BINS,
        **kwargs: Any,
    ) -> None:
        """Args:
            limits: false positive rates, in (0, 1].
            thresholds: "all", or how many positions.
            sizes: None, "quartiles" or "weighted".
            max_bins: see `BinnedScores`.

        Raises:
            UsageError: a value outside these.
        """
        super().__init__(max_bins=max_bins, **kwargs)
        wrong = [limit for limit in limits if not 0 < limit <= 1]
        if wrong or not limits:
            raise UsageError(f"limits are {list(limits)}: give at least one false positive rate above 0 and up to 1.")
        if thresholds != "all" and (type(thresholds) is not int or thresholds < 2):
            raise UsageError(
                f'thresholds is {thresholds!r}: give "all", or a number of positions from 2, for instance 99.'
            )
        if sizes is not None and sizes not in SIZES:
            raise unknown("sizes of AUPRO", sizes, SIZES)
        self.limits, self.thresholds, self.sizes = tuple(float(limit) for limit in limits), thresholds, sizes

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Takes maps (B, 1, H, W) or (B, H, W), floating, and masks of the same size, bool or 0 and 1, True defective.

        Raises:
            UsageError: other shapes, scores that are not finite, masks that are not binary.
        """
        values, defective = checked_maps(maps, masks)
        for keys, mask in zip(ordered(values), defective, strict=True):
            if not mask.any():
                self._add("good_pixels", keys.reshape(-1))
                continue
            self._add("good_pixels", keys[~mask])
            self._add("regions", (component_sizes(mask) << SIZE_SHIFT) + (keys[mask].astype(np.int64) + SIGN))

    def compute(self) -> dict[str, Tensor]:
        """Scalars named "aupro_<limit>", "aupro_q1_<limit>" to q4, or "aupro_weighted_<limit>"."""
        good, bad = self._bins("good_pixels"), self._bins("regions")
        size = bad.key >> SIZE_SHIFT
        score = ((bad.key & 0xFFFFFFFF) - SIGN).astype(np.int32)
        steps = align(good, Bins(score, bad.counts, bad.level))
        results, error = {}, 0.0
        for name, share in self._shares(size, bad.counts).items():
            pairs = [(math.nan, 0.0)] * len(self.limits)
            if good.key.size and bad.key.size:
                overlap = steps.weigh(bad.counts * share)
                if self.thresholds == "all":
                    pairs = every_threshold(steps, overlap, self.limits)
                else:
                    pairs = at_positions(steps, overlap, self.limits, int(self.thresholds))
            for limit, (value, doubt) in zip(self.limits, pairs, strict=True):
                results[f"{name}_{limit:g}"] = self._value(value)
                error = max(error, doubt)
        self._warn(error)
        return results

    def _shares(self, size: np.ndarray, count: np.ndarray) -> dict[str, np.ndarray]:
        """By how much one pixel of a component of `size` raises the mean overlap, for each variant."""
        names = {None: ["aupro"], "quartiles": [f"aupro_q{k}" for k in (1, 2, 3, 4)], "weighted": ["aupro_weighted"]}[
            self.sizes
        ]
        if not size.size:
            return {name: np.zeros(0) for name in names}
        # n components of a size leave n x size pixels, so the sizes need no state of their own.
        kinds, which = np.unique(size, return_inverse=True)
        components = np.bincount(which, weights=count).astype(np.int64) // kinds
        pixel = 1 / size
        if self.sizes == "weighted":
            return {names[0]: pixel * kinds[0] / size / components.sum()}
        if self.sizes is None:
            return {names[0]: pixel / components.sum()}
        edges = [*np.quantile(np.repeat(kinds, components), (0.25, 0.5, 0.75)), math.inf]
        return {
            name: np.where(size <= edge, pixel, 0.0) / components[kinds <= edge].sum()
            for name, edge in zip(names, edges, strict=True)
        }


def component_sizes(mask: np.ndarray) -> np.ndarray:
    """For each True pixel of mask (H, W), row by row: the pixels (int64) of its 8-connected component."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    labels, _ = ndimage.label(crop, np.ones((3, 3)))
    return np.bincount(labels.ravel())[labels[crop]]
