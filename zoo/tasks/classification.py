"""Image classification: one backbone, trained, validated, tested and exported through one `inference`."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from zoo.errors import UsageError
from zoo.tasks.backbone import create_backbone, head_parameters, own_size
from zoo.tasks.base import Task, check_same, check_training_values, pair
from zoo.tasks.callbacks import RunReport
from zoo.tasks.plain import plain
from zoo.tasks.speed import TrainingGraph, compile_in_place

_SAME = {
    "backbone": "backbone",
    "backbone_options": "backbone options",
    "attn": "attention",
    "attn_options": "attention options",
    "in_chans": "number of channels",
}


class Classification(Task):
    """Trains a backbone to name one class per image.

    Batches are (images, targets): images float (B, C, H, W) in [0, 1] or uint8, not normalised; targets int64 (B,) or,
    from mixup and cutmix, float (B, classes). Logged, as fractions of 1: {val,test}/{loss,top1,top5,class_mean}.

    Args:
        backbone: any timm name, ours included.
        class_names: one per class, in the order of the targets. The command line takes them from the data.
        img_size: side, or (height, width), of the images; the backbone's own when absent.
        attn: attention by name, one for all stages or one per stage (None keeps the paper's own).
        attn_options: options of `attn`, of the same shape.
        backbone_options: further keyword arguments of the backbone (drop_path_rate, embed_dim, patch_size, ...).
        pretrained: True for timm's weights, or a weights file; see `create_backbone`.
        mean, std: per channel, in [0, 1]; the backbone's own when absent.
        optimizer, optimizer_options: name and further arguments of timm's create_optimizer_v2.
        layer_decay: factor of the learning rate from each layer to the one below it, by the backbone's own layers.
        scheduler, scheduler_options: name and further arguments of timm's create_scheduler_v2, stepped per update.
        warmup_epochs: linear warm-up; per cent of the time where only `max_time` bounds the run.
        freeze_epochs: epochs at the start in which only the head learns; the rest stays in eval mode.
        compile: torch.compile the backbone for training, block by block where it has blocks.
        cuda_graph: on a GPU, replay forward and backward as CUDA graphs; for networks that the host cannot feed.

    Raises:
        UsageError: a name, an option, the image size or the weights do not fit.
    """

    monitor = "val/top1"
    backbone: nn.Module

    def __init__(
        self,
        backbone: str = "zoo_vit_tiny_patch16_224",
        class_names: Sequence[str] = (),
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        attn: str | list[str | None] | None = None,
        attn_options: dict[str, Any] | list[dict[str, Any] | None] | None = None,
        backbone_options: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        optimizer_options: dict[str, Any] | None = None,
        scheduler: str = "cosine",
        warmup_epochs: float = 0.0,
        warmup_lr: float = 1e-6,
        min_lr: float = 0.0,
        scheduler_options: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
        freeze_epochs: int = 0,
        compile: bool = False,
        cuda_graph: bool = False,
    ):
        super().__init__()
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        _check_values(arguments)
        size = pair(img_size) if img_size is not None else own_size(backbone)
        self.backbone = create_backbone(
            backbone,
            num_classes=len(class_names),
            img_size=size,
            in_chans=in_chans,
            attn=attn,
            attn_options=attn_options,
            options=backbone_options,
            pretrained=pretrained,
        )
        config: Any = self.backbone.pretrained_cfg
        arguments |= self._keep_statistics(
            config["mean"] if mean is None else mean, config["std"] if std is None else std, in_chans
        )
        # The resolved values, so that a checkpoint needs neither the data nor a later version's defaults.
        arguments |= {"img_size": list(size), "class_names": list(class_names)}
        self.save_hyperparameters(plain(arguments), logger=False)
        metrics = _metrics(len(class_names))
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        self.val_per_class, self.test_per_class = (_per_class_accuracy(len(class_names)) for _ in range(2))
        self._graph: TrainingGraph | None = None
        self._frozen = False

    @property
    def trained(self) -> nn.Module:
        """The backbone, all of it."""
        return self.backbone

    def reports(self) -> list[Callback]:
        return [RunReport()]

    def headline(self, metrics: Mapping[str, float], stage: str, best: float | None = None) -> list[tuple[str, str]]:
        top1, top5 = metrics.get(f"{stage}/top1"), metrics.get(f"{stage}/top5")
        if top1 is None or top5 is None:
            return []
        where = {"val": "validation", "test": "test"}[stage]
        if best is not None:
            return [("accuracy", f"best {best:.2%}, last {top1:.2%} (top-1 on the {where} images)")]
        return [("accuracy", f"top-1 {top1:.2%}, top-5 {top5:.2%} on the {where} images")]

    def left(self, folder: Path, stage: str) -> list[tuple[str, str]]:
        if stage == "test":
            return [("pictures", f"{folder / 'pictures'}: test_confusion_matrix.png, test_worst_mistakes.png")]
        if (folder / "pictures" / "worst_mistakes.png").is_file():
            return [("pictures", f"{folder / 'pictures'}: confusion matrix, worst mistakes")]
        return []

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        return list(self.hparams["class_names"])

    def inference(self, images: Tensor) -> Tensor:
        """Logits, float32 (B, classes), of images (B, C, H, W): uint8, or float in [0, 1]."""
        return self.backbone(self._normalise(images)).float()

    def forward(self, images: Tensor) -> Tensor:
        """Same as `inference`."""
        return self.inference(images)

    def export_meta(self) -> dict[str, Any]:
        """What an exported file has to say about this task; plain types only."""
        names = ("backbone", "attn", "attn_options", "backbone_options", "class_names", "img_size", "in_chans")
        return {"task": "classification"} | {k: self.hparams[k] for k in (*names, "mean", "std")}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.trainer.strategy.root_device.type == "cuda":
            self.backbone.to(memory_format=torch.channels_last)
        if stage == "fit" and self.hparams["cuda_graph"]:
            self._check_graph()
        if stage == "fit" and self.hparams["compile"]:
            compile_in_place(self.backbone)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Frozen parameters belong to the groups from the start, so that the optimizer's state has one layout for the
        # whole run; while frozen they have no gradient and every optimizer passes over them.
        self._set_frozen(False)
        return self._make_optimizer(self.backbone, layer_decay=self.hparams["layer_decay"])

    def on_train_start(self) -> None:
        super().on_train_start()
        # A run resumed in the middle of an epoch has no on_train_epoch_start for it.
        self._set_frozen(self.current_epoch < self.hparams["freeze_epochs"])

    def on_train_epoch_start(self) -> None:
        self._set_frozen(self.current_epoch < self.hparams["freeze_epochs"])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        if self.hparams["cuda_graph"] and self._graph is None and images.is_cuda:
            self._graph = TrainingGraph(self.backbone, self._normalise(images))
        logits = self.inference(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.hparams["label_smoothing"])
        self._guard.check(loss, self.global_step)
        self._log_step(loss)
        return loss

    def on_train_end(self) -> None:
        super().on_train_end()
        if self._graph is not None:
            self._graph.release()
            self._graph = None

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "val", self.val_metrics, self.val_per_class)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "test", self.test_metrics, self.test_per_class)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self.inference(images).softmax(-1)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("hyper_parameters") or {}
        check_same_network(saved, self.hparams)

    def train(self, mode: bool = True) -> "Classification":
        super().train(mode)
        if mode and self._frozen:
            self._freeze_modes()
        return self

    def on_validation_epoch_start(self) -> None:
        self.val_per_class.reset()

    def on_test_epoch_start(self) -> None:
        self.test_per_class.reset()

    def _evaluate(
        self, batch: tuple[Tensor, Tensor], stage: str, metrics: MetricCollection, per_class: MulticlassAccuracy
    ) -> dict[str, Tensor]:
        images, targets = batch
        # Compiling a second time for evaluation costs more than a few batches of it can win back.
        compiled = self.hparams["compile"]
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            logits = self.inference(images)
        metrics.update(logits, targets)
        per_class.update(logits, targets)
        self.log(f"{stage}/loss", F.cross_entropy(logits, targets), batch_size=len(images), sync_dist=True)
        self.log_dict(metrics, prog_bar=stage == "val", batch_size=len(images))
        return {"logits": logits.detach(), "targets": targets}

    def _check_graph(self) -> None:
        reasons = {
            "model.freeze_epochs": self.hparams["freeze_epochs"] > 0,
            "trainer.accumulate_grad_batches": self.trainer.accumulate_grad_batches > 1,
            "trainer.devices": self.trainer.world_size > 1,
        }
        for option, excluded in reasons.items():
            if excluded:
                raise UsageError(f"cuda_graph does not go with --{option}; leave one of them out")

    def _set_frozen(self, frozen: bool) -> None:
        if frozen == self._frozen:
            return
        self._frozen = frozen
        head = head_parameters(self.backbone)
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(not frozen or id(parameter) in head)
            if not parameter.requires_grad:
                parameter.grad = None
        self.train(self.training)

    def _freeze_modes(self) -> None:
        # Eval mode keeps the running statistics of norms, and dropout has no business in a fixed feature.
        self.backbone.eval()
        classifier = self.backbone.get_classifier()
        for head in classifier if isinstance(classifier, (tuple, list)) else (classifier,):
            head.train()


def check_same_network(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises UsageError where a checkpoint's hyperparameters describe another network than the one at hand."""
    check_same(saved, given, _SAME)
    check_same_classes(saved, given)


def check_same_classes(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises UsageError where a checkpoint's classes are others than those at hand."""
    theirs, ours = list(saved.get("class_names", given["class_names"])), list(given["class_names"])
    if len(theirs) != len(ours):
        raise UsageError(f"the checkpoint knows {len(theirs)} classes, but the data has {len(ours)}")
    if theirs != ours:
        index = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
        raise UsageError(
            f"the checkpoint's class {index} is {theirs[index]!r}, but the data's is {ours[index]!r}: "
            "this is another data set"
        )


def _metrics(classes: int) -> MetricCollection:
    return MetricCollection(
        {
            "top1": MulticlassAccuracy(classes, average="micro"),
            "top5": MulticlassAccuracy(classes, average="micro", top_k=min(5, classes)),
            "class_mean": MulticlassAccuracy(classes, average="macro"),
        },
        # torchmetrics merges metrics whose states agree after the first batch: one batch without a mistake would make
        # top-5 a copy of top-1 for good.
        compute_groups=False,
    )


def _per_class_accuracy(classes: int) -> MulticlassAccuracy:
    return MulticlassAccuracy(classes, average="none")


def _check_values(given: Mapping[str, Any]) -> None:
    if not given["class_names"]:
        raise UsageError("class_names is empty: give the names of the classes, or data that names them")
    if len(set(given["class_names"])) != len(given["class_names"]):
        raise UsageError("class_names holds a name twice")
    check_training_values(given)
    if not 0 <= given["label_smoothing"] < 1:
        raise UsageError(f"label_smoothing={given['label_smoothing']}: it lies in [0, 1)")
    if given["layer_decay"] is not None and not 0 < given["layer_decay"] <= 1:
        raise UsageError(f"layer_decay={given['layer_decay']}: it lies in (0, 1]")
