"""Stops a run whose loss is no longer a number, before such weights can be saved."""

from collections import deque

import torch
from torch import Tensor, nn


class NonFiniteLossError(RuntimeError):
    """The loss or the weights became NaN or infinite; what is on disk is older than that."""


class FiniteLossGuard:
    """Finds the step whose loss is not finite.

    On the CPU every loss is looked at before the backward pass, so such a step never reaches the weights. On a GPU
    looking at once would make the host wait for the device at every step, which costs small networks much of their
    speed. There the verdict is copied to pinned memory and read a few steps later, when the copy is certainly done:
    the weights in memory may then be spoilt, but the run has stopped, and `assert_finite`, called before each
    checkpoint is written, waits for all verdicts and looks at the weights themselves.
    """

    def __init__(self, lag: int = 4):
        self._lag = lag
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event]] = deque()

    def check(self, loss: Tensor, step: int) -> None:
        """Takes the loss (scalar) of the update number `step`.

        Raises:
            NonFiniteLossError: this loss, or on a GPU one of the last few, is NaN or infinite.
        """
        finite = torch.isfinite(loss.detach())
        if not loss.is_cuda:
            _require(bool(finite), step)
            return
        verdict = torch.empty((), dtype=torch.bool, pin_memory=True)
        verdict.copy_(finite, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((step, verdict, event))
        self._read(self._lag)

    def assert_finite(self, module: nn.Module, step: int) -> None:
        """Waits for every verdict and looks at all weights of `module`.

        Raises:
            NonFiniteLossError: a pending loss or a weight is NaN or infinite.
        """
        self._read(0)
        totals = [p.detach().sum() for p in module.parameters() if p.is_floating_point()]
        # A sum overflows to inf long before float32 weights are useful, and carries every NaN: one wait for all.
        if totals and not bool(torch.isfinite(torch.stack([t.float() for t in totals])).all()):
            raise NonFiniteLossError(f"a weight became NaN or infinite before step {step}. {_ADVICE}")

    def _read(self, keep: int) -> None:
        while len(self._pending) > keep:
            step, verdict, event = self._pending.popleft()
            event.synchronize()
            _require(bool(verdict), step)


_ADVICE = (
    "Training stopped and this state was not saved. Try a lower learning rate, a longer warm-up, "
    "--trainer.gradient_clip_val 1, or --trainer.precision 32-true."
)


def _require(finite: bool, step: int) -> None:
    if not finite:
        raise NonFiniteLossError(f"the loss became NaN or infinite at step {step}. {_ADVICE}")
