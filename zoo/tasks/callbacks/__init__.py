"""What a run shows and leaves behind: progress, checkpoints, pictures and its record; masks of heads."""

from zoo.tasks.callbacks.best import BestCheckpoint
from zoo.tasks.callbacks.head_mask import HeadMask
from zoo.tasks.callbacks.hedgehog_distillation import HedgehogDistillation
from zoo.tasks.callbacks.last import LastCheckpoint
from zoo.tasks.callbacks.progress import ProgressBar
from zoo.tasks.callbacks.report import RunReport
from zoo.tasks.callbacks.run_record import RunRecord

__all__ = [
    "BestCheckpoint",
    "HeadMask",
    "HedgehogDistillation",
    "LastCheckpoint",
    "ProgressBar",
    "RunRecord",
    "RunReport",
]
