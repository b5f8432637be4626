"""What is measured of a segmentation: always from one table of all pixels, by outlines on request."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from zoo.errors import unknown
from zoo.metrics import BoundaryF1, DicePerImage, DiceScore, HausdorffDistance95, MeanIoU

# Those on request look at images one by one, the outlines on the CPU: seconds for each hundred megapixels.
EXTRA: dict[str, Callable[..., Metric]] = {
    "boundary_f1": BoundaryF1,
    "hd95": HausdorffDistance95,
    "dice_image": DicePerImage,
}


class Measures(nn.Module):
    """mIoU, Dice and pixel accuracy of one pass over images, and what else was asked for.

    Args:
        extra: names of `EXTRA`.

    Raises:
        UsageError: an unknown name.
    """

    def __init__(self, num_classes: int, ignore_index: int, extra: Sequence[str] = ()) -> None:
        super().__init__()
        for name in extra:
            if name not in EXTRA:
                raise unknown("metric", name, EXTRA)
        shared: dict[str, Callable[..., Metric]] = {"iou": MeanIoU, "dice": DiceScore}
        # Said outright who shares a state: torchmetrics would guess it from the first batch.
        self.metrics = MetricCollection(
            {name: kind(num_classes, ignore_index) for name, kind in (shared | {k: EXTRA[k] for k in extra}).items()},
            compute_groups=[list(shared), *([name] for name in dict.fromkeys(extra))],
        )

    def reset(self) -> None:
        """Forgets all images."""
        self.metrics.reset()

    def update(self, classes: Tensor, mask: Tensor) -> None:
        """Takes predicted and true class numbers, int64 (B, H, W)."""
        self.metrics.update(classes, mask)

    def compute(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """(name -> value, name -> value of each class), as fractions of 1, hd95 in pixels."""
        values, by_class = {}, {}
        for name, value in self.metrics.compute().items():
            if name.endswith("_per_class"):
                by_class[name.removesuffix("_per_class")] = value.tolist()
            else:
                values[name] = float(value)
        return values, by_class
