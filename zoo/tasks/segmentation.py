"""Segmentation: a class for every pixel, through one `inference` that validation, prediction and export call."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from zoo.data.segmentation import WEIGHTS
from zoo.data.segmentation_classes import default_palette
from zoo.errors import UsageError, unknown
from zoo.heads import create_segmenter
from zoo.tasks.backbone import own_size
from zoo.tasks.base import Task, check_head_options, check_same, check_training_values, pair
from zoo.tasks.batches import images_of
from zoo.tasks.callbacks.segmentation_report import SegmentationReport
from zoo.tasks.classification import check_same_classes
from zoo.tasks.plain import plain
from zoo.tasks.segmentation_losses import LOSSES, segmentation_loss
from zoo.tasks.segmentation_metrics import Measures
from zoo.tasks.sliding import check_window, classes_by_windows

_SAME = {
    "head": "head",
    "backbone": "backbone",
    "backbone_options": "backbone options",
    "head_options": "head options",
    "in_chans": "number of channels",
}
_SHOWN = {"miou": "mIoU", "dice": "Dice", "boundary_f1": "boundary F1"}


class Segmentation(Task):
    """Trains a head over a backbone to name the class of every pixel.

    Batches are dicts: "image" (B, C, H, W) in [0, 1] or uint8, not normalised; "mask" int64 (B, H, W), class numbers or
    `ignore_index`, whose pixels count for nothing; "path" (B strings). Logged: {val,test}/{miou,dice,pixel_accuracy},
    each from all pixels of the images together, what `metrics` asks for, and {val,test}/loss unless windows are used.
    val/miou chooses the best checkpoint.

    Args:
        head: of `zoo.heads.list_heads("segmentation")`.
        backbone: the encoder, any timm name, ours included.
        class_names: one per class, in the order of their numbers. The command line takes them from the data.
        palette: a colour (red, green, blue) per class, for pictures; the command line takes it from the data, which
            has colours of its own for classes without one.
        ignore_index: class number of pixels without a class.
        img_size: side, or (height, width), of training images; the backbone's own when absent. An encoder that takes
            one size alone sees larger images by windows of it.
        head_options: further keyword arguments of the head.
        backbone_options: further keyword arguments of the backbone.
        pretrained: True for timm's weights of the encoder, or a weights file.
        mean, std: per channel, in [0, 1]; the backbone's own when absent.
        loss: of `zoo.tasks.segmentation_losses.LOSSES`.
        loss_weights: of each output of a head with deep supervision, the main one first; 1 when absent.
        class_weights: one per class, or "median" or "inverse" to count them from the training masks.
        label_smoothing: of the cross-entropy in the loss.
        metrics: further ones: boundary_f1, hd95, dice_image.
        window: side, or (height, width), of windows that validation, test and prediction look through; whole images
            when absent.
        window_overlap: pixels that neighbouring windows share at least; a quarter of the shorter side when absent.
        optimizer, optimizer_options, scheduler, scheduler_options, warmup_epochs: as in `Classification`.

    Raises:
        UsageError: a name, an option, the image size or the weights do not fit.
    """

    monitor = "val/miou"

    def __init__(
        self,
        head: str = "fpn",
        backbone: str = "tf_efficientnet_lite0",
        class_names: Sequence[str] = (),
        palette: Sequence[Sequence[int]] = (),
        ignore_index: int = 255,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        head_options: dict[str, Any] | None = None,
        backbone_options: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        loss: str = "cross_entropy",
        loss_weights: list[float] | None = None,
        class_weights: str | list[float] | None = None,
        label_smoothing: float = 0.0,
        metrics: list[str] | None = None,
        window: int | tuple[int, int] | None = None,
        window_overlap: int | None = None,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        optimizer_options: dict[str, Any] | None = None,
        scheduler: str = "cosine",
        warmup_epochs: float = 0.0,
        warmup_lr: float = 1e-6,
        min_lr: float = 0.0,
        scheduler_options: dict[str, Any] | None = None,
    ):
        super().__init__()
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        _check_values(arguments)
        size = pair(img_size) if img_size is not None else own_size(backbone)
        self.segmenter = create_segmenter(
            head,
            backbone,
            len(class_names),
            img_size=size,
            in_chans=in_chans,
            pretrained=pretrained,
            backbone_options=backbone_options,
            **(head_options or {}),
        )
        arguments |= self._keep_statistics(
            self.segmenter.mean if mean is None else mean, self.segmenter.std if std is None else std, in_chans
        )
        self.window = pair(window, "window") if window is not None else None if self.segmenter.any_size else size
        if self.window is not None and self.window != size and not self.segmenter.any_size:
            raise UsageError(f"window={window}: {backbone} takes images of {size[0]} x {size[1]} alone; leave it away")
        # A window that the encoder asks for has an overlap without being asked.
        self.overlap = check_window(self.window, window_overlap)
        colours = [list(colour) for colour in palette] or default_palette(len(class_names))
        # The resolved values, so that a checkpoint needs neither the data nor a later version's defaults.
        arguments |= {"img_size": list(size), "class_names": list(class_names), "palette": colours}
        self.save_hyperparameters(plain(arguments), logger=False)
        self.measures = nn.ModuleDict(
            {stage: Measures(len(class_names), ignore_index, metrics or ()) for stage in ("val", "test")}
        )
        self._class_weights: Tensor | None = None

    @property
    def trained(self) -> nn.Module:
        """Encoder and head."""
        return self.segmenter

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        return list(self.hparams["class_names"])

    def inference(self, images: Tensor) -> Tensor:
        """Logits, float32 (B, K, H, W), of images (B, C, H, W): uint8, or float in [0, 1]. Needs eval mode."""
        return self.segmenter(self._normalise(images)).float()

    def forward(self, images: Tensor) -> Tensor:
        """Same as `inference`."""
        return self.inference(images)

    def classes(self, images: Tensor) -> Tensor:
        """Class numbers, int64 (B, H, W), of images (B, C, H, W) of any size: by windows where there is one."""
        if self.window is None:
            return self.inference(images).argmax(1)
        return classes_by_windows(self.inference, images, self.window, self.overlap or 0)

    def export_meta(self) -> dict[str, Any]:
        """What an exported file has to say about this task; plain types only."""
        names = ("head", "backbone", "backbone_options", "class_names", "palette", "img_size", "in_chans")
        own = {
            "any_size": bool(self.segmenter.any_size),
            "window": list(self.window) if self.window else None,
            "window_overlap": self.overlap,
        }
        return {"task": "segmentation"} | {k: self.hparams[k] for k in (*names, "mean", "std")} | own

    def reports(self) -> list[Callback]:
        return [SegmentationReport()]

    def headline(self, metrics: Mapping[str, float], stage: str, best: float | None = None) -> list[tuple[str, str]]:
        where = {"val": "validation", "test": "test"}[stage]
        found = [f"{label} {metrics[f'{stage}/{k}']:.2%}" for k, label in _SHOWN.items() if f"{stage}/{k}" in metrics]
        if f"{stage}/hd95" in metrics:
            found.append(f"HD95 {metrics[f'{stage}/hd95']:.2f} pixels")
        lines = [("pixels", f"{', '.join(found)} ({where} images)")] if found else []
        last = metrics.get(self.monitor)
        if best is not None and last is not None and best - last > 5e-5:
            lines.append(("best", f"an earlier epoch: mIoU {best:.2%}, in the last {last:.2%}; best.ckpt holds it"))
        return lines

    def left(self, folder: Path, stage: str) -> list[tuple[str, str]]:
        report = folder / {"val": "validation.html", "test": "report.html"}[stage]
        return [("report", f"{report}; pictures in {folder / 'pictures'}")] if report.is_file() else []

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.trainer.strategy.root_device.type == "cuda":
            self.segmenter.to(memory_format=torch.channels_last)
        if stage == "fit":
            self._class_weights = self._weigh_classes()
            if not self.hparams["pretrained"]:
                rank_zero_warn(
                    f"{self.hparams['backbone']} starts from random weights, which needs many images or much time. "
                    "Better: --model.pretrained true, or a file of weights"
                )

    def _weigh_classes(self) -> Tensor | None:
        weights = self.hparams["class_weights"]
        if isinstance(weights, str):
            data = getattr(self.trainer, "datamodule", None)
            if not hasattr(data, "class_weights"):
                raise UsageError(f"class_weights={weights!r}: this data cannot count them; give a list of numbers")
            weights = data.class_weights(weights)
        return None if weights is None else torch.tensor(weights, device=self.device)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._make_optimizer(self.segmenter)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        logits = self.segmenter(self._normalise(images_of(batch)))
        loss = self._loss(logits, batch["mask"], training=True)
        self._guard.check(loss, self.global_step)
        self._log_step(loss)
        return loss

    def _loss(self, logits: Tensor | Sequence[Tensor], mask: Tensor, training: bool) -> Tensor:
        hparams, weights = self.hparams, self._class_weights
        if weights is not None and weights.device != mask.device:
            weights = self._class_weights = weights.to(mask.device)
        return segmentation_loss(
            hparams["loss"],
            logits,
            mask,
            ignore_index=hparams["ignore_index"],
            class_weights=weights,
            weights=hparams["loss_weights"] if training else None,
            label_smoothing=hparams["label_smoothing"],
        )

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        return self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        return self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.classes(images_of(batch))

    def _evaluate(self, batch: Mapping[str, Any], stage: str) -> dict[str, Any]:
        images, mask = batch["image"], batch["mask"]
        if self.window is None:
            logits = self.inference(images)
            classes = logits.argmax(1)
            loss = self._loss(logits, mask, training=False)
            self.log(f"{stage}/loss", loss, batch_size=len(images), sync_dist=True)
        else:
            classes = self.classes(images)
        self.measures[stage].update(classes, mask)
        return {"classes": classes} | {k: batch[k] for k in ("image", "mask", "path") if k in batch}

    def on_validation_epoch_start(self) -> None:
        self.measures["val"].reset()

    def on_test_epoch_start(self) -> None:
        self.measures["test"].reset()

    def on_validation_epoch_end(self) -> None:
        self._log_all("val")

    def on_test_epoch_end(self) -> None:
        self._log_all("test")

    def _log_all(self, stage: str) -> None:
        for name, value in self.measures[stage].compute()[0].items():
            # Each process has computed it from the images of all.
            self.log(f"{stage}/{name}", value, prog_bar=name == "miou", sync_dist=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("hyper_parameters") or {}
        check_same(saved, self.hparams, _SAME)
        check_same_classes(saved, self.hparams)


def _check_values(given: Mapping[str, Any]) -> None:
    names = list(given["class_names"])
    if len(names) < 2:
        raise UsageError(
            f"class_names is {names}: give two or more, one of them for the background, or data that names them"
        )
    if len(set(names)) != len(names):
        raise UsageError("class_names holds a name twice")
    if 0 <= given["ignore_index"] < len(names):
        raise UsageError(f"ignore_index={given['ignore_index']} is the number of a class; give another, such as 255")
    for key in ("palette", "class_weights"):
        if given[key] and not isinstance(given[key], str) and len(given[key]) != len(names):
            raise UsageError(f"{key} has {len(given[key])} entries for {len(names)} classes; give one a class")
    if isinstance(given["class_weights"], str) and given["class_weights"] not in WEIGHTS:
        raise unknown("kind of class weights", given["class_weights"], WEIGHTS)
    if given["loss"] not in LOSSES:
        raise unknown("loss", given["loss"], LOSSES)
    check_training_values(given)
    check_head_options(given["head_options"])
    if not 0 <= given["label_smoothing"] < 1:
        raise UsageError(f"label_smoothing={given['label_smoothing']}: it lies in [0, 1)")
