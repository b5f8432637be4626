"""What pyramids of transformer stages share: blocks over tokens, stages over maps, and timm's interface to them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import checkpoint, register_notrace_module
from torch import Tensor, nn

from zoo.attention import with_defaults
from zoo.attention.base import undecayed
from zoo.backbones._build import imagenet_cfg
from zoo.backbones._staged import (
    StagedNetwork,
    attention_per_stage,
    check_num_classes,
    per_stage,
    residual_attention,
    stage_grids,
)
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
        return residual_attention(name, self.dim, grid_size=self.grid_size, **merged)


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


class Pyramid(StagedNetwork):
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
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=False)
        names, options = attention_per_stage(attn, attn_options, count)
        dims, num_heads = per_stage("embed_dims", dims, count), per_stage("num_heads", num_heads, count)
        mlp_ratios = per_stage("mlp_ratios", mlp_ratios, count)
        grids = stage_grids(img_size, patch_size, count)
        drops = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}

        self.patch_embed = embeds[0]
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
        self.make_head(dims[-1], num_classes, global_pool, drop_rate)
        self.init_weights()

    def make_head(self, num_features: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        check_num_classes(num_classes)
        self.num_classes, self.num_features = num_classes, num_features
        self.head = ClassifierHead(num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head_hidden_size = pooled_width(self.head)

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
        tables = {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}
        return tables | undecayed(self)

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
    def get_classifier(self) -> nn.Module:
        head: Any = self.head
        return head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Exchanges the classifier, and the pooling before it if one is named."""
        check_num_classes(num_classes)
        head: Any = self.head
        self.num_classes, head.in_features = num_classes, self.num_features
        like = next(self.patch_embed.parameters())
        head.reset(num_classes, pool_type=global_pool)
        head.to(device=like.device, dtype=like.dtype)
        self.head_hidden_size = pooled_width(head)

    def close(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (B, num_features, h, w) -> logits (B, num_classes), or features (B, num_features) if `pre_logits`."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)


def pooled_width(head: ClassifierHead) -> int:
    """Features that the classifier of `head` sees: twice the map's for pooling that concatenates."""
    return head.in_features * head.global_pool.feat_mult()


def pyramid_cfg(**kwargs: Any) -> dict[str, Any]:
    """`imagenet_cfg` of a pyramid."""
    own = {"pool_size": (7, 7), "first_conv": "patch_embed.proj", "classifier": "head.fc"}
    return imagenet_cfg(**{**own, **kwargs})


def flatten_cfg(origin_url: str = "https://github.com/LeapLabTHU/FLatten-Transformer", **kwargs: Any) -> dict[str, Any]:
    """`pyramid_cfg` of a network with focused linear attention by its authors."""
    # They evaluate on images squashed to a square. Their links answer with a file that has no name, which timm cannot
    # cache, so they are the origin.
    own = {
        "crop_pct": 0.875,
        "crop_mode": "squash",
        "license": "none stated",
        "origin_url": origin_url,
        "paper_ids": "arXiv:2308.00442",
        "paper_name": "FLatten Transformer: Vision Transformer using Focused Linear Attention",
        "notes": ("the authors' repository states no licence",),
    }
    return pyramid_cfg(**{**own, **kwargs})
