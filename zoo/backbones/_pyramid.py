"""What pyramids of transformer stages share: blocks over tokens, stages over maps, and timm's interface to them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    ClassifierHead,
    DropPath,
    Mlp,
    calculate_drop_path_rates,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.attention import create_attention, with_defaults
from zoo.errors import UsageError, unknown
from zoo.layers.position import TableResize


@dataclass(frozen=True)
class Place:
    """Where an attention goes: block `index` of stage `stage`, and what is asked of it there."""

    stage: int
    index: int
    dim: int
    grid_size: tuple[int, int]
    name: str | None
    options: Mapping[str, Any] | None
    defaults: Mapping[str, Any]

    def create(self, name: str, options: Mapping[str, Any] | None = None, **defaults: Any) -> nn.Module:
        """The mechanism `name` with the user's options over the host's defaults."""
        merged = with_defaults(name, options, {**self.defaults, **defaults})
        return create_attention(name, self.dim, grid_size=self.grid_size, **merged)


@register_notrace_module  # it pads by the size of the image
class Embed(nn.Module):
    """Strided convolution and LayerNorm: (B, C, H, W) -> (B, dim, ceil(H / stride), ceil(W / stride)), channels last.

    An image that the stride does not divide is padded with zeros on the right and at the bottom.
    """

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, padding: int = 0):
        super().__init__()
        self.stride = stride
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, padding)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        down, right = -x.shape[2] % self.stride, -x.shape[3] % self.stride
        if down > 0 or right > 0:
            x = F.pad(x, (0, right, 0, down))
        return self.norm(self.proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Pre-norm transformer layer: x + attn(norm1(x)), x + mlp(norm2(x)); tokens (B, H*W, C) of a grid (H, W)."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        norm_eps: float,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x), grid))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Blocks over one size of map: (B, C, H, W) -> (B, dim, h, w), channels last.

    Args:
        downsample: makes the map smaller first; it keeps its memory channels last, so that tokens are views of it.
        blocks: layers over tokens and their grid.
        dim: channels of the answer.
        grid_size: (h, w) for which the table of positions is made.
        pos_embed: whether a learned table of positions is added first.
        norm: LayerNorm after the blocks, or nothing.
    """

    def __init__(
        self,
        downsample: nn.Module,
        blocks: Sequence[nn.Module],
        dim: int,
        grid_size: tuple[int, int],
        pos_embed: bool = False,
        norm: nn.Module | None = None,
    ):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.pos_embed = nn.Parameter(torch.zeros(1, grid_size[0] * grid_size[1], dim)) if pos_embed else None
        self.resize_pos = TableResize(grid_size)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        grid = (x.shape[2], x.shape[3])
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
        if self.pos_embed is not None:
            x = x + self.resize_pos(self.pos_embed, grid)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, grid)
            else:
                x = block(x, grid)
        return self.norm(x).transpose(1, 2).unflatten(2, grid)


