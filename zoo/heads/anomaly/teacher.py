"""The frozen network whose maps the methods look at: any of timm's, ours included."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from zoo.errors import UsageError
from zoo.features import (
    BUILD_ERRORS,
    as_map,
    build,
    check_backbone_name,
    check_loaded,
    checked_options,
    layout_of,
    short,
    wants_size,
    weight_arguments,
)


class Teacher(nn.Module):
    """Maps of chosen layers of a network: images (B, in_chans, H, W) -> list of (B, C, h, w).

    Args:
        backbone: a name of timm's.
        layers: of a plain transformer the numbers of its blocks, whose tokens pass its final norm and leave class and
            register tokens behind; of other networks the numbers of their levels, finest first. By default the block
            at two thirds and the last, or the levels of reduction 8 and 16.
        img_size: (height, width), for networks that want to know it.
        pretrained: True, or a weights file.
        options: further keyword arguments of the network.

    Raises:
        UsageError: there is no such network or layer, or the weights or options do not fit.
    """

    def __init__(
        self,
        backbone: str,
        layers: Sequence[int] | None = None,
        img_size: tuple[int, int] | None = None,
        in_chans: int = 3,
        pretrained: bool | str | Path = False,
        options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        check_backbone_name(backbone)
        self.name = backbone
        config = get_pretrained_cfg(backbone)
        arguments: dict[str, Any] = {**checked_options(options), "in_chans": in_chans}
        if img_size is not None and wants_size(backbone):
            arguments["img_size"] = img_size
        levels = build(backbone, features_only=True, **arguments)
        reductions = levels.feature_info.reduction()
        self.plain = len(reductions) > 1 and len(set(reductions)) == 1
        weights = weight_arguments(pretrained)
        if self.plain:
            network = build(backbone, num_classes=0, **arguments, **weights)
            count = len(network.feature_info)
            self.layers = _chosen(layers, count, (max(0, (2 * count + 2) // 3 - 1), count - 1))
            infos = [network.feature_info[layer] for layer in self.layers]
            self.channels = [info["num_chs"] for info in infos]
            self.reductions = [info["reduction"] for info in infos]
            network.prune_intermediate_layers(self.layers, prune_norm=False, prune_head=True)
        else:
            default = [index for index, reduction in enumerate(reductions) if reduction in (8, 16)]
            self.layers = _chosen(layers, len(reductions), default if len(default) == 2 else (0, 1))
            network = build(backbone, features_only=True, out_indices=tuple(self.layers), **arguments, **weights)
            self.channels = network.feature_info.channels()
            self.reductions = network.feature_info.reduction()
        if "pretrained_cfg_overlay" in weights:
            check_loaded(network, backbone, weights["pretrained_cfg_overlay"])
        self.network = network
        self.config: dict[str, Any] = dict(config.to_dict()) if config is not None else {}

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.plain:
            maps = self.network.forward_intermediates(
                images, indices=self.layers, norm=True, output_fmt="NCHW", intermediates_only=True
            )
        else:
            maps = self.network(images)
        return [
            as_map(map_, layout_of(map_, channels, self.network, self.name), reduction, images.shape[-2:])
            for map_, channels, reduction in zip(maps, self.channels, self.reductions, strict=True)
        ]


def _chosen(layers: Sequence[int] | None, count: int, default: Sequence[int]) -> list[int]:
    found = list(default if layers is None else layers)
    if not found or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in found):
        raise UsageError(f"layers={layers}: give the numbers of layers, for instance {list(default)}")
    if sorted(set(found)) != found or found[0] < 0 or found[-1] >= count:
        raise UsageError(f"layers={found}: give different numbers from 0 to {count - 1}, in ascending order")
    return found


def check_takes(teacher: Teacher, name: str, in_chans: int, size: tuple[int, int]) -> None:
    """Raises UsageError where the teacher cannot take images of a size; costs one image."""
    teacher.eval()
    try:
        with torch.no_grad():
            teacher(torch.zeros(1, in_chans, *size))
    except BUILD_ERRORS as error:
        raise UsageError(
            f"backbone {name!r} cannot take images of {size[0]} x {size[1]}: {short(error)}. Give another img_size."
        ) from error
