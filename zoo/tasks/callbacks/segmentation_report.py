"""What a run of segmentation leaves: its record with every class, a table, pictures and a page with all of it."""

import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from zoo.tasks.callbacks.page import page, print_table, write_page
from zoo.tasks.callbacks.run_record import RunRecord
from zoo.tasks.callbacks.segmentation_gallery import GROUPS, Example, Gallery
from zoo.tasks.callbacks.segmentation_pictures import draw_example

_NAMES = {"miou": "mIoU", "iou": "IoU", "dice": "Dice", "pixel_accuracy": "pixel accuracy", "loss": "loss"}
_NAMES |= {"boundary_f1": "boundary F1", "hd95": "HD95 (pixels)", "dice_image": "Dice by image"}
_REMARK = (
    "IoU and Dice from all pixels of all images together; pixels without a class count for nothing. A class that "
    "neither an image nor a prediction shows has no value."
)
_STAGES = {"val": ("Validation", "validation.html"), "test": ("Test", "report.html")}


class SegmentationReport(RunRecord):
    """Writes record.json and pictures/{val,test}_*.png, validation.html or report.html; prints a table of the classes.

    Reads from the outputs of the steps: "image" (B, C, H, W), "mask" and "classes" int64 (B, H, W), "path" (B strings);
    from the task `measures`, and the hyperparameters class_names, palette and ignore_index. During `fit` the page shows
    the last validation, after `validate` and `test` what they saw.

    Args:
        folder: the run folder; the trainer's default_root_dir when absent.
        shown: how many images are shown of the worst, and of the best.
        side: longest side of a shown image in pixels.
    """

    def __init__(self, folder: str | None = None, shown: int = 6, side: int = 480):
        super().__init__(folder)
        self._limit, self._side = shown, side
        self._gallery: Gallery | None = None
        self._seen = 0
        self._per_class: dict[str, dict[str, float]] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clear(pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clear(pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(outputs)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "validate" and self.measured(trainer, pl_module, "val") and trainer.is_global_zero:
            self.pictures(trainer, pl_module, "val", self.run_folder(trainer) / "pictures")

    def measured(self, trainer: Trainer, task: LightningModule, stage: str) -> dict[str, Any] | None:
        values = super().measured(trainer, task, stage)
        if self._gallery is None or not values:
            return None
        self._gather(trainer)
        by_class = task.measures[stage].compute()[1]
        self._per_class = {
            name: {key: round(found[number], 6) for key, found in by_class.items() if not math.isnan(found[number])}
            for number, name in enumerate(task.hparams["class_names"])
        }
        return values | {"images": self._seen, "per_class": self._per_class}

    def pictures(self, trainer: Trainer, task: LightningModule, stage: str, folder: Path) -> None:
        if self._gallery is None:
            return
        title, file = _STAGES[stage]
        columns, rows = class_table(self._per_class)
        drawn = _draw(folder, stage, self._gallery.chosen(), task)
        logged = {k.removeprefix(f"{stage}/"): float(v) for k, v in trainer.callback_metrics.items()}
        run = folder.parent.resolve().name
        text = page(
            f"{title} of {run}",
            about(task, self._seen, title.lower()),
            [(name, _shown(key, logged[key])) for key, name in _NAMES.items() if key in logged],
            [("By class", _REMARK, columns, rows)],
            drawn,
        )
        write_page(folder.parent / file, text)
        print_table(f"{title} images by class", columns, rows)

    def _collect(self, outputs: Any) -> None:
        assert self._gallery is not None
        self._gallery.offer(outputs["path"], outputs["image"], outputs["mask"], outputs["classes"])
        self._seen += len(outputs["path"])

    def _gather(self, trainer: Trainer) -> None:
        if trainer.world_size == 1:
            return
        every: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(every, (self._gallery.state(), self._seen))
        self._gallery.merge([state for state, _ in every])
        self._seen = sum(images for _, images in every)

    def _clear(self, task: LightningModule) -> None:
        hparams = task.hparams
        self._gallery = Gallery(len(hparams["class_names"]), hparams["ignore_index"], self._limit, self._side)
        self._seen, self._per_class = 0, {}


def class_table(per_class: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of classes; what has no value is a dash."""
    keys = list(dict.fromkeys(key for values in per_class.values() for key in values))
    rows = [[name, *(_shown(key, values.get(key)) for key in keys)] for name, values in per_class.items()]
    return ["class", *(_NAMES[key] for key in keys)], rows


def about(task: LightningModule, images: int, what: str) -> str:
    """What was measured on how many images, in a sentence or two."""
    hparams = task.hparams
    size = hparams["img_size"]
    made = f"{hparams['head']}, {hparams['backbone']}, trained on {size[0]} x {size[1]} pixels"
    return f"{made}. {images} {what} images, {datetime.now():%Y-%m-%d %H:%M}."


def _draw(
    folder: Path, stage: str, chosen: Mapping[str, Sequence[Example]], task: LightningModule
) -> dict[str, list[tuple[Path, str]]]:
    # Those of an earlier time would stand beside these and say something else.
    for old in folder.glob(f"{stage}_*.png"):
        if re.fullmatch(rf"{stage}_({'|'.join(GROUPS)})_\d+\.png", old.name):
            old.unlink()
    hparams = task.hparams
    drawn: dict[str, list[tuple[Path, str]]] = {}
    for group, examples in chosen.items():
        for number, example in enumerate(examples, 1):
            path = folder / f"{stage}_{group}_{number}.png"
            draw_example(example, path, hparams["class_names"], hparams["palette"], hparams["ignore_index"])
            drawn.setdefault(GROUPS[group], []).append((path, f"{example.path}: mIoU {example.miou:.2%}"))
    return drawn


def _shown(key: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if key == "hd95" else f"{value:.4f}"
