"""What all tasks share: normalisation, seeds, schedule, guards, and how a run ends."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn

from zoo.errors import UsageError, unknown
from zoo.tasks.finite import FiniteLossGuard
from zoo.tasks.schedule import Schedule, check_scheduler_name
from zoo.tasks.seeds import seed_step
from zoo.tasks.threads import share_cores


class Task(LightningModule):
    """A LightningModule with one `inference(images)`, which validation, test, predict and export all call.

    Images are float (B, C, H, W) in [0, 1] or uint8, not normalised. The hyperparameters that are read here: optimizer,
    lr, weight_decay, optimizer_options, scheduler, warmup_epochs, warmup_lr, min_lr, scheduler_options.
    """

    # The logged value that the best checkpoint is chosen by, and whether it is to be large ("max") or small ("min").
    monitor: str
    monitor_mode: str = "max"
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._guard = FiniteLossGuard()
        self._schedule: Schedule | None = None

    @property
    def trained(self) -> nn.Module:
        """The part that training changes: its weights are watched and saved only while they are finite."""
        raise NotImplementedError

    def reports(self) -> list[Callback]:
        """New callbacks that leave in the run folder what a person asks for after a run of this task."""
        return []

    def headline(self, metrics: Mapping[str, float], stage: str, best: float | None = None) -> list[tuple[str, str]]:
        """How good the network is, in words, as (name, value) lines.

        Args:
            metrics: what was logged last.
            stage: "val" or "test".
            best: the monitored value of the best checkpoint.
        """
        return []

    def left(self, folder: Path, stage: str) -> list[tuple[str, str]]:
        """What a person should look at in the run folder after "val" or "test", as (name, value) lines."""
        return []

    def _keep_statistics(self, mean: Sequence[float], std: Sequence[float], channels: int) -> dict[str, list[float]]:
        """Registers what images are normalised with; returns it as hyperparameters."""
        kept = {"mean": _per_channel("mean", mean, channels), "std": _per_channel("std", std, channels)}
        for name, values in kept.items():
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        return kept

    def _normalise(self, images: Tensor) -> Tensor:
        images = images.to(self.mean.dtype) / 255 if images.dtype == torch.uint8 else images
        if images.is_cuda:
            # cuDNN's depthwise convolutions take a quarter of the time in this layout.
            images = images.contiguous(memory_format=torch.channels_last)
        return (images - self.mean) / self.std

    def setup(self, stage: str) -> None:
        if self.trainer.strategy.root_device.type == "cpu":
            data = getattr(self.trainer, "datamodule", None)
            share_cores(int(getattr(data, "hparams", {}).get("num_workers") or 0))

    def _make_optimizer(self, module: nn.Module, **more: Any) -> torch.optim.Optimizer:
        hparams = self.hparams
        options = hparams["optimizer_options"]
        try:
            return create_optimizer_v2(
                module,
                opt=hparams["optimizer"],
                lr=hparams["lr"],
                weight_decay=hparams["weight_decay"],
                **more,
                **(options or {}),
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"optimizer {hparams['optimizer']!r} cannot be made with {options}: {error}") from error

    def on_train_start(self) -> None:
        self._guard = FiniteLossGuard()
        if self.automatic_optimization:
            hparams = self.hparams
            options = {k: hparams[k] for k in ("warmup_epochs", "warmup_lr", "min_lr")}
            options |= hparams["scheduler_options"] or {}
            self._schedule = Schedule(self.trainer.optimizers[0], hparams["scheduler"], self.trainer, options)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_step(self.current_epoch, batch_idx, self.global_rank)
        if self._schedule is not None:
            self._schedule.update(self.global_step)

    def _log_step(self, loss: Tensor) -> None:
        # `log` costs as much as a small kernel: call it only where the loggers will look.
        if (self.global_step + 1) % self._log_every() == 0:
            self.log("train/loss", loss.detach(), prog_bar=True)
            self.log("train/lr", max(group["lr"] for group in self.trainer.optimizers[0].param_groups))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # A run that ends between two validations, by its clock or by its last epoch, still ends with one.
        if 0 < self.trainer.max_steps <= self.global_step:
            # Lightning ends such a run without a validation, unless it is told to stop.
            self.trainer.should_stop = True
        ends = self.trainer.should_stop or self.current_epoch + 1 == self.trainer.max_epochs
        if ends and self.trainer.check_val_every_n_epoch is not None:
            self.trainer.check_val_every_n_epoch = 1

    def on_train_end(self) -> None:
        self._guard.assert_finite(self.trained, self.global_step)
        self._schedule = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.training or self.trainer.validating:
            self._guard.assert_finite(self.trained, self.global_step)

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

    def _log_every(self) -> int:
        # An attribute that Lightning sets outside the Trainer's own code, unseen by type checkers.
        return getattr(self.trainer, "log_every_n_steps", 50)


def check_training_values(given: Mapping[str, Any]) -> None:
    """Raises UsageError for an optimizer or schedule that does not exist, or a negative rate or length."""
    optimizers = [str(name) for name in list_optimizers()]
    if given["optimizer"] not in optimizers:
        raise unknown("optimizer", given["optimizer"], optimizers)
    check_scheduler_name(given["scheduler"])
    for key in ("lr", "weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "freeze_epochs"):
        if given.get(key, 0) < 0:
            raise UsageError(f"{key}={given[key]}: it cannot be negative")


def check_head_options(options: Mapping[str, Any] | None) -> None:
    """Raises UsageError where options of a head name what is an option of the task itself."""
    own = ("backbone", "num_classes", "img_size", "in_chans", "pretrained", "backbone_options", "layers")
    taken = [name for name in own if name in (options or {})]
    if taken:
        raise UsageError(f"head_options holds {', '.join(taken)}, which the task itself says; leave it out there")


def check_same(saved: Mapping[str, Any], given: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raises UsageError where a checkpoint's hyperparameters differ from those at hand in one of `names`.

    Args:
        names: hyperparameter -> what it is called in the error.
    """
    for key, what in names.items():
        if key in saved and (saved[key] or None) != (given[key] or None):
            raise UsageError(f"the checkpoint's {what} is {saved[key]!r}, but the run asks for {given[key]!r}")


def pair(size: int | Sequence[int], what: str = "img_size") -> tuple[int, int]:
    """(height, width) of the size `what`, which may be one side.

    Raises:
        UsageError: it is not positive.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise UsageError(f"{what}={size}: give a positive side, or (height, width)")
    return int(height), int(width)


def _per_channel(what: str, values: Sequence[float], channels: int) -> list[float]:
    values = [float(v) for v in values]
    if len(values) == 3 and channels == 1:
        return [sum(values) / 3]
    if len(values) != channels:
        raise UsageError(f"{what} has {len(values)} values, but images have in_chans={channels}: give one per channel")
    return values
