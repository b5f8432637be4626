"""The curves of a run, where a person looks for them: metrics.csv in the run folder, and TensorBoard beside it."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment


class RunCSVLogger(CSVLogger):
    """Lightning's CSV logger, straight into the run folder; a resumed run keeps the rows of the steps before.

    Args:
        folder: the run folder.
        resumed_at: number of updates that the run resumes from; rows from there on will be written again.
    """

    def __init__(self, folder: Path, resumed_at: int | None = None):
        super().__init__(save_dir=folder.parent, name=folder.name, version="")
        self._resumed_at = resumed_at

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            # Lightning's writer deletes the file it finds.
            earlier = self._earlier()
            super().experiment.metrics.extend(earlier)
        return self._experiment

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml beside the curves says it all."""

    def _earlier(self) -> list[dict[str, str]]:
        path = Path(self.log_dir) / "metrics.csv"
        if self._resumed_at is None or not path.is_file():
            return []
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        return [row for row in rows if row.get("step", "").isdigit() and int(row["step"]) < self._resumed_at]


def run_loggers(folder: Path, resumed_at: int | None = None) -> list[Logger]:
    """The loggers of a run folder."""
    return [RunCSVLogger(folder, resumed_at), TensorBoardLogger(folder, name="tensorboard", version="")]
