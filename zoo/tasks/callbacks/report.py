"""Leaves in the run folder what a person asks for after a run: record.json, two pictures, and what was skipped."""

import csv
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from zoo.tasks.callbacks.pictures import Mistake, draw_confusion_matrix, draw_mistakes
from zoo.tasks.callbacks.record import command_line, facts_of_run, peak_memory_gb, write_record
from zoo.tasks.plain import plain


class RunReport(Callback):
    """Writes record.json, pictures/{confusion_matrix,worst_mistakes}.png and, if images were skipped, skipped.csv.

    During `fit` the pictures show the last validation; `test` draws its own beside them (test_*.png) and adds its
    accuracy to the record.

    Args:
        folder: the run folder; the trainer's default_root_dir when absent.
        mistakes: how many images the grid of worst mistakes holds.
    """

    def __init__(self, folder: str | None = None, mistakes: int = 24):
        self._folder = folder
        self._limit = mistakes
        self._seconds, self._images = 0.0, 0
        self._started: float | None = None
        self._confusion: Tensor | None = None
        self._worst: list[Mistake] = []

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
        self._images += len(batch[0]) * trainer.world_size

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Time of validation is not time of training.
        self._seconds, self._started = self._train_seconds(), None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._started = time.monotonic()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clear()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clear()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:
            self._collect(batch[0], outputs)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(batch[0], outputs)

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
        counts = self._counts(trainer)
        if counts is not None:
            facts["val"] = self._accuracy(trainer, pl_module, "val", counts)
        facts["skipped_images"] = len(_skipped(trainer))
        # A new fit makes what was measured on the old weights untrue; a test only adds.
        self._leave(trainer, pl_module, facts, counts, "validation", "", add=False)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counts = self._counts(trainer)
        tested = self._accuracy(trainer, pl_module, "test", counts)
        tested |= {"skipped_images": len(_skipped(trainer)), "command": command_line()}
        known = (self._run_folder(trainer) / "record.json").is_file()
        facts = {} if known else facts_of_run(trainer, pl_module)
        self._leave(trainer, pl_module, facts | {"test": tested}, counts, "test", "test_", add=True)

    def _leave(
        self,
        trainer: Trainer,
        task: LightningModule,
        facts: dict[str, Any],
        counts: Tensor | None,
        subset: str,
        prefix: str,
        add: bool,
    ) -> None:
        if not trainer.is_global_zero:
            return
        folder = self._run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        write_skipped(folder / f"{prefix}skipped.csv", _skipped(trainer))
        write_record(folder, facts, add)
        if counts is None:
            return
        names, pictures = _class_names(task), folder / "pictures"
        draw_confusion_matrix(counts.cpu().numpy(), names, pictures / f"{prefix}confusion_matrix.png", subset)
        title = f"{subset}: most confident mistakes"
        draw_mistakes(self._worst, names, pictures / f"{prefix}worst_mistakes.png", title)

    def _counts(self, trainer: Trainer) -> Tensor | None:
        # Over all devices; the pictured mistakes are those of the first.
        if self._confusion is None:
            return None
        return trainer.strategy.reduce(self._confusion.clone(), reduce_op="sum")

    def _accuracy(self, trainer: Trainer, task: LightningModule, stage: str, counts: Tensor | None) -> dict[str, Any]:
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(f"{stage}/")}
        per_class = getattr(task, f"{stage}_per_class").compute()
        return {
            "top1": round(values[f"{stage}/top1"], 6),
            "top5": round(values[f"{stage}/top5"], 6),
            "images": int(counts.sum()) if counts is not None else 0,
            "per_class": dict(zip(_class_names(task), (round(float(v), 4) for v in per_class), strict=True)),
        }

    def _collect(self, images: Tensor, outputs: dict[str, Tensor]) -> None:
        logits, targets = outputs["logits"], outputs["targets"]
        probability, predicted = logits.softmax(-1).max(-1)
        classes = logits.shape[-1]
        counts = torch.bincount(targets * classes + predicted, minlength=classes * classes).view(classes, classes)
        self._confusion = counts if self._confusion is None else self._confusion + counts
        wrong = torch.where(predicted != targets, probability, torch.zeros_like(probability))
        top, index = wrong.topk(min(self._limit, len(wrong)))
        floor = self._worst[-1].probability if len(self._worst) == self._limit else 0.0
        for value, i in zip(top.tolist(), index.tolist(), strict=True):
            if value <= floor:
                break
            mistake = Mistake(_picture(images[i]), int(targets[i]), int(predicted[i]), value)
            self._worst.append(mistake)
        self._worst = sorted(self._worst, key=lambda m: -m.probability)[: self._limit]

    def _clear(self) -> None:
        self._confusion, self._worst = None, []

    def _train_seconds(self) -> float:
        return self._seconds + (time.monotonic() - self._started if self._started is not None else 0.0)

    def _run_folder(self, trainer: Trainer) -> Path:
        return Path(self._folder or trainer.default_root_dir)

    @staticmethod
    def _updates_per_epoch(trainer: Trainer) -> float:
        return max(1.0, plain(trainer.num_training_batches) / trainer.accumulate_grad_batches)


def _skipped(trainer: Trainer) -> dict[str, str]:
    return dict(getattr(getattr(trainer, "datamodule", None), "skipped", None) or {})


def _class_names(task: LightningModule) -> list[str]:
    return list(task.hparams["class_names"])


def write_skipped(path: Path, skipped: dict[str, str]) -> None:
    """Writes one line per unreadable image, and says so; leaves no file where there is none."""
    if not skipped:
        return
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "reason"))
        writer.writerows(sorted((str(k), str(v)) for k, v in skipped.items()))
    rank_zero_info(f"{len(skipped)} images could not be read and were left out: {path}")


def _picture(image: Tensor) -> Any:
    image = image if image.dtype == torch.uint8 else (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
    image = image.cpu()
    if image.shape[0] == 3:
        return image.permute(1, 2, 0).numpy()
    return image[0].numpy()
