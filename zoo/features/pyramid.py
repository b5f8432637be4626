"""Maps of any of timm's networks at the levels that a head asks for, whatever ladder the network itself has."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from zoo.errors import UsageError
from zoo.features.networks import (
    BUILD_ERRORS,
    build,
    check_backbone_name,
    check_loaded,
    checked_options,
    checked_size,
    level_infos,
    own_size,
    short,
    size_arguments,
    weight_arguments,
    weightless,
)

# Sides of the images are tried in multiples of these where one does not fit.
_STEPS = (2, 4, 8, 14, 16, 32, 64)


class FeaturePyramid(nn.Module):
    """Images (B, in_chans, H, W) -> one map (B, C, h, w) a level, finest first.

    A level that the network has is its own map of that reduction. One that it lacks is made from the nearest by
    bilinear resizing to ceil(H / level) x ceil(W / level). A plain transformer has one grid: its levels are taken from
    blocks at even depths, the finest level from the earliest, and resized likewise.

    Args:
        backbone: a name of timm's, ours included.
        levels: reductions, ascending: a map of level 8 has an eighth of the images' height and width.
        img_size: side, or (height, width), of the images; told to networks that have to know it. Those that can are
            made to take other sizes too.
        strict: refuse levels that the network does not have instead of making them.
        in_chans: channels of the images.
        pretrained: True for timm's own weights, or a weights file, or its content.
        backbone_options: further keyword arguments of the network.

    Attributes:
        channels, reductions: C and level of every map.
        native: whether each map is the network's own, not resized.
        ladder: the network's own reductions.
        img_size: (height, width) the network was made for.
        config: what timm keeps about the network and its weights: mean, std, input_size and more.

    Raises:
        UsageError: there is no such network; or its options, weights, size or levels do not fit.
    """

    def __init__(
        self,
        backbone: str,
        levels: Sequence[int] = (4, 8, 16, 32),
        img_size: int | tuple[int, int] | None = None,
        strict: bool = False,
        *,
        in_chans: int = 3,
        pretrained: bool | str | Path | Mapping[str, Tensor] = False,
        backbone_options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        check_backbone_name(backbone)
        levels = _checked_levels(levels)
        size = checked_size(img_size)
        config = get_pretrained_cfg(backbone)
        self.name, self.in_chans = backbone, in_chans
        self.config: dict[str, Any] = dict(config.to_dict()) if config is not None else {}
        self.img_size = size or own_size(backbone)

        given = {**checked_options(backbone_options), "in_chans": in_chans}
        bare = weightless(backbone, given)
        infos = level_infos(bare, backbone)
        self.ladder = [int(info["reduction"]) for info in infos]
        self.plain = len(infos) > 1 and len(set(self.ladder)) == 1 and hasattr(bare, "forward_intermediates")
        # The last norm of Segment Anything's network is part of a neck, which leaves maps of other channels.
        self._norm = not hasattr(bare, "neck")
        missing = [level for level in levels if level not in self.ladder]
        if strict and missing:
            raise UsageError(
                f"backbone {backbone!r} has no maps of levels {missing}: it has {sorted(set(self.ladder))}. Ask for "
                "those, or leave strict out to have the others made by resizing"
            )
        picks = _even(len(infos), len(levels)) if self.plain else [_nearest(level, self.ladder) for level in levels]
        self._arguments = {**size_arguments(backbone, type(bare), size), **given}
        self._indices = sorted(set(picks))
        self._sources = [self._indices.index(pick) for pick in picks]
        self.reductions = list(levels)
        self.native = [self.ladder[pick] == level for pick, level in zip(picks, levels, strict=True)]
        self._source_chans = [int(infos[index]["num_chs"]) for index in self._indices]
        self._source_levels = [self.ladder[index] for index in self._indices]
        self.channels = [self._source_chans[source] for source in self._sources]
        self._layouts: list[str] = []  # not known before the network has been looked at
        try:
            self.network = self._made(self._arguments, pretrained)
        except UsageError as error:
            # Some refuse a size while they are made. Told nothing of it, they fail at something else.
            if "img_size" not in self._arguments or self._fits(self.img_size):
                raise
            raise self._wrong_size(error) from error
        self._layouts = self._looked_at()
        self._any_size: bool | None = None

    def forward(self, images: Tensor) -> list[Tensor]:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._maps(images)
        try:
            return self._maps(images)
        except torch.OutOfMemoryError:
            raise
        except BUILD_ERRORS as error:
            height, width = images.shape[-2:]
            # Another fault than the size's, unless the network answers at its own.
            if self.takes((height, width)) or not self.takes(self.img_size):
                raise
            raise UsageError(
                f"backbone {self.name!r} cannot take images of {height} x {width}: {self._taken((height, width))}"
            ) from error

    def takes(self, size: tuple[int, int]) -> bool:
        """Whether images of (height, width) can be given; costs one image."""
        parameter = next(self.network.parameters())
        image = torch.zeros(1, self.in_chans, *size, device=parameter.device, dtype=parameter.dtype)
        try:
            self._quietly(self.network, image)
        except BUILD_ERRORS:
            return False
        return True

    @property
    def any_size(self) -> bool:
        """Whether images of other sizes than `img_size` can be given, odd ones included; the first look costs two."""
        if self._any_size is None:
            height, width = self.img_size
            sizes = ((height + 5, width + 3), (height * 3 // 4 + 1, width * 3 // 2 + 3))
            self._any_size = all(self.takes(size) for size in sizes)
        return self._any_size

    def _made(self, arguments: Mapping[str, Any], pretrained: bool | str | Path | Mapping[str, Tensor]) -> Any:
        weights = weight_arguments(pretrained)
        if not self.plain:
            network = build(self.name, features_only=True, out_indices=tuple(self._indices), **arguments, **weights)
        else:
            network = build(self.name, num_classes=0, **arguments, **weights)
        if "pretrained_cfg_overlay" in weights:
            check_loaded(network, self.name, weights["pretrained_cfg_overlay"])
        if self.plain:
            network.prune_intermediate_layers(self._indices, prune_norm=not self._norm, prune_head=True)
        return network

    def _raw(self, network: Any, images: Tensor) -> list[Tensor]:
        """What a network answers, in its own layouts."""
        if self.plain:
            found = network.forward_intermediates(
                images, indices=self._indices, norm=self._norm, output_fmt="NCHW", intermediates_only=True
            )
        else:
            found = network(images)
        for map_, layout, channels in zip(found, self._layouts, self._source_chans, strict=False):
            # Some reshape tokens to the grid that the size should have had, and mix channels with places.
            if map_.shape[1 if layout == "NCHW" else -1] != channels:
                raise ValueError(f"a map of {tuple(map_.shape)} where {channels} channels are needed")
        return found

    def _quietly(self, network: Any, images: Tensor) -> list[Tensor]:
        """The same in evaluation mode, without gradients; the modes are as before afterwards."""
        modes = {module: module.training for module in network.modules()}
        try:
            network.eval()
            with torch.no_grad():
                return self._raw(network, images)
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _maps(self, images: Tensor) -> list[Tensor]:
        size, raw = images.shape[-2:], self._raw(self.network, images)
        found = [
            as_map(map_, layout, level, size)
            for map_, layout, level in zip(raw, self._layouts, self._source_levels, strict=True)
        ]
        return [
            found[source] if native else resize(found[source], (ceil(size[0], level), ceil(size[1], level)))
            for source, native, level in zip(self._sources, self.native, self.reductions, strict=True)
        ]

    def _looked_at(self) -> list[str]:
        """The layout of each map of the network, seen on one image of `img_size`."""
        image = torch.zeros(1, self.in_chans, *self.img_size)
        try:
            found = self._quietly(self.network, image)
        except BUILD_ERRORS as error:
            raise self._wrong_size(error) from error
        pairs = zip(found, self._source_chans, strict=True)
        return [layout_of(map_, channels, self.network, self.name) for map_, channels in pairs]

    def _fits(self, size: tuple[int, int]) -> bool:
        """Whether the network can be made for images of a size."""
        known = {"img_size": size} if "img_size" in self._arguments else {}
        try:
            network = self._made({**self._arguments, **known}, False)
            self._quietly(network, torch.zeros(1, self.in_chans, *size))
        except BUILD_ERRORS:
            return False
        return True

    def _wrong_size(self, error: Exception) -> UsageError:
        """The network cannot be made for `img_size`: says for which it can."""
        (height, width), own, side = self.img_size, own_size(self.name), max(self.img_size)
        advice = _multiples(self.img_size, self._fits)
        if not advice and height != width and self._fits((side, side)):
            advice = f"give squares, for instance {side} x {side}"
        if not advice:
            made_for = f". Give img_size={list(own)}, which it was made for" if own != self.img_size else ""
            advice = short(error.__cause__ if isinstance(error.__cause__, Exception) else error) + made_for
        return UsageError(f"backbone {self.name!r} cannot take images of {height} x {width}: {advice}")

    def _taken(self, size: tuple[int, int]) -> str:
        """Sizes near `size` that the network takes as it is, in words."""
        height, width = self.img_size
        alone = f"it was made for {height} x {width} alone. Give img_size={list(size)}, or windows of its own size"
        return _multiples(size, self.takes) or alone


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear: (B, C, h, w) -> (B, C, *size)."""
    return F.interpolate(maps, size=(size[0], size[1]), mode="bilinear", align_corners=False)


