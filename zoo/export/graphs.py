"""What the exported graph of each task looks like: its network and outputs, its free sizes, how it is checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import UsageError, unknown
from zoo.export.anysize import AnySize

# The graph is traced with 2 images: 1 catches a squeezed batch, the others one that was frozen.
_BATCH_SIZES = {"classification": (1, 3, 8), "anomaly_detection": (1, 3), "segmentation": (1, 3)}


@dataclass(frozen=True)
class Graph:
    """The graph of one task.

    Attributes:
        outputs: their names.
        free: dimension of the images -> its name, of those that may have any size.
        shape: (C, H, W) of an image at the model's own size.
        floor: an output's error is a part of its largest value, or of this where that is smaller.
        unit: what an error is called a part of.
        pad: images keep their shape inside the model's size; see `AnySize`.
    """

    task: str
    outputs: tuple[str, ...]
    free: Mapping[int, str]
    shape: tuple[int, int, int]
    classes: int
    floor: float
    unit: str
    pad: bool = False

    def network(self, task: nn.Module) -> nn.Module:
        """The task as a network of one input."""
        return AnySize(task, self.shape[1:], self.pad) if self.task == "anomaly_detection" else _Inference(task)

    def example(self) -> Tensor:
        """Images to trace with; no free dimension has the size of another or of the model."""
        _, height, width = self.shape
        size = (height + 3, width + 7) if 2 in self.free else (height, width)
        return torch.zeros(2, self.shape[0], *size, dtype=torch.uint8)

    def cases(self, batch_sizes: Sequence[int] | None) -> list[tuple[int, ...]]:
        """Shapes (B, C, H, W) to check with: the model's own size, and a flatter, larger one where it may be any."""
        channels, height, width = self.shape
        sizes = [(height, width)]
        if 2 in self.free:
            sizes.append((height * 3 // 4 + 1, width * 3 // 2 + 3))
        batches = _BATCH_SIZES[self.task] if batch_sizes is None else batch_sizes
        return [(batch, channels, *size) for size in sizes for batch in batches]

    def shapes(self, case: Sequence[int]) -> list[tuple[int, ...]]:
        """What the outputs have to measure for images of a shape."""
        batch, _, height, width = case
        if self.task == "segmentation":
            return [(batch, self.classes, height, width)]
        return [(batch, self.classes)] if self.task == "classification" else [(batch,), (batch, 1, height, width)]


def graph_of(meta: Mapping[str, Any], data: Mapping[str, Any]) -> Graph:
    """The graph of the task whose `export_meta` is given, for images as the data with these hyperparameters fits them.

    Raises:
        UsageError: a task that cannot be exported.
    """
    shape = (int(meta["in_chans"]), int(meta["img_size"][0]), int(meta["img_size"][1]))
    if meta["task"] == "classification":
        return Graph("classification", ("logits",), {0: "batch"}, shape, len(meta["class_names"]), 1.0, "logit")
    if meta["task"] == "anomaly_detection":
        free = {0: "batch", 2: "height", 3: "width"}
        # Nothing is decided far below the threshold, so errors there need not be a small part of a vanishing map.
        floor = abs(threshold_of(meta))
        # Tiles are stretched to the model's size, whatever becomes of whole images.
        pad = data.get("resize") == "pad" and data.get("tile") is None
        return Graph("anomaly_detection", ("score", "map"), free, shape, 0, floor, "map value", pad)
    if meta["task"] == "segmentation":
        free = {0: "batch", 2: "height", 3: "width"} if meta["any_size"] else {0: "batch"}
        return Graph("segmentation", ("logits",), free, shape, len(meta["class_names"]), 1.0, "logit")
    raise unknown("task", meta["task"], _BATCH_SIZES)


def threshold_of(meta: Mapping[str, Any]) -> float:
    """The threshold of a trained anomaly detector.

    Raises:
        UsageError: there is none yet.
    """
    threshold = float("nan") if meta.get("threshold") is None else float(meta["threshold"])
    if not abs(threshold) < float("inf"):
        raise UsageError(
            "this detector has no threshold yet: it is set by validation, so train it to the end with `zoo fit`"
        )
    return threshold


class _Inference(nn.Module):
    def __init__(self, task: nn.Module):
        super().__init__()
        self.task = task.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.task.inference(images)
