"""Checkpoints: written so that a kill or a full disk never costs the previous one, read without running code."""

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule

from zoo.errors import UsageError
from zoo.tasks.weights import read_file

# Hyperparameters that every checkpoint of a task has.
_NAMED = {
    "Classification": {"backbone", "class_names"},
    "AnomalyDetection": {"backbone", "method"},
    "Segmentation": {"head", "backbone", "class_names"},
}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to the disk, and only then renames; reads with weights_only.

    Lightning writes to the system's temporary folder and moves the file from there, which on another file system is a
    copy onto the previous checkpoint: a kill or a full disk at that moment leaves neither the old nor the new one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.part")
        try:
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            # torch's zip writer answers a full disk with a RuntimeError about its own position in the file.
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):
                raise OSError(f"{path} could not be written; is the disk full? ({error})") from error
            raise

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_file(path)


def load_task(path: str | Path) -> tuple[LightningModule, dict[str, Any]]:
    """The task of a checkpoint in eval mode on the CPU, and the hyperparameters of its data.

    With EMA in the recipe these are the averaged weights: Lightning stores them as the model's own.

    Raises:
        UsageError: no such file, damaged, holding code, no checkpoint of a run, or of another architecture than it
            says itself.
    """
    import zoo.tasks

    checkpoint = read_file(path)
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= set(checkpoint):
        raise UsageError(
            f"{path} is no checkpoint of a run (it has no hyperparameters). "
            "Weights alone are given as --model.pretrained FILE."
        )
    kind = task_kind(checkpoint)
    hparams = {k: v for k, v in checkpoint["hyper_parameters"].items() if not k.startswith("_")}
    if not _NAMED[kind] <= set(hparams):
        raise UsageError(f"{path} is a checkpoint of another program: it names no backbone and no classes or method")
    # All weights come from the checkpoint itself: the file that training started from may be gone.
    task = getattr(zoo.tasks, kind)(**(hparams | {"pretrained": False}))
    try:
        task.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:400]
        raise UsageError(f"the weights in {path} do not fit backbone {hparams['backbone']!r}: {detail}") from error
    return task.eval(), dict(checkpoint.get("datamodule_hyper_parameters") or {})


def task_kind(checkpoint: Mapping[str, Any]) -> str:
    """Name of the class in zoo.tasks that a checkpoint belongs to: only a detector of anomalies has a method, and only
    segmentation a head of its own.
    """
    hparams = checkpoint["hyper_parameters"]
    return "AnomalyDetection" if "method" in hparams else "Segmentation" if "head" in hparams else "Classification"