class Pyramid(nn.Module):
    """A pyramid of transformer stages with all of timm's interface; each network says what its stages are made of.

    Images (B, in_chans, H, W) of any size; stage i answers (B, dims[i], ceil(H / r), ceil(W / r)) with r = patch_size
    * 2**i, each size being the ceiling of half the one before.

    Args:
        embeds: what makes the map of each stage; the first one takes images.
        attend: gives the attention of a block.
        block: class of the blocks.
        norm_eps: of the LayerNorms in blocks and after them.
        pos_embed: whether stages add learned positions.
        stage_norm: whether a LayerNorm closes each stage.
        final_norm: whether one closes the last, outside of the stage's map.

    The other arguments are those of the networks.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int],
        patch_size: int,
        num_classes: int,
        global_pool: str,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratios: Sequence[float],
        qkv_bias: bool,
        attn: str | Sequence[str | None] | None,
        attn_options: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None,
        drop_rate: float,
        proj_drop_rate: float,
        attn_drop_rate: float,
        drop_path_rate: float,
        embeds: Sequence[nn.Module],
        attend: Callable[[Place], nn.Module],
        block: type[Block] = Block,
        norm_eps: float = 1e-5,
        pos_embed: bool = False,
        stage_norm: bool = False,
        final_norm: bool = False,
    ):
        super().__init__()
        count = len(depths)
        self.num_classes = num_classes
        self.num_features = dims[-1]
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=False)
        names, options = per_stage("attn", attn, count), per_stage("attn_options", attn_options, count)
        grids = stage_grids(img_size, patch_size, count)
        drops = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}

        self.patch_embed = embeds[0]
        self.stages = nn.ModuleList()
        for stage, (dim, grid) in enumerate(zip(dims, grids, strict=True)):
            defaults = {"num_heads": num_heads[stage], "qkv_bias": qkv_bias, **drops}
            place = partial(Place, stage, dim=dim, grid_size=grid, name=names[stage], options=options[stage])
            start = sum(depths[:stage])
            blocks = [
                block(
                    dim,
                    attend(place(index, defaults=defaults)),
                    mlp_ratios[stage],
                    norm_eps,
                    proj_drop=proj_drop_rate,
                    drop_path=rates[start + index],
                )
                for index in range(depths[stage])
            ]
            downsample = embeds[stage] if stage > 0 else nn.Identity()
            norm = nn.LayerNorm(dim, eps=norm_eps) if stage_norm else None
            self.stages.append(Stage(downsample, blocks, dim, grid, pos_embed, norm))
        self.feature_info = [
            {"module": f"stages.{stage}", "num_chs": dim, "reduction": patch_size * 2**stage}
            for stage, dim in enumerate(dims)
        ]
        self.norm = nn.LayerNorm(dims[-1], eps=norm_eps) if final_norm else nn.Identity()
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head_hidden_size = pooled_width(self.head)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Linear layers and positions: truncated normal of std 0.02, biases 0; the rest as its layers start."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Stage) and module.pos_embed is not None:
                trunc_normal_(module.pos_embed, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [
            (r"^stages\.(\d+)\.(?:downsample|pos_embed)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99998,)),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Exchanges the classifier, and the pooling before it if one is named."""
        self.num_classes = num_classes
        like = self.patch_embed.proj.weight
        self.head.reset(num_classes, pool_type=global_pool)
        self.head.to(device=like.device, dtype=like.dtype)
        self.head_hidden_size = pooled_width(self.head)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> map (B, num_features, h, w), channels last."""
        x = self.patch_embed(x)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (B, num_features, h, w) -> logits (B, num_classes), or features (B, num_features) if `pre_logits`."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

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
        final = len(self.stages) - 1
        x = self.patch_embed(x)
        taken = []
        for index, stage in enumerate(self.stages):
            if index > last and stop_early:
                break
            x = stage(x)
            closed = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if index == final else x
            if index in take:
                taken.append(closed if norm else x)
            x = closed
        if output_fmt == "NHWC":
            taken = [map_.permute(0, 2, 3, 1) for map_ in taken]
        return taken if intermediates_only else (x, taken)

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
            self.num_features = self.head.in_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take


def pooled_width(head: ClassifierHead) -> int:
    """Features that the classifier of `head` sees: twice the map's for pooling that concatenates."""
    return head.in_features * head.global_pool.feat_mult()


def per_stage(what: str, value: Any, count: int) -> list[Any]:
    """One value a stage from one for all or a sequence."""
    if value is None or isinstance(value, (str, Mapping)):
        return [value] * count
    value = list(value)
    if len(value) != count:
        raise UsageError(f"{what} has {len(value)} entries, but there are {count} stages; give one for all or {count}")
    return value


def own_attention(kwargs: dict[str, Any], own: Sequence[str]) -> dict[str, Any]:
    """The keywords with the paper's own attention wherever the user names none."""
    given = per_stage("attn", kwargs.get("attn"), len(own))
    return {**kwargs, "attn": [name or paper for name, paper in zip(given, own, strict=True)]}


def stage_grids(img_size: int | tuple[int, int], patch_size: int, count: int) -> list[tuple[int, int]]:
    """The grid of every stage for images of a size."""
    height, width = to_2tuple(img_size)
    height, width = -(-height // patch_size), -(-width // patch_size)
    grids = []
    for _ in range(count):
        grids.append((height, width))
        height, width = (height + 1) // 2, (width + 1) // 2
    return grids
