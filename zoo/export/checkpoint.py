"""Runs checkpoints of a run as the exported file would be run: same pixels, same results, with torch in between."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from zoo.export.check import outputs_of
from zoo.export.graphs import graph_of
from zoo.export.metadata import build_metadata
from zoo.export.predictor import Predictor


class CheckpointPredictor(Predictor):
    """A predictor over a checkpoint; runs on the GPU where there is one."""

    def _open(self, path: Path, providers: object = None) -> tuple[dict[str, str], Callable]:
        from zoo.tasks import load_task

        task, data = load_task(path)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        task.to(device)

        meta = task.export_meta()
        network = graph_of(meta, data).network(task)
        return build_metadata(meta, data), lambda batch: outputs_of(network, batch, device)


def open_model(path: str | os.PathLike) -> Predictor:
    """The predictor of an exported model (.onnx) or of a checkpoint (any other file).

    Raises:
        UsageError, PredictorError: there is no such file, or it is neither.
    """
    return Predictor(path) if Path(path).suffix == ".onnx" else CheckpointPredictor(path)
