"""Progress of a run: a live bar with images/s in a terminal, one plain line per epoch elsewhere."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import TaskID

from zoo.tasks.batches import images_in

# Redraws per second, and seconds between looks at the metrics: each look makes the host wait for the GPU.
_REDRAW = 4
_LOOK_SECONDS = 0.5
# Seconds between two lines about something long, where no bar can be drawn.
_SAY_SECONDS = 10.0


class ProgressBar(RichProgressBar):
    """Lightning's rich bar, with images/s, that does not slow small networks and stays readable in a log file."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=_REDRAW, leave=False)
        console = Console()
        self._live = console.is_terminal and not console.is_dumb_terminal
        self._images = 0
        self._since = self._looked = 0.0
        self._rate = 0.0
        self._said = 0.0
        self._extra: TaskID | None = None

    @property
    def is_enabled(self) -> bool:
        return super().is_enabled and self._live

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._restart_count()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._restart_count()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += images_in(batch) * trainer.world_size
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            self._looked, self._rate = now, self._images / max(now - self._since, 1e-9)
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Validation is no training time: take the rate before it begins.
        now = time.monotonic()
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._images:
            self._rate = self._images / max(now - self._since, 1e-9)
        super().on_validation_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._enabled and not self._live:
            metrics = self.get_metrics(trainer, pl_module)
            shown = [f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()]
            print("  ".join([self._get_train_description(trainer.current_epoch).strip(), *shown]), file=sys.stderr)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        items = super().get_metrics(trainer, pl_module)
        # One accuracy is enough to watch; the others are in metrics.csv.
        items = {k: v for k, v in items.items() if k != "v_num" and not k.endswith(("/top5", "/class_mean"))}
        if self._rate:
            items["images/s"] = f"{self._rate:,.0f}"
        return items

    def show(self, what: str, done: int, total: int) -> None:
        """Progress of something that is no epoch, such as the choice of a memory bank, between two batches."""
        if self.is_enabled and self.progress is not None:
            if self._extra is None:
                self._extra = self._add_task(total, what)
            self._update(self._extra, done, visible=done < total)
            if done >= total:
                self.progress.remove_task(self._extra)
                self._extra = None
        elif self._enabled and not self._live:
            now = time.monotonic()
            if done >= total or now - self._said >= _SAY_SECONDS:
                self._said = now
                print(f"{what} {done:,} of {total:,}", file=sys.stderr)

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs
        of = f"/{last}" if last is not None and last > 0 else ""
        return f"{f'Epoch {current_epoch + 1}{of}':{len(self.validation_description)}}"

    def _restart_count(self) -> None:
        self._images, self._since = 0, time.monotonic()
