"""checkpoints/last.ckpt: inside an epoch by the clock or by updates, and always where the run ends."""

import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Keeps one file that a killed run resumes from.

    Lightning's own checkpoint by time or by updates leaves out the end of a run that its clock stops, and its
    checkpoint by epochs leaves out everything inside one.

    Args:
        minutes: save when so much time has gone since the last save.
        every_n_train_steps: save after so many updates instead.
        dirpath: where; the run folder's `checkpoints` when absent.

    Raises:
        MisconfigurationException: both are given.
    """

    _last_time_checked: float | None

    def __init__(
        self, minutes: float | None = None, every_n_train_steps: int | None = None, dirpath: str | None = None
    ) -> None:
        if minutes is None and every_n_train_steps is None:
            minutes = 5.0
        super().__init__(
            dirpath=dirpath,
            filename=self.CHECKPOINT_NAME_LAST,
            train_time_interval=timedelta(minutes=minutes) if minutes is not None else None,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )
        self._due = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # At the last batch of an epoch its validation is still to come. Saved after that, the file resumes with the
        # next epoch and with nothing to be done twice.
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._due = True
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ends = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        ends = ends or 0 < trainer.max_steps <= trainer.global_step
        due, self._due = self._due and self._interval_over(trainer), False
        if (ends or due) and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the epoch's end follows at once."""

    def _interval_over(self, trainer: Trainer) -> bool:
        # Where the interval ended inside the last batch, or an update of it was a multiple.
        if self._train_time_interval is None:
            return self._every_n_train_steps > 0 and trainer.global_step % self._every_n_train_steps == 0
        over = time.monotonic() - (self._last_time_checked or 0.0) >= self._train_time_interval.total_seconds()
        over = trainer.strategy.broadcast(over)
        if over:
            self._last_time_checked = time.monotonic()
        return over
