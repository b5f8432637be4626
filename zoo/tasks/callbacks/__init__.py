"""What a run shows and leaves behind: progress, the last checkpoint, pictures and its record."""

from zoo.tasks.callbacks.last import LastCheckpoint
from zoo.tasks.callbacks.progress import ProgressBar
from zoo.tasks.callbacks.report import RunReport

__all__ = ["LastCheckpoint", "ProgressBar", "RunReport"]
