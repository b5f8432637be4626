"""Anomaly detection: learns from good images alone what is normal, and where an image is not."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from zoo.data.tiling import check_tiles, inspect_by_tiles
from zoo.errors import UsageError
from zoo.heads import create_detector
from zoo.heads.anomaly import AnomalyOutput
from zoo.tasks.anomaly_metrics import Measures
from zoo.tasks.backbone import own_size
from zoo.tasks.base import Task, check_head_options, check_same, check_training_values, pair
from zoo.tasks.batches import images_of
from zoo.tasks.callbacks import ProgressBar, RunRecord
from zoo.tasks.callbacks.anomaly_report import AnomalyReport
from zoo.tasks.plain import plain

_SAME = {
    "method": "method",
    "backbone": "backbone",
    "layers": "layers",
    "backbone_options": "backbone options",
    "head_options": "head options",
    "in_chans": "number of channels",
}


class AnomalyDetection(Task):
    """Trains a detector of anomalies on good images.

    Batches are dicts: "image" (B, C, H, W) in [0, 1] or uint8, not normalised; in validation and test also "mask" bool
    (B, 1, H, W), "label" int64 (B,) (0 good, 1 defect), where some masks are unknown "has_mask" bool (B,), and where
    images are padded "inner_size" int64 (B, 2), outside of which no pixel is measured or reported. A batch with "tile"
    and "tile_overlap" is one whole image of any size, looked at by tiles of so many of its pixels.

    Methods that learn by gradient train only their head, the teacher stays frozen. A memory bank is filled in one epoch
    and made when that ends. The threshold is taken from the validation images, held-out good ones and synthetic
    defects, whenever they are looked at, and is saved with the weights; no test image has a say in it or in which
    checkpoint is the best. Logged: {val,test}/{image_auroc,image_aupr,pixel_auroc,pixel_aupr,aupro_0.3,f1,...}, each
    only where the images allow it, and val/selection, which the best checkpoint is chosen by.

    Args:
        method: of `zoo.heads.list_heads("anomaly")`.
        backbone: the teacher, any timm name, ours included.
        layers: of the teacher, as the method takes them; its own choice when absent.
        img_size: side, or (height, width), of the images; the backbone's own when absent.
        head_options: further keyword arguments of the method.
        backbone_options: further keyword arguments of the backbone.
        pretrained: True for timm's weights of the teacher, or a weights file.
        mean, std: per channel, in [0, 1]; the backbone's own when absent.
        optimizer, optimizer_options, scheduler, scheduler_options, warmup_epochs: as in `Classification`; only of
            methods that learn by gradient.
        false_alarms: share of good images above the threshold where validation has no defects to choose it by.

    Raises:
        UsageError: a name, an option, the image size or the weights do not fit.
    """

    monitor = "val/selection"
    threshold: Tensor
    pixel_threshold: Tensor

    def __init__(
        self,
        method: str = "l2bt",
        backbone: str = "tf_efficientnet_lite0",
        layers: list[int] | None = None,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        head_options: dict[str, Any] | None = None,
        backbone_options: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        optimizer: str = "adam",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        optimizer_options: dict[str, Any] | None = None,
        scheduler: str = "cosine",
        warmup_epochs: float = 0.0,
        warmup_lr: float = 1e-6,
        min_lr: float = 0.0,
        scheduler_options: dict[str, Any] | None = None,
        false_alarms: float = 0.01,
    ):
        super().__init__()
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        check_training_values(arguments)
        check_head_options(head_options)
        if not 0 <= false_alarms < 1:
            raise UsageError(f"false_alarms={false_alarms}: a share of the good images lies in [0, 1)")
        size = pair(img_size) if img_size is not None else own_size(backbone)
        self.detector = create_detector(
            method,
            backbone,
            img_size=size,
            in_chans=in_chans,
            layers=layers,
            pretrained=pretrained,
            backbone_options=backbone_options,
            **(head_options or {}),
        )
        self.automatic_optimization = bool(self.detector.head.needs_gradient)
        arguments |= self._keep_statistics(
            self.detector.mean if mean is None else mean, self.detector.std if std is None else std, in_chans
        )
        # The resolved size, so that a checkpoint needs neither the data nor a later version's defaults.
        self.save_hyperparameters(plain(arguments | {"img_size": list(size)}), logger=False)
        for name in ("threshold", "pixel_threshold"):
            self.register_buffer(name, torch.tensor(float("nan")))
        self.measures = nn.ModuleDict({stage: Measures() for stage in ("val", "test")})

    @property
    def trained(self) -> nn.Module:
        """The head: the teacher never changes."""
        return self.detector.head

    def inference(self, images: Tensor) -> AnomalyOutput:
        """Score (B,) and map (B, 1, H, W), float32, of images (B, C, H, W): uint8, or float in [0, 1].

        Raises:
            UsageError: nothing was learned yet.
        """
        return self.detector(self._normalise(images))

    def forward(self, images: Tensor) -> AnomalyOutput:
        """Same as `inference`."""
        return self.inference(images)

    def export_meta(self) -> dict[str, Any]:
        """What an exported file has to say about this task; plain types only.

        Raises:
            UsageError: there is no threshold yet.
        """
        if not bool(torch.isfinite(self.threshold)):
            raise UsageError("this detector has no threshold: it was never validated. Train it with validation images")
        names = ("method", "backbone", "backbone_options", "layers", "img_size", "in_chans", "mean", "std")
        meta = {"task": "anomaly_detection"} | {k: self.hparams[k] for k in names}
        return meta | {"threshold": float(self.threshold), "pixel_threshold": float(self.pixel_threshold)}

    def reports(self) -> list[Callback]:
        return [RunRecord(), AnomalyReport()]

    def headline(self, metrics: Mapping[str, float], stage: str, best: float | None = None) -> list[tuple[str, str]]:
        shown = {
            "images": [("image_auroc", "AUROC"), ("image_aupr", "AUPR"), ("f1", "F1 at the threshold")],
            "pixels": [("pixel_auroc", "AUROC"), ("pixel_aupr", "AUPR"), ("aupro_0.3", "AU-PRO to 30 %")],
        }
        where = {"val": "held-out good images and synthetic defects", "test": "test images"}[stage]
        lines = []
        for name, parts in shown.items():
            text = [f"{label} {metrics[f'{stage}/{key}']:.2%}" for key, label in parts if f"{stage}/{key}" in metrics]
            if text:
                lines.append((name, f"{', '.join(text)} ({where})"))
        last = metrics.get(self.monitor)
        if best is not None and last is not None and best - last > 5e-5:
            lines.append(
                ("best", f"an earlier epoch: {self.monitor} {best:.4f}, in the last {last:.4f}; best.ckpt holds it")
            )
        elif bool(torch.isfinite(self.threshold)):
            lines.append(("threshold", f"{float(self.threshold):.6g}, taken from validation images alone"))
        return lines

    def left(self, folder: Path, stage: str) -> list[tuple[str, str]]:
        report = folder / "report.html"
        return [("report", f"{report}; pictures in {folder / 'pictures'}")] if report.is_file() else []

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.trainer.strategy.root_device.type == "cuda":
            self.detector.to(memory_format=torch.channels_last)
        if stage == "fit":
            self._check_trainer()
            if not self.hparams["pretrained"]:
                rank_zero_warn(
                    f"{self.hparams['backbone']} has random weights, which is good for trying things out. "
                    "For real images: --model.pretrained true, or a file of weights"
                )

    def _check_trainer(self) -> None:
        trainer, method = self.trainer, self.hparams["method"]
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):
            raise UsageError("averaged weights would also average the threshold; leave that callback out")
        if self.automatic_optimization:
            return
        if trainer.max_epochs != 1:
            raise UsageError(f"{method} sees every image once; give --trainer.max_epochs 1, not {trainer.max_epochs}")
        # Lightning keeps none where a time was given. 1 is a number of batches, 1.0 the whole epoch.
        interval = getattr(trainer, "val_check_interval", None)
        if isinstance(interval, int) or interval != 1.0:
            raise UsageError(
                f"{method} can be validated only when it has seen every image; give --trainer.val_check_interval 1.0, "
                f"not {'a time' if interval is None else interval}"
            )
        if trainer.world_size > 1:
            raise UsageError(f"{method} fills on one device; give --trainer.devices 1")
        if trainer.precision == "16-mixed":
            raise UsageError(f"{method} has no loss to scale; give --trainer.precision bf16-mixed or 32-true")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.automatic_optimization:
            return self._make_optimizer(self.detector.head)
        # Lightning knows how far a run is, and whether there is anything new to save, by the steps of an optimizer.
        return torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.0)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor | None:
        images = self._normalise(images_of(batch))
        if not self.automatic_optimization:
            self.detector.update(images)
            self.optimizers().step()
            return None
        loss = self.detector.loss(images)
        self._guard.check(loss, self.global_step)
        self._log_step(loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        # Before the validation that follows the last batch, which needs the bank.
        if not self.automatic_optimization and (self.trainer.is_last_batch or self.trainer.should_stop):
            self.detector.finalize(self._show)

    def _show(self, done: int, total: int) -> None:
        bar = self.trainer.progress_bar_callback
        if isinstance(bar, ProgressBar):
            bar.show("Memory bank: places chosen", done, total)

    def on_validation_start(self) -> None:
        if self.automatic_optimization and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.detector.finalize()

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any] | None:
        if self.trainer.sanity_checking:
            # Nothing was learned yet.
            return None
        return self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        return self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> AnomalyOutput:
        return self._inspect(batch)

    def _inspect(self, batch: Any) -> AnomalyOutput:
        images = images_of(batch)
        if not isinstance(batch, Mapping) or "tile" not in batch:
            return self.inference(images)
        size = pair(self.hparams["img_size"])
        return AnomalyOutput(*inspect_by_tiles(self.inference, images, batch["tile"], batch["tile_overlap"], size))

    def _evaluate(self, batch: Mapping[str, Any], stage: str) -> dict[str, Any]:
        output = self._inspect(batch)
        self.measures[stage].update(output.score, output.map, batch)
        keys = ("image", "mask", "has_mask", "inner_size", "label", "kind", "path")
        return {"score": output.score, "map": output.map} | {k: batch[k] for k in keys if k in batch}

    def on_validation_epoch_start(self) -> None:
        self.measures["val"].reset()

    def on_test_epoch_start(self) -> None:
        self.measures["test"].reset()

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        measures = self.measures["val"]
        threshold, pixel_threshold = measures.thresholds(self.hparams["false_alarms"])
        self.threshold.fill_(threshold)
        self.pixel_threshold.fill_(pixel_threshold)
        values = measures.compute(threshold)
        # Without synthetic defects all that is known is how little the good images stand out.
        selection = values.get("pixel_aupr", values.get("image_aupr", -values["good_score"]))
        values |= {"threshold": threshold, "selection": selection}
        self._log_all(values, "val", ("image_auroc", "pixel_aupr"))

    def on_test_epoch_end(self) -> None:
        # What validation left: the test images have no say in it.
        self._log_all(self.measures["test"].compute(float(self.threshold)), "test", ())

    def _log_all(self, values: Mapping[str, float], stage: str, shown: Sequence[str]) -> None:
        for name, value in values.items():
            # Each process has computed it from the images of all.
            self.log(f"{stage}/{name}", value, prog_bar=name in shown, sync_dist=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_same(checkpoint.get("hyper_parameters") or {}, self.hparams, _SAME)
        trainer = self._trainer
        if trainer is not None and trainer.state.fn == "test":
            data = getattr(getattr(trainer, "datamodule", None), "hparams", {})
            _check_look(checkpoint, self.hparams["img_size"], data)


def _check_look(checkpoint: Mapping[str, Any], img_size: Any, data: Mapping[str, Any]) -> None:
    """Raises UsageError where a test would see its images otherwise than the run did that took the threshold."""
    saved = checkpoint.get("datamodule_hyper_parameters") or {}
    if not saved or not data:
        # Loaders of one's own do not say how they look at images.
        saved = data = {}
    before = _look((checkpoint.get("hyper_parameters") or {}).get("img_size") or img_size, saved)
    asked = _look(img_size, data)
    if before != asked:
        raise UsageError(
            f"the run was trained with {before}, and its threshold is one of scores seen so; a test with {asked} "
            "cannot be judged by it. Test without that option, or train another run with it (zoo fit)"
        )


def _look(img_size: Any, data: Mapping[str, Any]) -> str:
    """In words what decides how large things are in what a detector sees; options without effect are left out."""
    size = f"img_size {list(pair(img_size))}"
    if data.get("tile") is None:
        return f"{size}, resize {data.get('resize', 'stretch')}"
    side, overlap = check_tiles(data["tile"], data.get("tile_overlap"))
    return f"{size}, tile {side}, tile_overlap {overlap}"
