"""Segmentation heads on the maps of any encoder."""

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.errors import UsageError, unknown
from zoo.features import FeaturePyramid
from zoo.heads.segmentation.base import SegmentationHead, Segmenter
from zoo.heads.segmentation.fpn import FPN
from zoo.heads.segmentation.loading import load, read_state
from zoo.heads.segmentation.macmd import MACMD
from zoo.heads.segmentation.segformer import SegFormer
from zoo.heads.segmentation.upernet import UPerNet

__all__ = ["FPN", "HEADS", "MACMD", "SegFormer", "SegmentationHead", "Segmenter", "UPerNet", "create_segmenter"]

HEADS: dict[str, type[SegmentationHead]] = {
    "fpn": FPN,
    "macmd": MACMD,
    "segformer": SegFormer,
    "upernet": UPerNet,
}


def create_segmenter(
    head: str,
    backbone: str,
    num_classes: int,
    *,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    pretrained: bool | str | Path | Mapping[str, Tensor] = False,
    backbone_options: Mapping[str, Any] | None = None,
    levels: Sequence[int] | None = None,
    strict: bool = False,
    weights: str | Path | None = None,
    **options: Any,
) -> Segmenter:
    """A segmentation network over any backbone of timm's.

    Args:
        head: one of `zoo.heads.list_heads("segmentation")`.
        backbone, img_size, in_chans, pretrained, backbone_options, strict: see `FeaturePyramid`.
        num_classes: channels of the logits.
        levels: reductions of the maps that the head sees, the head's own choice if None.
        weights: a file of the whole network: a `Segmenter`'s own state, or what the authors of the head's paper
            released, encoder included. The latter brings the head's options that it was trained with, unless given.
        options: of the head.

    Raises:
        UsageError: a name, an option, the size, a level or the weights do not fit.
    """
    if head not in HEADS:
        raise unknown("segmentation head", head, HEADS)
    made = HEADS[head]
    valid = [name for name in signature(made).parameters if name not in ("channels", "num_classes")]
    for option in options:
        if option not in valid:
            raise unknown(f"option of {head}", option, valid)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise UsageError(f"num_classes={num_classes}: give a positive number")
    state = None if weights is None else read_state(weights)
    foreign = None if state is None else made.read(state)
    if foreign is not None:
        options = {**foreign.options, **options}
        pretrained = foreign.encoder
    stem = made.stem(in_chans, **options)
    encoder = FeaturePyramid(
        backbone,
        made.levels if levels is None else levels,
        img_size,
        strict,
        in_chans=in_chans if stem is None else 3,
        pretrained=pretrained,
        backbone_options=backbone_options,
    )
    config = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), **encoder.config}
    mean, std = (_per_channel(config[key], in_chans) for key in ("mean", "std"))
    segmenter = Segmenter(encoder, made(encoder.channels, num_classes, **options), num_classes, mean, std, stem)
    if foreign is not None:
        load(segmenter, foreign.rest, ("encoder.", *foreign.absent, *(() if stem is not None else ("stem.",))), weights)
    elif state is not None:
        load(segmenter, state, (), weights)
    return segmenter


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    values = [float(value) for value in values]
    return values if len(values) == channels else [sum(values) / len(values)] * channels
