"""Teaches the feature maps of Hedgehog attention to imitate softmax before the network itself learns on."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from zoo.errors import UsageError


class HedgehogDistillation(Callback):
    """Converts a trained network of softmax attention: its first epochs train the feature maps alone.

    The task's `pretrained` names the weights of the network with softmax, its `attn` is "hedgehog". In the first epochs
    all else is frozen, the network answers as with softmax, and the loss is how far the weights of the maps are from
    those of softmax, the mean over layers (logged as train/distillation). From then on the network is one of Hedgehog
    attention, and all of it learns by the task's own loss; no further epochs make it a conversion alone. Validation
    sees Hedgehog attention from the start.

    Source: Zhang et al., arXiv 2402.04347, section 4.2; there the maps learn at a rate of 1e-2 for about two epochs.

    Args:
        epochs: how many of the run's epochs train the maps.

    Raises:
        UsageError: `epochs` is less than 1, the network has no Hedgehog attention, the task compiles it, or there are
            several devices.
    """

    def __init__(self, epochs: int = 2):
        if epochs < 1:
            raise UsageError(f"HedgehogDistillation: epochs={epochs}; give at least 1, or leave the callback out")
        self.epochs = epochs
        self._layers: list[nn.Module] = []
        self._losses: list[Tensor] = []
        self._handles: list[Any] = []
        self._frozen: list[nn.Parameter] = []
        self._listens = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        # Attention, which this room does not import, says itself what it can.
        self._layers = [module for module in pl_module.modules() if callable(getattr(module, "distil", None))]
        if not self._layers:
            raise UsageError(
                "HedgehogDistillation: the network has no attention that imitates softmax; give attn: hedgehog, and as "
                "pretrained the weights of the same network with softmax"
            )
        for option in ("compile", "cuda_graph"):
            if getattr(pl_module, "hparams", {}).get(option):
                raise UsageError(f"HedgehogDistillation changes the network during the run: give {option}: false")

        if trainer.world_size > 1:
            raise UsageError("HedgehogDistillation freezes weights during the run, which takes one device: devices: 1")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._follow(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run resumed in the middle of an epoch does not come to its start.
        self._follow(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release(pl_module)

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Distils in the first epochs, and no longer."""
        if trainer.current_epoch >= self.epochs:
            self._release(pl_module)
        elif not self._handles:
            self._distil(pl_module)

    def _distil(self, pl_module: LightningModule) -> None:
        maps = {id(value) for layer in self._layers for value in layer.maps()}
        self._frozen = [p for p in pl_module.parameters() if p.requires_grad and id(p) not in maps]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
            parameter.grad = None
        self._handles = [layer.register_forward_hook(self._answer, with_kwargs=True) for layer in self._layers]
        # On the object, over the method of its class.
        pl_module.training_step = partial(self._training_step, pl_module)  # type: ignore[method-assign]

    def _release(self, pl_module: LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._handles, self._frozen, self._losses = [], [], []
        vars(pl_module).pop("training_step", None)

    def _answer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
        """What a layer answers instead, in a training step: softmax attention, whose distance to ours is kept."""
        if not self._listens:
            return None
        mask = kwargs.get("key_mask", args[2] if len(args) > 2 else None)
        answer, loss = layer.distil(args[0] if args else kwargs["x"], mask)
        self._losses.append(loss)
        return answer

    def _training_step(self, pl_module: LightningModule, batch: Any, batch_idx: int) -> Tensor:
        self._losses, self._listens = [], True
        # Without dropout, and with the statistics of norms as they are: the teacher stays what it was.
        pl_module.eval()
        try:
            # Logs the task's own loss, that of the network with softmax.
            type(pl_module).training_step(pl_module, batch, batch_idx)
        finally:
            pl_module.train()
            self._listens = False
        loss = torch.stack(self._losses).mean()
        pl_module.log("train/distillation", loss.detach(), prog_bar=True)
        return loss
