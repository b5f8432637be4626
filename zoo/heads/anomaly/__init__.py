"""Methods of anomaly detection."""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from zoo.errors import UsageError, unknown
from zoo.heads.anomaly.base import AnomalyHead, AnomalyOutput, Detector
from zoo.heads.anomaly.l2bt import L2BT
from zoo.heads.anomaly.memory_bank import MemoryBank
from zoo.heads.anomaly.teacher import Teacher, check_takes

__all__ = ["L2BT", "METHODS", "AnomalyHead", "AnomalyOutput", "Detector", "MemoryBank", "Teacher", "create_detector"]

METHODS: dict[str, Callable[..., AnomalyHead]] = {"l2bt": L2BT, "memory_bank": MemoryBank}


def create_detector(
    method: str,
    backbone: str,
    *,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    layers: Sequence[int] | None = None,
    pretrained: bool | str | Path = False,
    backbone_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Detector:
    """A detector of anomalies over any backbone of timm's.

    Args:
        method: one of `zoo.heads.list_heads("anomaly")`.
        backbone, layers, in_chans, pretrained, backbone_options: see `Teacher`.
        img_size: side, or (height, width), of the images; the backbone's own when absent.
        options: of the method.

    Raises:
        UsageError: a name, an option, a layer, the size or the weights do not fit.
    """
    if method not in METHODS:
        raise unknown("method of anomaly detection", method, METHODS)
    valid = [name for name in signature(METHODS[method]).parameters if name != "channels"]
    for option in options:
        if option not in valid:
            raise unknown(f"option of {method}", option, valid)
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    if size is not None and min(size) < 1:
        raise UsageError(f"img_size={img_size}: give a positive side, or (height, width)")
    teacher = Teacher(backbone, layers, size, in_chans, pretrained, backbone_options)
    config = teacher.config
    size = size or tuple(config.get("input_size", (3, 224, 224))[1:])
    check_takes(teacher, backbone, in_chans, size)
    head = METHODS[method](teacher.channels, **options)
    mean, std = (_per_channel(config[key], in_chans) for key in ("mean", "std"))
    return Detector(teacher, head, mean, std, size)


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    values = [float(value) for value in values]
    return values if len(values) == channels else [sum(values) / len(values)] * channels
