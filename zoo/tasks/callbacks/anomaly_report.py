"""What `zoo test` leaves of a detector of anomalies: tables, pictures and one HTML page with all of it."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from zoo.data.anomaly_images import without_padding
from zoo.tasks.callbacks.anomaly_gallery import GROUPS, Example, Gallery
from zoo.tasks.callbacks.anomaly_pictures import draw_example, draw_scores, heat_range, verdict
from zoo.tasks.callbacks.anomaly_rows import (
    KIND_COLUMNS,
    SIZE_COLUMNS,
    DefectRow,
    ImageRow,
    KindLine,
    SizeLine,
    by_kind,
    by_size,
    kind_cells,
    measure,
    size_cells,
)
from zoo.tasks.callbacks.page import page, print_table, write_page

_SHOWN = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "pixel_aupr": "pixel AUPR",
    "aupro_0.3": "AU-PRO to 30 %",
    "f1": "F1 at the threshold",
}
_KIND_REMARK = (
    "Above threshold: the score of the image. AUROC: images of the kind against all good ones. Hit: a pixel of the "
    "defect lies above the threshold of pixels; covered: the share of its pixels that do, averaged over defects."
)
_HISTOGRAM = "Histogram of the scores of good and defective images"
_SIZE_REMARK = "Quartiles of the sizes of all defects, in pixels as tested; every defect counts once."


class AnomalyReport(Callback):
    """Writes report.html, test_images.csv, test_kinds.csv, test_sizes.csv and pictures/test_*.png; prints the tables.

    Reads from the outputs of `test_step`: "score" (B,), "map" (B, 1, H, W), "image" (B, C, H, W), "mask" bool
    (B, 1, H, W), "label" (B,), "kind" and "path" (B strings), where some masks are unknown "has_mask" (B,), and where
    images are padded "inner_size" (B, 2), outside of which nothing is counted or shown; from the task `threshold` and,
    if it has one, `pixel_threshold`. Of each image it keeps a few numbers, and small copies of the few that it will
    show; maps are let go batch by batch.

    Args:
        folder: the run folder; the trainer's default_root_dir when absent.
        pictures: how many images are shown of each group: the worst and the best defects and good images.
        side: longest side of a shown image in pixels.
    """

    def __init__(self, folder: str | None = None, pictures: int = 6, side: int = 480):
        self._folder, self._limit, self._side = folder, pictures, side
        self._clear()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clear()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(outputs, thresholds_of(pl_module)[1])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._gather(trainer)
        if trainer.is_global_zero and self._images:
            measured = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test/")}
            folder = Path(self._folder or trainer.default_root_dir)
            self._write(folder, pl_module, {k.removeprefix("test/"): v for k, v in measured.items()})
        self._clear()

    def _clear(self) -> None:
        self._images: dict[str, ImageRow] = {}
        self._defects: dict[str, list[DefectRow]] = {}
        self._gallery = Gallery(self._limit, self._side)

    def _collect(self, outputs: Mapping[str, Any], pixel_threshold: float) -> None:
        scores, labels = outputs["score"].tolist(), outputs["label"].tolist()
        inner = outputs.get("inner_size")
        images, maps = without_padding(outputs["image"], inner), without_padding(outputs["map"], inner)
        masks = without_padding(outputs["mask"].reshape(outputs["map"].shape).bool(), inner)
        known = [bool(v) for v in outputs.get("has_mask", [True] * len(scores))]
        for i, (score, path, kind) in enumerate(zip(scores, outputs["path"], outputs["kind"], strict=True)):
            mask = masks[i][0] if known[i] else None
            drawn = None if mask is None else mask.cpu().numpy()
            # Without a threshold of pixels none is above.
            above = (maps[i][0] > pixel_threshold).cpu().numpy()
            self._images[path], self._defects[path] = measure(path, kind, bool(labels[i]), score, above, drawn)
            self._gallery.offer(path, kind, bool(labels[i]), score, images[i], maps[i][0], mask)

    def _gather(self, trainer: Trainer) -> None:
        if trainer.world_size == 1:
            return
        mine = self._images, self._defects, self._gallery.state()
        every: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(every, mine)
        # By path: a distributed sampler gives some images to two processes.
        for images, defects, _ in every:
            self._images |= images
            self._defects |= defects
        self._gallery.merge([state for _, _, state in every])

    def _write(self, folder: Path, task: LightningModule, measured: Mapping[str, float]) -> None:
        threshold, pixel_threshold = thresholds_of(task)
        images = sorted(self._images.values(), key=lambda row: (-row.score, row.path))
        defects = [row for path in sorted(self._defects) for row in self._defects[path]]
        kinds, sizes = by_kind(images, defects, threshold), by_size(defects)
        folder.mkdir(parents=True, exist_ok=True)
        _write_images(folder / "test_images.csv", images, threshold)
        _write_lines(folder / "test_kinds.csv", KindLine, kinds)
        _write_lines(folder / "test_sizes.csv", SizeLine, sizes)
        chosen = self._gallery.chosen()
        drawn = _draw(folder / "pictures", chosen, threshold, pixel_threshold)
        draw_scores(images, threshold, folder / "pictures" / "test_scores.png")
        tables = [("By kind", _KIND_REMARK, KIND_COLUMNS, [kind_cells(line) for line in kinds])]
        if sizes:
            tables.append(("By size", _SIZE_REMARK, SIZE_COLUMNS, [size_cells(line) for line in sizes]))
        for heading, _, columns, rows in tables:
            # Sizes within each kind are many lines: in the page and the CSV.
            shown = [row for row in rows if columns is KIND_COLUMNS or row[0] == "all"]
            print_table(f"Test images {heading.lower()}", columns, shown)
        text = page(
            f"Test of {folder.name}",
            about(task, images),
            cards(measured, threshold),
            tables,
            drawn,
            ("Scores and threshold", folder / "pictures" / "test_scores.png", _HISTOGRAM),
        )
        write_page(folder / "report.html", text)


def thresholds_of(task: LightningModule) -> tuple[float, float]:
    """Thresholds of an image's score and of a pixel; nan where validation left none."""
    threshold = float(getattr(task, "threshold", math.nan))
    pixel_threshold = float(getattr(task, "pixel_threshold", math.nan))
    return threshold, threshold if math.isnan(pixel_threshold) else pixel_threshold


