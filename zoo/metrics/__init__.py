"""Metrics of anomaly detection that torchmetrics lacks, or keeps every pixel for: bounded state, stated error."""

try:
    import scipy  # noqa: F401
    import torchmetrics  # noqa: F401
except ImportError as error:
    from zoo.errors import missing_extra

    raise missing_extra("train", error.name or "torchmetrics") from error

from zoo.metrics.aupro import AUPRO
from zoo.metrics.ranking import ImageAUPR, ImageAUROC, ImageF1Max, PixelAUPR, PixelAUROC, PixelF1Max

__all__ = ["AUPRO", "ImageAUPR", "ImageAUROC", "ImageF1Max", "PixelAUPR", "PixelAUROC", "PixelF1Max"]
