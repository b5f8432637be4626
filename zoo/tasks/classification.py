"""Image classification: one backbone, trained, validated, tested and exported through one `inference`."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from zoo.errors import UsageError, unknown
from zoo.tasks.backbone import create_backbone, head_parameters, own_size
from zoo.tasks.finite import FiniteLossGuard
from zoo.tasks.plain import plain
from zoo.tasks.schedule import Schedule, check_scheduler_name
from zoo.tasks.seeds import seed_step
from zoo.tasks.speed import TrainingGraph, compile_in_place
from zoo.tasks.threads import share_cores


class Classification(LightningModule):
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

    backbone: nn.Module
    mean: Tensor
    std: Tensor

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
        size = _pair(img_size) if img_size is not None else own_size(backbone)
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
        means = _per_channel("mean", config["mean"] if mean is None else mean, in_chans)
        stds = _per_channel("std", config["std"] if std is None else std, in_chans)
        self.register_buffer("mean", torch.tensor(means).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(stds).view(-1, 1, 1), persistent=False)
        # The resolved values, so that a checkpoint needs neither the data nor a later version's defaults.
        arguments |= {"img_size": list(size), "mean": means, "std": stds, "class_names": list(class_names)}
        self.save_hyperparameters(plain(arguments), logger=False)
        metrics = _metrics(len(class_names))
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        self.val_per_class, self.test_per_class = (_per_class_accuracy(len(class_names)) for _ in range(2))
        self._guard = FiniteLossGuard()
        self._schedule: Schedule | None = None
        self._graph: TrainingGraph | None = None
        self._frozen = False

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        return list(self.hparams["class_names"])

    def inference(self, images: Tensor) -> Tensor:
        """Logits, float32 (B, classes), of images (B, C, H, W): uint8, or float in [0, 1]."""
        return self.backbone(self._normalise(images)).float()

    def _normalise(self, images: Tensor) -> Tensor:
        images = images.to(self.mean.dtype) / 255 if images.dtype == torch.uint8 else images
        if images.is_cuda:
            # cuDNN's depthwise convolutions take a quarter of the time in this layout.
            images = images.contiguous(memory_format=torch.channels_last)
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Same as `inference`."""
        return self.inference(images)

    def export_meta(self) -> dict[str, Any]:
        """What an exported file has to say about this task; plain types only."""
        names = ("backbone", "attn", "attn_options", "backbone_options", "class_names", "img_size", "in_chans")
        return {"task": "classification"} | {k: self.hparams[k] for k in (*names, "mean", "std")}

    def setup(self, stage: str) -> None:
        if self.trainer.strategy.root_device.type == "cpu":
            data = getattr(self.trainer, "datamodule", None)
            share_cores(int(getattr(data, "hparams", {}).get("num_workers") or 0))
        if self.trainer.strategy.root_device.type == "cuda":
            self.backbone.to(memory_format=torch.channels_last)
        if stage == "fit" and self.hparams["cuda_graph"]:
            self._check_graph()
        if stage == "fit" and self.hparams["compile"]:
            compile_in_place(self.backbone)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        hparams = self.hparams
        # Frozen parameters belong to the groups from the start, so that the optimizer's state has one layout for the
        # whole run; while frozen they have no gradient and every optimizer passes over them.
        self._set_frozen(False)
        try:
            return create_optimizer_v2(
                self.backbone,
                opt=hparams["optimizer"],
                lr=hparams["lr"],
                weight_decay=hparams["weight_decay"],
                layer_decay=hparams["layer_decay"],
                **(hparams["optimizer_options"] or {}),
            )
        except (TypeError, ValueError, RuntimeError) as error:
            options = hparams["optimizer_options"]
            raise UsageError(f"optimizer {hparams['optimizer']!r} cannot be made with {options}: {error}") from error

    def on_train_start(self) -> None:
        hparams = self.hparams
        options = {k: hparams[k] for k in ("warmup_epochs", "warmup_lr", "min_lr")} | (
            hparams["scheduler_options"] or {}
        )
        optimizer = self.trainer.optimizers[0]
        self._schedule = Schedule(optimizer, hparams["scheduler"], self.trainer, options)
        self._guard = FiniteLossGuard()
        # A run resumed in the middle of an epoch has no on_train_epoch_start for it.
        self._set_frozen(self.current_epoch < hparams["freeze_epochs"])

    def on_train_epoch_start(self) -> None:
        self._set_frozen(self.current_epoch < self.hparams["freeze_epochs"])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_step(self.current_epoch, batch_idx, self.global_rank)
        assert self._schedule is not None
        self._schedule.update(self.global_step)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        if self.hparams["cuda_graph"] and self._graph is None and images.is_cuda:
            self._graph = TrainingGraph(self.backbone, self._normalise(images))
        logits = self.inference(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.hparams["label_smoothing"])
        self._guard.check(loss, self.global_step)
        # `log` costs as much as a small kernel: call it only where the loggers will look.
        if (self.global_step + 1) % self._log_every() == 0:
            self.log("train/loss", loss.detach(), prog_bar=True)
            self.log("train/lr", max(group["lr"] for group in self.trainer.optimizers[0].param_groups))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # A run that ends between two validations, by its clock or by its last epoch, still ends with one.
        if 0 < self.trainer.max_steps <= self.global_step:
            # Lightning ends such a run without a validation, unless it is told to stop.
            self.trainer.should_stop = True
        ends = self.trainer.should_stop or self.current_epoch + 1 == self.trainer.max_epochs
        if ends and self.trainer.check_val_every_n_epoch is not None:
            self.trainer.check_val_every_n_epoch = 1

    def on_train_end(self) -> None:
        self._guard.assert_finite(self.backbone, self.global_step)
        self._schedule = None
        if self._graph is not None:
            self._graph.release()
            self._graph = None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        fused = any(group.get("fused") for group in optimizer.param_groups)
        if fused and gradient_clip_val and self.trainer.precision != "16-mixed":
            # Lightning refuses to clip for fused optimizers, which only a loss scaler makes wrong.
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if gradient_clip_algorithm == "value":
                torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
            else:
                torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "val", self.val_metrics, self.val_per_class)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "test", self.test_metrics, self.test_per_class)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self.inference(images).softmax(-1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.training or self.trainer.validating:
            self._guard.assert_finite(self.backbone, self.global_step)

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

    def _log_every(self) -> int:
        # An attribute that Lightning sets outside the Trainer's own code, unseen by type checkers.
        return getattr(self.trainer, "log_every_n_steps", 50)

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
    for key, what in (
        ("backbone", "backbone"),
        ("backbone_options", "backbone options"),
        ("attn", "attention"),
        ("attn_options", "attention options"),
        ("in_chans", "number of channels"),
    ):
        if key in saved and (saved[key] or None) != (given[key] or None):
            raise UsageError(f"the checkpoint's {what} is {saved[key]!r}, but the run asks for {given[key]!r}")
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
    optimizers = [str(name) for name in list_optimizers()]
    if given["optimizer"] not in optimizers:
        raise unknown("optimizer", given["optimizer"], optimizers)
    check_scheduler_name(given["scheduler"])
    if not 0 <= given["label_smoothing"] < 1:
        raise UsageError(f"label_smoothing={given['label_smoothing']}: it lies in [0, 1)")
    if given["layer_decay"] is not None and not 0 < given["layer_decay"] <= 1:
        raise UsageError(f"layer_decay={given['layer_decay']}: it lies in (0, 1]")
    for key in ("lr", "weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "freeze_epochs"):
        if given[key] < 0:
            raise UsageError(f"{key}={given[key]}: it cannot be negative")


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise UsageError(f"img_size={size}: give a positive side, or (height, width)")
    return int(height), int(width)


def _per_channel(what: str, values: Sequence[float], channels: int) -> list[float]:
    values = [float(v) for v in values]
    if len(values) == 3 and channels == 1:
        return [sum(values) / 3]
    if len(values) != channels:
        raise UsageError(f"{what} has {len(values)} values, but images have in_chans={channels}: give one per channel")
    return values
