"""Data modules: what a run reads, split, augmented and batched the same way on every machine."""

from zoo.errors import missing_extra

try:
    import lightning  # noqa: F401
except ImportError as error:
    raise missing_extra("train", "lightning") from error

from zoo.data.anomaly import AnomalyDetection
from zoo.data.classification import ImageClassification
from zoo.data.segmentation import Segmentation

__all__ = ["AnomalyDetection", "ImageClassification", "Segmentation"]
