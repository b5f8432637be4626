"""Leaves in the run folder what a person asks for after a classification run: its record and two pictures."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from zoo.tasks.callbacks.pictures import Mistake, draw_confusion_matrix, draw_mistakes
from zoo.tasks.callbacks.run_record import RunRecord


class RunReport(RunRecord):
    """Writes record.json, pictures/{confusion_matrix,worst_mistakes}.png and, if images were skipped, skipped.csv.

    During `fit` the pictures show the last validation; `test` draws its own beside them (test_*.png) and adds its
    accuracy to the record.

    Args:
        folder: the run folder; the trainer's default_root_dir when absent.
        mistakes: how many images the grid of worst mistakes holds.
    """

    def __init__(self, folder: str | None = None, mistakes: int = 24):
        super().__init__(folder)
        self._limit = mistakes
        self._confusion: Tensor | None = None
        self._worst: list[Mistake] = []

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

    def measured(self, trainer: Trainer, task: LightningModule, stage: str) -> dict[str, Any] | None:
        if self._confusion is None:
            return None
        # Over all devices; the pictured mistakes are those of the first.
        self._confusion = counts = trainer.strategy.reduce(self._confusion, reduce_op="sum")
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(f"{stage}/")}
        per_class = getattr(task, f"{stage}_per_class").compute()
        return {
            "top1": round(values[f"{stage}/top1"], 6),
            "top5": round(values[f"{stage}/top5"], 6),
            "images": int(counts.sum()),
            "per_class": dict(zip(_class_names(task), (round(float(v), 4) for v in per_class), strict=True)),
        }

    def pictures(self, trainer: Trainer, task: LightningModule, stage: str, folder: Path) -> None:
        if self._confusion is None:
            return
        names = _class_names(task)
        subset, prefix = {"val": ("validation", ""), "test": ("test", "test_")}[stage]
        draw_confusion_matrix(self._confusion.cpu().numpy(), names, folder / f"{prefix}confusion_matrix.png", subset)
        title = f"{subset}: most confident mistakes"
        draw_mistakes(self._worst, names, folder / f"{prefix}worst_mistakes.png", title)

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


def _class_names(task: LightningModule) -> list[str]:
    return list(task.hparams["class_names"])


def _picture(image: Tensor) -> Any:
    image = image if image.dtype == torch.uint8 else (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
    image = image.cpu()
    if image.shape[0] == 3:
        return image.permute(1, 2, 0).numpy()
    return image[0].numpy()
