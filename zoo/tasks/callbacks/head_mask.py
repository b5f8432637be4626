"""Masks attention heads in training, so that no few of them carry the network."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from zoo.errors import UsageError, unknown


class Gate:
    """A hook before a layer: multiplies each head's part of its input, channels side by side, by its gate.

    Maps (B, C, H, W) where the mechanism lives in maps, else (..., C). It acts in training alone.
    """

    def __init__(self, heads: int, axis: int):
        self.heads, self.axis = heads, axis
        self.value: Tensor | None = None

    def __call__(self, layer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.value is None or not layer.training:
            return None
        out = arguments[0]
        gate = self.value.repeat_interleave(out.shape[self.axis] // self.heads).to(out.dtype)
        if self.axis == 1:
            gate = gate[:, None, None]
        return (out * gate, *arguments[1:])


class HeadMask(Callback):
    """Sets the answers of some heads to zero, before their projection, in every training step.

    Source: Sun et al., "Alleviating the Inequality of Attention Heads for Neural Machine Translation", arXiv
    2009.09672, sections 2.1 and 2.2: 18 heads of a Transformer, at random or the most important ones, so that the
    others learn. It works with every mechanism of the registry that has heads, and in every network. All processes
    mask the same heads. A layer may lose all of its heads; then the bias of its projection is left.

    Args:
        rate: part of all heads of the network, together, that is masked; the paper's 18 are an eighth of 144 (its count
            of heads is ours).
        by: "random", or "importance": |dL/d gate| of each head, of the step before, instead of an extra backward
            of this one.
        rescale: multiply the others by 1 / (1 - rate), as dropout does; the paper does not.

    Raises:
        UsageError: an argument is out of range, or the network has no heads that could be masked.
    """

    def __init__(self, rate: float = 0.125, by: str = "random", rescale: bool = False):
        if not 0 <= rate <= 1 or (rescale and rate == 1):
            raise UsageError(f"HeadMask: rate={rate}; it lies between 0 and 1, and below 1 with rescale")
        if by not in ("random", "importance"):
            raise unknown("HeadMask: by", by, ("random", "importance"))
        self.rate, self.by, self.rescale = rate, by, rescale
        self.importance: Tensor | None = None
        self._gates: list[Gate] = []
        self._handles: list[Any] = []
        self._open = torch.ones(0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self.by == "importance" and getattr(pl_module, "hparams", {}).get("cuda_graph"):
            raise UsageError("HeadMask by importance needs gradients that a CUDA graph hides: give cuda_graph: false")
        self.attach(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open = torch.ones(sum(gate.heads for gate in self._gates), device=pl_module.device)
        if self.by == "importance":
            self._open.requires_grad_()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.close(trainer.global_step)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._open.grad is not None:
            self.importance = trainer.strategy.reduce(self._open.grad.abs(), reduce_op="mean").cpu()
            self._open.grad = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"importance": self.importance}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.importance = state_dict["importance"]

    def attach(self, network: nn.Module) -> None:
        """Puts a gate before every layer that heads answer to."""
        for module in network.modules():
            # Attention, which this room does not import.
            find = getattr(module, "head_layers", None)
            for layer, heads in find() if callable(find) else ():
                gate = Gate(heads, axis=1 if module.layout == "map" else -1)
                self._gates.append(gate)
                self._handles.append(layer.register_forward_pre_hook(gate))
        if not self._gates:
            raise UsageError(
                "HeadMask: the network has no attention with heads of this package's registry. Networks that have: "
                "zoo list backbones; mechanisms: zoo list attentions"
            )

    def close(self, step: int) -> None:
        """Opens all gates but those of the heads that step number `step` goes without."""
        total = len(self._open)
        count = round(self.rate * total)
        gates = torch.full((total,), 1 / (1 - count / total) if self.rescale and count < total else 1.0)
        # The step's own generator: the same heads on every process, whatever else they drew.
        random = torch.randperm(total, generator=torch.Generator().manual_seed(step))
        if self.by == "importance" and self.importance is not None:
            random = self.importance.argsort(descending=True)
        elif self.by == "importance":
            count = 0
        gates[random[:count]] = 0.0
        with torch.no_grad():
            self._open.copy_(gates)
        # Views of the same memory every time, which a CUDA graph needs; new ones, which a new backward needs.
        parts = self._open.split([gate.heads for gate in self._gates]) if self._gates else ()
        for gate, part in zip(self._gates, parts, strict=True):
            gate.value = part

    def detach(self) -> None:
        """Takes the gates away."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._gates = [], []
