"""Training tasks: LightningModules with one `inference`, which validation, prediction and export all call."""

try:
    import lightning.pytorch  # noqa: F401
    import torchmetrics  # noqa: F401
except ImportError as error:
    from zoo.errors import missing_extra

    raise missing_extra("train", error.name or "lightning") from error

from zoo.tasks.anomaly import AnomalyDetection
from zoo.tasks.checkpoint import AtomicCheckpointIO, load_task
from zoo.tasks.classification import Classification
from zoo.tasks.finite import NonFiniteLossError
from zoo.tasks.segmentation import Segmentation

__all__ = [
    "AnomalyDetection",
    "AtomicCheckpointIO",
    "Classification",
    "NonFiniteLossError",
    "Segmentation",
    "load_task",
]
