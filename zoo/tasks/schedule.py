"""The learning rate as a function of how far the run is, by updates and by the clock."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from timm.scheduler import create_scheduler_v2
from torch.optim import Optimizer

from zoo.errors import UsageError, unknown

# timm's "plateau" needs a metric per epoch and has no place in a schedule that is a function of progress.
SCHEDULERS = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")
# Length, in epochs, of a schedule that only the clock ends: warmup_epochs then counts per cent of the time.
CLOCK_EPOCHS = 100
_CLOCK_UPDATES = 1000
_GRACE = 0.1


class Schedule:
    """timm's scheduler, driven by position instead of by counting calls.

    The position is the number of updates done or, under `Trainer(max_time=...)`, what the clock says, whichever is
    further. So a run that the clock cuts still anneals fully, and a resumed run needs no state of its own.

    Args:
        optimizer: whose learning rates are set, `lr_scale` of a group included.
        name: one of SCHEDULERS.
        trainer: after its loaders are known, that is from on_train_start on.
        options: warmup_epochs, warmup_lr, min_lr and whatever else timm's create_scheduler_v2 takes.

    Raises:
        UsageError: an option is unknown to timm or has a wrong value.
    """

    def __init__(self, optimizer: Optimizer, name: str, trainer: Trainer, options: Mapping[str, Any]):
        callbacks: list = getattr(trainer, "callbacks", [])
        timers = [c for c in callbacks if isinstance(c, Timer) and c.time_remaining() is not None]
        self._timer = timers[0] if timers else None
        updates = trainer.num_training_batches / trainer.accumulate_grad_batches
        updates = _CLOCK_UPDATES if math.isinf(updates) else max(1, math.ceil(updates))
        epochs: float | None = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        if trainer.max_steps > 0:
            epochs = min(epochs or math.inf, trainer.max_steps / updates)
        self._by_clock_only = epochs is None
        if epochs is None and self._timer is None and name not in ("constant", "none"):
            raise UsageError(
                f"scheduler {name!r} needs to know where the run ends: give --trainer.max_epochs, "
                "--trainer.max_steps or --trainer.max_time, or use scheduler 'constant'"
            )
        epochs = epochs or CLOCK_EPOCHS
        self.length = epochs * updates
        try:
            self._scheduler, _ = create_scheduler_v2(
                optimizer,
                sched=name,
                num_epochs=epochs,  # type: ignore[arg-type]  # max_steps may end inside an epoch; timm only multiplies
                step_on_epochs=False,
                updates_per_epoch=updates,
                **options,
            )
        except (TypeError, ValueError, AssertionError) as error:
            raise UsageError(f"scheduler {name!r} cannot be made with {dict(options)}: {error}") from error

    def update(self, updates_done: int) -> None:
        """Sets the learning rates for the next update."""
        if self._scheduler is not None:
            self._scheduler.step_update(self.position(updates_done))

    def position(self, updates_done: int) -> float:
        """Where the run is: 0 at its start, `length` at its end."""
        if self._timer is None:
            return float(updates_done)
        elapsed, remaining = self._timer.time_elapsed(), max(0.0, self._timer.time_remaining() or 0.0)
        share = elapsed / max(elapsed + remaining, 1e-9)
        if self._by_clock_only:
            return share * self.length
        # A run that has time enough is a function of its updates alone, also in its first steps, when the clock shows
        # a second and no update is done: so the clock has no say before a tenth of the time, and all at the end.
        return max(float(updates_done), self.length * (share - _GRACE) / (1 - _GRACE))


def check_scheduler_name(name: str) -> None:
    """Raises UsageError, with the closest names, for a schedule that does not exist here."""
    if name not in SCHEDULERS:
        raise unknown("scheduler", name, SCHEDULERS)
