"""What is measured of a detector on labelled images: by image, by pixel, and at the threshold."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchmetrics import MetricCollection

from zoo.data.anomaly_images import without_padding
from zoo.metrics import AUPRO, ImageAUPR, ImageAUROC, ImageF1Max, PixelAUPR, PixelAUROC, PixelF1Max
from zoo.tasks.threshold import KeptScores, choose_threshold

LIMITS = (0.3, 0.1, 0.05, 0.01)


class Measures(nn.Module):
    """Image and pixel metrics of one pass over images; each is there only where the images allow it."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = KeptScores()
        curves = {"pixel_auroc": PixelAUROC(), "pixel_aupr": PixelAUPR(), "pixel_f1": PixelF1Max()}
        # Said outright who shares a state: torchmetrics would guess it from the first batch.
        self.pixels = MetricCollection(
            {**curves, "aupro": AUPRO(limits=LIMITS)}, compute_groups=[list(curves), ["aupro"]]
        )

    def reset(self) -> None:
        """Forgets all images."""
        self.scores.reset()
        self.pixels.reset()

    def update(self, scores: Tensor, maps: Tensor, batch: Mapping[str, Any]) -> None:
        """Takes scores (B,) and maps (B, 1, H, W) of a batch with "label", "mask" and perhaps "has_mask"; with
        "inner_size" (B, 2) only the pixels within it count."""
        self.scores.update(scores, batch["label"])
        masks, inner = batch["mask"], batch.get("inner_size")
        if "has_mask" in batch:
            known = batch["has_mask"].bool()
            maps, masks = maps[known], masks[known]
            inner = None if inner is None else inner[known]
        if inner is not None:
            # Without their padding they have sizes of their own.
            for one, mask in zip(without_padding(maps.float(), inner), without_padding(masks, inner), strict=True):
                self.pixels.update(one[None], mask[None])
        elif len(maps):
            self.pixels.update(maps.float(), masks)

    def thresholds(self, false_alarms: float) -> tuple[float, float]:
        """Of an image's score (see `choose_threshold`), and of a pixel: that of its largest F1, nan without defects."""
        scores, defective = self.scores.compute()
        return choose_threshold(scores, defective, false_alarms), self._pixel_values()["threshold"]

    def compute(self, threshold: float) -> dict[str, float]:
        """All that can be said of these images, as fractions of 1; good_score is the mean score of the good ones."""
        scores, defective = self.scores.compute()
        bad = int(defective.sum())
        values = {"good_score": float(scores[~defective].mean()) if bad < len(scores) else math.nan}
        if 0 < bad < len(scores):
            values |= _of_images(scores, defective)
        pixels = self._pixel_values()
        values |= {"pixel_f1_max": pixels.pop("f1")} | pixels
        del values["threshold"]
        if math.isfinite(threshold):
            called = scores > threshold
            if bad:
                hits = int((called & defective).sum())
                values |= {"f1": 2 * hits / (int(called.sum()) + bad), "recall": hits / bad}
            if bad < len(scores):
                values["false_alarms"] = float(called[~defective].float().mean())
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _pixel_values(self) -> dict[str, float]:
        # One exchange between processes and one pass over the bins for all who share them.
        values = {name: float(value) for name, value in self.pixels.compute().items()}
        return {name.removeprefix("pixel_f1_"): value for name, value in values.items()}


def _of_images(scores: Tensor, defective: Tensor) -> dict[str, float]:
    # The scores of all processes are here already.
    metrics = {
        "image_auroc": ImageAUROC(sync_on_compute=False),
        "image_aupr": ImageAUPR(sync_on_compute=False),
        "image_f1_max": ImageF1Max(sync_on_compute=False),
    }
    values = {}
    for name, metric in metrics.items():
        metric.update(scores, defective)
        value = metric.compute()
        values[name] = float(value["f1"] if isinstance(value, dict) else value)
    return values