def about(task: LightningModule, images: Sequence[ImageRow]) -> str:
    """What was tested on how many images, in a sentence or two."""
    hparams = task.hparams
    made = [str(hparams[key]) for key in ("method", "backbone") if hparams.get(key)]
    size = hparams.get("img_size")
    if size:
        made.append(f"{size[0]} x {size[1]} pixels" if isinstance(size, list | tuple) else f"{size} pixels")
    bad = sum(row.defective for row in images)
    counted = f"{len(images) - bad} good and {bad} defective test images, {datetime.now():%Y-%m-%d %H:%M}."
    return f"{', '.join(made)}. {counted} The thresholds were taken from validation images alone."


def cards(measured: Mapping[str, float], threshold: float) -> list[tuple[str, str]]:
    """The figures at the top of the page: what the task has logged of them, and the threshold."""
    shown = [(name, f"{measured[key]:.4f}") for key, name in _SHOWN.items() if key in measured]
    return shown + ([] if math.isnan(threshold) else [("threshold of the score", f"{threshold:.4g}")])


def _draw(
    folder: Path, chosen: Mapping[str, Sequence[Example]], threshold: float, pixel_threshold: float
) -> dict[str, list[tuple[Path, str]]]:
    # Those of an earlier test would stand beside these and say something else.
    for old in folder.glob("test_*.png"):
        if re.fullmatch(rf"test_({'|'.join(GROUPS)})_\d+\.png", old.name):
            old.unlink()
    heat = heat_range([example for group in chosen.values() for example in group], pixel_threshold)
    drawn: dict[str, list[tuple[Path, str]]] = {}
    for group, examples in chosen.items():
        for number, example in enumerate(examples, 1):
            path = folder / f"test_{group}_{number}.png"
            draw_example(example, path, threshold, pixel_threshold, heat)
            word = verdict(example.defective, example.score, threshold)
            words = f"{example.path}: {example.kind}, {word}, score {example.score:.4g}"
            drawn.setdefault(GROUPS[group], []).append((path, words))
    return drawn


def _write_images(path: Path, images: Sequence[ImageRow], threshold: float) -> None:
    columns = [field.name for field in fields(ImageRow)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "threshold", "verdict"])
        for row in images:
            writer.writerow([*_cells(row), f"{threshold:.9g}", verdict(row.defective, row.score, threshold)])


def _write_lines(path: Path, kind: type, lines: Sequence[Any]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(kind)])
        writer.writerows(_cells(line) for line in lines)


def _cells(row: Any) -> list[str]:
    # 9 digits give a float32 back; what is unknown stays empty.
    found = []
    for value in astuple(row):
        unknown = value is None or (isinstance(value, float) and math.isnan(value))
        found.append("" if unknown else f"{value:.9g}" if isinstance(value, float) else str(value))
    return found
