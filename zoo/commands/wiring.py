"""Puts what every run has into the trainer: loggers, checkpoints, progress and record in the run folder."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from zoo.commands.loggers import run_loggers
from zoo.tasks import AtomicCheckpointIO
from zoo.tasks.base import Task
from zoo.tasks.callbacks import BestCheckpoint, LastCheckpoint, ProgressBar, RunRecord


def wire_fit(config: dict[str, Any], task: LightningModule, folder: Path, resumed_at: int | None) -> None:
    """Adds to the keyword arguments of a Trainer what a recipe does not have to say; what it says stays.

    Args:
        config: the keyword arguments; `callbacks` and `plugins` are lists.
        task: says which logged value the best checkpoint is chosen by, and what a run of it leaves.
        folder: the run folder.
        resumed_at: number of updates that a resumed run starts from.
    """
    callbacks: list[Callback] = config["callbacks"]
    if config.get("enable_checkpointing") is not False:
        monitor = getattr(task, "monitor", None)
        if monitor and not any(isinstance(c, ModelCheckpoint) and c.monitor for c in callbacks):
            mode = getattr(task, "monitor_mode", "max")
            callbacks.append(BestCheckpoint(monitor, mode))
        _add(callbacks, LastCheckpoint())
    _add_reports(callbacks, task)
    if config.get("enable_progress_bar") is not False:
        _add(callbacks, ProgressBar())
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(folder / "checkpoints")
    if config.get("logger") in (None, True):
        config["logger"] = run_loggers(folder, resumed_at)
    config["default_root_dir"] = str(folder)
    _add(config["plugins"], AtomicCheckpointIO())


def wire_evaluation(config: dict[str, Any], task: LightningModule, folder: Path) -> None:
    """The same for `zoo validate` and `zoo test`: nothing is trained, so nothing is logged or saved but the report."""
    _add_reports(config["callbacks"], task)
    if config.get("enable_progress_bar") is not False:
        _add(config["callbacks"], ProgressBar())
    config["default_root_dir"] = str(folder)
    config["logger"] = False
    config["enable_checkpointing"] = False
    if config["devices"] == "auto":
        # On several devices the sampler repeats images to fill the last batch, and the accuracy is no longer exact.
        config["devices"] = 1
    _add(config["plugins"], AtomicCheckpointIO())


def _add_reports(callbacks: list, task: LightningModule) -> None:
    for report in task.reports() if isinstance(task, Task) else [RunRecord()]:
        _add(callbacks, report)


def _add(where: list, item: object) -> None:
    if not any(isinstance(other, type(item)) for other in where):
        where.append(item)
