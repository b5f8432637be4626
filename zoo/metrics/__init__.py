"""Metrics that torchmetrics lacks, or keeps every pixel for: bounded state, stated rules and errors."""

try:
    import scipy  # noqa: F401
    import torchmetrics  # noqa: F401
except ImportError as error:
    from zoo.errors import missing_extra

    raise missing_extra("train", error.name or "torchmetrics") from error

from zoo.metrics.aupro import AUPRO
from zoo.metrics.boundaries import BoundaryF1, HausdorffDistance95
from zoo.metrics.ranking import ImageAUPR, ImageAUROC, ImageF1Max, PixelAUPR, PixelAUROC, PixelF1Max
from zoo.metrics.segmentation import DicePerImage, DiceScore, MeanIoU

__all__ = [
    "AUPRO",
    "BoundaryF1",
    "DicePerImage",
    "DiceScore",
    "HausdorffDistance95",
    "ImageAUPR",
    "ImageAUROC",
    "ImageF1Max",
    "MeanIoU",
    "PixelAUPR",
    "PixelAUROC",
    "PixelF1Max",
]
