"""timm's interface for networks that are a stem, stages over maps and a classifier over the pooled map."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from timm.layers import SelectAdaptivePool2d, to_2tuple, trunc_normal_
from timm.models import checkpoint, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.attention import Attention, create_attention
from zoo.errors import UsageError, unknown
from zoo.layers.conv_norm import fuse_children


class MapStage(nn.Module):
    """What makes the map smaller, and blocks: maps (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing and not torch.jit.is_scripting() else block(x)
        return x


@register_notrace_module  # it looks at the layout of the map
class AveragePool(nn.Module):
    """Mean over the map, (B, C, H, W) -> (B, C, 1, 1), whose gradient lies in memory as the map does.

    That of torch's pooling is an ordinary map, which every layer on the way back then turns.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_contiguous(memory_format=torch.channels_last):
            return x.permute(0, 2, 3, 1).mean((1, 2))[:, :, None, None]
        return x.mean((2, 3), keepdim=True)


def linear_classifier(dim: int, num_classes: int) -> nn.Linear:
    """A linear layer whose weights start at a truncated normal of std 0.02, its biases at 0."""
    layer = nn.Linear(dim, num_classes)
    trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


class StagedNetwork(nn.Module):
    """Base of the networks; they fill `patch_embed`, `stages`, `norm` and `feature_info`, then call `make_head`.

    Images (B, in_chans, H, W) of any size; stage i answers (B, num_chs, ceil(H / reduction), ceil(W / reduction)) with
    what `feature_info[i]` says.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed: nn.Module = nn.Identity()
        self.stages = nn.ModuleList()
        self.norm: nn.Module = nn.Identity()
        self.feature_info: list[dict[str, Any]] = []

    def make_head(self, num_features: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        """Sets the pooling and the classifier, and every attribute that timm reads of them."""
        self.num_features = self.head_hidden_size = num_features
        self.head_drop = nn.Dropout(drop_rate)
        self._set_head(num_classes, global_pool)

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        if global_pool not in ("", "avg", "max", "avgmax"):
            raise unknown("global_pool", global_pool, ("avg", "max", "avgmax", ""))
        check_num_classes(num_classes)
        if num_classes and not global_pool:
            raise UsageError("a classifier needs a pooled map: give global_pool='avg', or num_classes=0")
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        if global_pool == "avg":
            self.global_pool.pool = AveragePool()
        self.head = self.classifier(num_classes)

    def classifier(self, num_classes: int) -> nn.Module:
        """A new classifier of pooled features; nothing for no classes."""
        return linear_classifier(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        stages: Any = self.stages
        for stage in stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Exchanges the classifier, and the pooling before it if one is named."""
        like = next(self.patch_embed.parameters())
        self._set_head(num_classes, self.global_pool.pool_type if global_pool is None else global_pool)
        heads = self.get_classifier()
        for head in heads if isinstance(heads, tuple) else (heads,):
            head.to(device=like.device, dtype=like.dtype).train(self.training)

    @torch.jit.ignore
    def fuse(self) -> Self:
        """Folds norms and residual convolutions into the layers beside them, where the network has such.

        In place, for inference: the network answers the same to rounding, is in evaluation mode, and its state no
        longer fits the files of the network before. Returns the network.
        """
        self.eval()
        fuse_children(self)
        return self

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> map (B, num_features, h, w)."""
        x = self.patch_embed(x)
        for stage in self.stages:
            x = stage(x)
        return self.close(x)

    def close(self, x: Tensor) -> Tensor:
        """The last stage's map x (B, C, H, W) after the final norm."""
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (B, num_features, h, w) -> logits (B, num_classes), or features (B, num_features) if `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def stage_maps(self, x: Tensor, count: int) -> list[Tensor]:
        """What each of the first `count` stages answers to images x."""
        x, maps = self.patch_embed(x), []
        for stage in list(self.stages)[:count]:
            x = stage(x)
            maps.append(x)
        return maps

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """What stages answer, as timm's networks give it.

        Args:
            x: images (B, in_chans, H, W).
            indices: stages to take: the last n, a list of indices, or None for all.
            norm: apply the final norm to the last stage's map (the others have fewer channels).
            stop_early: leave out the stages after the last one taken.
            output_fmt: "NCHW" for maps (B, C, h, w), "NHWC" for (B, h, w, C); the memory is the same.
            intermediates_only: give the intermediates alone, without the final map.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise unknown("output_fmt", output_fmt, ("NCHW", "NHWC"))
        take, last = feature_take_indices(len(self.stages), indices)
        maps = self.stage_maps(x, last + 1 if stop_early else len(self.stages))
        final = self.close(maps[-1]) if len(maps) == len(self.stages) else maps[-1]
        taken = [final if norm and index == len(self.stages) - 1 else maps[index] for index in take]
        if output_fmt == "NHWC":
            taken = [map_.permute(0, 2, 3, 1) for map_ in taken]
        return taken if intermediates_only else (final, taken)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages after the last one taken; the norm and head go with them, or on request."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take


def per_stage(what: str, value: Any, count: int, unit: str = "stages") -> list[Any]:
    """One value a stage, or another `unit`: from a sequence of `count`, or one name, number, mapping or None for all.

    Raises:
        UsageError: it is something else, or has another length.
    """
    if value is None or isinstance(value, (str, Mapping, int, float)):
        return [value] * count
    values = list(value) if isinstance(value, Sequence) else None
    if values is None or len(values) != count:
        found = f"has {len(values)} entries" if values is not None else f"is {value!r}"
        raise UsageError(f"{what} {found}, but there are {count} {unit}; give one for all or a sequence of {count}")
    return values


def attention_per_stage(
    attn: Any, attn_options: Any, count: int, unit: str = "stages"
) -> tuple[list[str | None], list[Mapping | None]]:
    """The names and the options that the user gives each stage (or `unit`); None where the user gives none.

    Raises:
        UsageError: they are no names and no mappings, or not as many as there are stages.
    """
    names, options = per_stage("attn", attn, count, unit), per_stage("attn_options", attn_options, count, unit)
    if not all(name is None or isinstance(name, str) for name in names):
        raise UsageError(
            f"attn={attn!r}: give the name of an attention, for all {unit}, or a sequence of {count} names, where None "
            "keeps the network's own"
        )
    if not all(option is None or isinstance(option, Mapping) for option in options):
        raise UsageError(
            f"attn_options={attn_options!r}: give a mapping of options, for all {unit}, or a sequence of {count} of "
            "them, where None stands for none"
        )
    return names, options


def own_attention(kwargs: dict[str, Any], own: Sequence[str]) -> dict[str, Any]:
    """The keywords with the paper's own attention wherever the user names none."""
    given = per_stage("attn", kwargs.get("attn"), len(own))
    return {**kwargs, "attn": [paper if name is None else name for name, paper in zip(given, own, strict=True)]}


def residual_attention(name: str, dim: int, **options: Any) -> Attention:
    """`create_attention` for a branch beside an identity.

    Raises:
        UsageError: as there, or the options change the channels or the grid.
    """
    attention = create_attention(name, dim, **options)
    if attention.dim_out != dim or attention.out_grid((8, 8)) != (8, 8):
        raise UsageError(
            f"attention {name!r} with these options answers {attention.dim_out} channels on a grid of "
            f"{attention.out_grid((8, 8))} for {dim} on (8, 8), but here it is added to what it gets: leave out "
            "dim_out and stride"
        )
    return attention


def check_num_classes(num_classes: int) -> None:
    """Raises UsageError for a number of classes that cannot be."""
    if num_classes < 0:
        raise UsageError(f"num_classes={num_classes}: give the number of classes, or 0 for no classifier")


def stage_grids(img_size: int | tuple[int, int], patch_size: int, count: int) -> list[tuple[int, int]]:
    """The grid of every stage for images of a size."""
    height, width = to_2tuple(img_size)
    height, width = -(-height // patch_size), -(-width // patch_size)
    grids = []
    for _ in range(count):
        grids.append((height, width))
        height, width = (height + 1) // 2, (width + 1) // 2
    return grids
