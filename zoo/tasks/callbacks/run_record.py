"""Keeps the facts of a run of any task: time, speed, memory, what was measured, and what could not be read."""

import csv
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from zoo.tasks.batches import images_in
from zoo.tasks.callbacks.record import command_line, facts_of_run, peak_memory_gb, write_record
from zoo.tasks.plain import plain


class RunRecord(Callback):
    """Writes record.json and, if images were skipped, skipped.csv. `test` adds to the record what it measured.

    Args:
        folder: the run folder; the trainer's default_root_dir when absent.
    """

    def __init__(self, folder: str | None = None):
        self._folder = folder
        self._seconds, self._images = 0.0, 0
        self._started: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._train_seconds(), "images": self._images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds, self._images = state_dict["seconds"], state_dict["images"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
        self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += images_in(batch) * trainer.world_size

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Time of validation is not time of training.
        self._seconds, self._started = self._train_seconds(), None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._started = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = self._train_seconds()
        self._seconds, self._started = seconds, None
        facts = facts_of_run(trainer, pl_module) | {
            "train_seconds": round(seconds, 2),
            # An epoch that the clock cut counts with the part that was done.
            "epochs_done": round(trainer.global_step / self._updates_per_epoch(trainer), 2),
            "steps": trainer.global_step,
            "images_per_second": round(self._images / max(seconds, 1e-9), 1),
            "peak_memory_gb": round(peak_memory_gb(trainer), 3),
        }
        if measured := self.measured(trainer, pl_module, "val"):
            facts["val"] = measured
        facts["skipped_images"] = len(_skipped(trainer))
        # A new fit makes what was measured on the old weights untrue; a test only adds.
        self._leave(trainer, pl_module, facts, "val", add=False)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tested = self.measured(trainer, pl_module, "test") or {}
        tested |= {"skipped_images": len(_skipped(trainer)), "command": command_line()}
        known = (self.run_folder(trainer) / "record.json").is_file()
        facts = {} if known else facts_of_run(trainer, pl_module)
        self._leave(trainer, pl_module, facts | {"test": tested}, "test", add=True)

    def measured(self, trainer: Trainer, task: LightningModule, stage: str) -> dict[str, Any] | None:
        """What the record says of "val" or "test": everything that was logged under that name."""
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(f"{stage}/")}
        return {k.removeprefix(f"{stage}/"): round(v, 6) for k, v in values.items()}

    def pictures(self, trainer: Trainer, task: LightningModule, stage: str, folder: Path) -> None:
        """Draws into `folder`, on the first process alone."""

    def run_folder(self, trainer: Trainer) -> Path:
        """Where everything goes."""
        return Path(self._folder or trainer.default_root_dir)

    def _leave(self, trainer: Trainer, task: LightningModule, facts: dict[str, Any], stage: str, add: bool) -> None:
        if not trainer.is_global_zero:
            return
        folder = self.run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        write_skipped(folder / f"{'test_' if stage == 'test' else ''}skipped.csv", _skipped(trainer))
        write_record(folder, facts, add)
        self.pictures(trainer, task, stage, folder / "pictures")

    def _train_seconds(self) -> float:
        return self._seconds + (time.monotonic() - self._started if self._started is not None else 0.0)

    @staticmethod
    def _updates_per_epoch(trainer: Trainer) -> float:
        return max(1.0, plain(trainer.num_training_batches) / trainer.accumulate_grad_batches)


def _skipped(trainer: Trainer) -> dict[str, str]:
    return dict(getattr(getattr(trainer, "datamodule", None), "skipped", None) or {})


def write_skipped(path: Path, skipped: dict[str, str]) -> None:
    """Writes one line per unreadable image, and says so; leaves no file where there is none."""
    if not skipped:
        return
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "reason"))
        writer.writerows(sorted((str(k), str(v)) for k, v in skipped.items()))
    rank_zero_info(f"{len(skipped)} images could not be read and were left out: {path}")