def ceil(length: int, step: int) -> int:
    """How many steps cover a length. An exported graph cuts towards zero, so no -(-length // step)."""
    return (length + step - 1) // step


def _checked_levels(levels: Sequence[int]) -> list[int]:
    found = list(levels) if isinstance(levels, Sequence) else []
    whole = all(isinstance(level, int) and not isinstance(level, bool) and level >= 1 for level in found)
    if not found or not whole or sorted(set(found)) != found:
        raise UsageError(f"levels={levels}: give reductions of the image in ascending order, for instance [4, 8, 16]")
    return found


def _nearest(level: int, ladder: Sequence[int]) -> int:
    """Index of the reduction nearest to a level by ratio; the finer of two, and the last of equal ones."""
    return min(range(len(ladder)), key=lambda index: (abs(math.log(ladder[index] / level)), ladder[index], -index))


def _even(blocks: int, count: int) -> list[int]:
    """Numbers of `count` blocks at even depths, the last among them."""
    return [max(0, round((place + 1) * blocks / count) - 1) for place in range(count)]


def layout_of(map_: Tensor, channels: int, network: Any, name: str) -> str:
    """Which layout a map of `channels` has: "NCHW", "NHWC" or "NLC", tokens of a grid."""
    if map_.ndim == 3 and map_.shape[2] == channels:
        return "NLC"
    first, last = map_.ndim == 4 and map_.shape[1] == channels, map_.ndim == 4 and map_.shape[3] == channels
    if first and last:
        # Its sides are as long as it has channels: only the network can tell.
        return "NHWC" if str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC") else "NCHW"
    if not first and not last:
        raise UsageError(
            f"backbone {name!r} answers {tuple(map_.shape)} where a map of {channels} channels is needed. "
            "Choose another one"
        )
    return "NCHW" if first else "NHWC"


def as_map(map_: Tensor, layout: str, level: int, size: Sequence[int]) -> Tensor:
    """A map of any layout, of images of `size`, as (B, C, h, w); tokens before those of the grid are left out."""
    if layout == "NHWC":
        return map_.permute(0, 3, 1, 2)
    if layout == "NLC":
        height, width = ceil(size[0], level), ceil(size[1], level)
        return map_[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))
    return map_


def _multiples(size: tuple[int, int], fits: Callable[[tuple[int, int]], bool]) -> str:
    """A sentence that names the smallest step whose multiples around a size fit; "" if there is none."""
    for step in _STEPS:
        near = ceil(size[0], step) * step, ceil(size[1], step) * step
        if near != size and fits(near) and fits((near[0] + step, near[1] + 3 * step)):
            return f"give multiples of {step}, for instance {near[0]} x {near[1]}"
    return ""
