"""SHViT: single-head attention over a part of the channels, in three stages behind a stem of stride 16.

SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design - https://arxiv.org/abs/2401.16456
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, SqueezeExcite, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.attention import SingleHeadAttention, with_defaults
from zoo.attention.base import undecayed
from zoo.backbones._build import build, imagenet_cfg, unwrap
from zoo.backbones._checkpoint import rename, stage_of
from zoo.backbones._staged import (
    MapStage,
    StagedNetwork,
    attention_per_stage,
    linear_classifier,
    per_stage,
    residual_attention,
    stage_grids,
)
from zoo.errors import UsageError
from zoo.layers.conv_norm import ConvNorm, NormLinear, ResidualDepthwise, fuse_children

__all__ = ["SHViT"]


def _drop_path(rate: float) -> nn.Module:
    return DropPath(rate) if rate > 0 else nn.Identity()


class FeedForward(nn.Module):
    """x + two 1x1 convolutions with a ReLU between: maps (B, dim, H, W) -> the same shape."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float = 0.0):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.pw1 = ConvNorm(dim, hidden)
        self.act = nn.ReLU()
        self.pw2 = ConvNorm(hidden, dim)
        self.drop_path = _drop_path(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.pw2(self.act(self.pw1(x))))


class PatchMerging(nn.Module):
    """Inverted bottleneck of stride 2 with squeeze and excitation: (B, dim, H, W) -> (B, dim_out, H/2, W/2)."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        hidden = 4 * dim
        self.conv1 = ConvNorm(dim, hidden)
        self.act1 = nn.ReLU()
        self.conv2 = ConvNorm(hidden, hidden, 3, stride=2, groups=hidden)
        self.act2 = nn.ReLU()
        self.se = SqueezeExcite(hidden, 0.25)
        self.conv3 = ConvNorm(hidden, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.conv1(x))
        x = self.act2(self.conv2(x))
        return self.conv3(self.se(x))


class Block(nn.Module):
    """Depthwise 3x3 convolution, attention (if any) and feed-forward, each residual: maps of one shape."""

    def __init__(self, dim: int, attn: nn.Module | None, mlp_ratio: float, drop_path: float = 0.0):
        super().__init__()
        self.conv = ResidualDepthwise(dim, drop_path=_drop_path(drop_path))
        self.attn = attn
        self.drop_path = _drop_path(drop_path)
        self.ffn = FeedForward(dim, mlp_ratio, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.attn is not None:
            x = x + self.drop_path(self.attn(x))
        return self.ffn(x)


class Stem(nn.Sequential):
    """Convolutions of stride 2 with ReLUs between: images (B, in_chans, H, W) -> maps (B, C, H/16, W/16)."""

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Without norms, and between convolutions with channels that stay zero up to a multiple of eight, in place.

        A GPU's convolutions copy maps in half precision whose channels (28 in S4) are no such multiple. `Conv2d` fills
        them up too, but in torch.compile alone, and not in what is exported.
        """
        fuse_children(self)
        convs = [layer for layer in self if isinstance(layer, nn.Conv2d)]
        for before, after in pairwise(convs):
            more = -before.out_channels % 8
            # Data, and not parameters: frozen ones stay so.
            before.weight.data = F.pad(before.weight.data, (0, 0, 0, 0, 0, 0, 0, more))
            before.bias.data = F.pad(before.bias.data, (0, more))
            after.weight.data = F.pad(after.weight.data, (0, 0, 0, 0, 0, more))
            before.out_channels = after.in_channels = before.out_channels + more
        return self


class SHViT(StagedNetwork):
    """SHViT for images of any size: stages of reduction 16, 32 and 64.

    Args:
        img_size: side, or (height, width), for which tables of positions are made, where an attention has one.
        embed_dims, depths: channels and blocks of every stage.
        partial_dims: channels that attend in every stage.
        qk_dim: channels of queries and keys.
        mlp_ratio: widening in the feed-forward layers.
        attn: attention by name: one for the stages that have any in the paper, all but the first, or one a stage;
            None is the paper's own, nothing in the first stage and `single_head` after it.
        attn_options: its options, of the same shape as `attn`.
        drop_rate, drop_path_rate: dropout before the classifier, and of whole branches (rising linearly with depth).

    The other arguments are timm's.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (128, 224, 320),
        depths: Sequence[int] = (2, 4, 5),
        partial_dims: Sequence[int] = (32, 48, 68),
        qk_dim: int = 16,
        mlp_ratio: float = 2.0,
        attn: str | Sequence[str | None] | None = None,
        attn_options: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        count = len(depths)
        names, options = attention_per_stage(attn, attn_options, count)
        embed_dims = per_stage("embed_dims", embed_dims, count)
        partial_dims = per_stage("partial_dims", partial_dims, count)
        if attn is None or isinstance(attn, str):
            names[0] = None
        own = [None, *["single_head"] * (count - 1)]
        names = [paper if name is None else name for name, paper in zip(names, own, strict=True)]
        if names[0] is None and options[0] and not isinstance(attn_options, Mapping):
            raise UsageError(f"attn_options has {options[0]} for the first stage, which has no attention; give it one")
        grids = stage_grids(img_size, 16, count)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        widths = [in_chans, *(embed_dims[0] // part for part in (8, 4, 2, 1))]
        stem: list[nn.Module] = []
        for before, after in pairwise(widths):
            stem += [ConvNorm(before, after, 3, stride=2), nn.ReLU()]
        self.patch_embed = Stem(*stem[:-1])
        for stage, (dim, name) in enumerate(zip(embed_dims, names, strict=True)):
            defaults = {"partial_dim": partial_dims[stage], "qk_dim": qk_dim, "num_heads": _heads(dim)}
            blocks: list[nn.Module] = []
            for rate in rates[stage]:
                mixer = None
                if name is not None:
                    merged = with_defaults(name, options[stage], defaults)
                    mixer = residual_attention(name, dim, layout="map", grid_size=grids[stage], **merged)
                blocks.append(Block(dim, mixer, mlp_ratio, rate))
            down = self._downsample(embed_dims[stage - 1], dim, mlp_ratio) if stage else nn.Identity()
            self.stages.append(MapStage(down, blocks))
        self.feature_info = [
            {"module": f"stages.{stage}", "num_chs": dim, "reduction": 16 * 2**stage}
            for stage, dim in enumerate(embed_dims)
        ]
        self.make_head(embed_dims[-1], num_classes, global_pool, drop_rate)
        self.init_weights()

    @staticmethod
    def _downsample(before: int, after: int, mlp_ratio: float) -> nn.Sequential:
        return nn.Sequential(
            ResidualDepthwise(before),
            FeedForward(before, mlp_ratio),
            PatchMerging(before, after),
            ResidualDepthwise(after),
            FeedForward(after, mlp_ratio),
        )

    def classifier(self, num_classes: int) -> nn.Module:
        return NormLinear(linear_classifier(self.head_hidden_size, num_classes)) if num_classes else nn.Identity()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Every branch of a block, and every feed-forward one, starts at zero; the rest as its layers start."""
        for module in self.modules():
            if isinstance(module, Block):
                nn.init.zeros_(module.conv.bn.weight)
            elif isinstance(module, FeedForward):
                nn.init.zeros_(module.pw2.bn.weight)
            elif isinstance(module, SingleHeadAttention):
                nn.init.zeros_(module.proj.bn.weight)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        tables = {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}
        return tables | undecayed(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}


def _heads(dim: int) -> int:
    """Heads of about 32 channels, an even number where there is one, for mechanisms that have heads."""
    divisors = [n for n in range(1, dim + 1) if dim % n == 0]
    return min([n for n in divisors if n % 2 == 0] or divisors, key=lambda n: abs(dim / n - 32))


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: SHViT) -> dict[str, Tensor]:
    """Weights of the authors' (before fusion), timm's and our files for this model."""
    part = r"^blocks([23])\."
    rules: Mapping[str, Any] = {
        # The authors count the modules that make the map smaller as blocks 0 to 2.
        part + r"0\.": stage_of("stages.", ".downsample."),
        part + r"1\.": stage_of("stages.", ".downsample.2."),
        part + r"2\.0\.": stage_of("stages.", ".downsample.3."),
        part + r"2\.1\.": stage_of("stages.", ".downsample.4."),
        part + r"(\d+)\.": lambda m: f"stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 3}.",
        r"^blocks1\.": "stages.0.blocks.",
        r"\.m\.": ".",
        r"\.c\.weight$": ".conv.weight",
        r"\.mixer\.pre_norm\.": ".attn.norm.",
        r"\.mixer\.proj\.1\.": ".attn.proj.",
        r"\.mixer\.": ".attn.",
        r"^head\.l\.": "head.fc.",
    }
    state, own = rename(unwrap(state_dict), rules), model.state_dict()
    for key, value in state.items():
        # Files of linear layers hold matrices where there are 1x1 convolutions.
        if value.ndim == 2 and key in own and own[key].ndim == 4 and re.search(r"conv\.weight$", key):
            state[key] = value[:, :, None, None]
    return state


def _cfg(url: str, **kwargs: Any) -> dict[str, Any]:
    own = {
        "url": url,
        "pool_size": (4, 4),
        "crop_pct": 0.875,
        "first_conv": "patch_embed.0.conv",
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": "arXiv:2401.16456",
        "paper_name": "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
        "origin_url": "https://github.com/ysj9909/SHViT",
    }
    return imagenet_cfg(**{**own, **kwargs})


_RELEASE = "https://github.com/ysj9909/SHViT/releases/download/v1.0/"
default_cfgs = generate_default_cfgs(
    {
        "zoo_shvit_s1.in1k": _cfg(_RELEASE + "shvit_s1.pth"),
        "zoo_shvit_s2.in1k": _cfg(_RELEASE + "shvit_s2.pth"),
        "zoo_shvit_s3.in1k": _cfg(_RELEASE + "shvit_s3.pth"),
        "zoo_shvit_s4.in1k": _cfg(_RELEASE + "shvit_s4.pth", input_size=(3, 256, 256)),
    }
)


def _create_shvit(variant: str, pretrained: bool, **kwargs: Any) -> SHViT:
    return build(SHViT, variant, pretrained, checkpoint_filter_fn, **{"out_indices": (0, 1, 2), **kwargs})


@register_model
def zoo_shvit_s1(pretrained: bool = False, **kwargs: Any) -> SHViT:
    """SHViT-S1."""
    return _create_shvit("zoo_shvit_s1", pretrained, **kwargs)


@register_model
def zoo_shvit_s2(pretrained: bool = False, **kwargs: Any) -> SHViT:
    """SHViT-S2."""
    args = {"embed_dims": (128, 308, 448), "partial_dims": (32, 66, 96)}
    return _create_shvit("zoo_shvit_s2", pretrained, **{**args, **kwargs})


@register_model
def zoo_shvit_s3(pretrained: bool = False, **kwargs: Any) -> SHViT:
    """SHViT-S3."""
    args = {"embed_dims": (192, 352, 448), "depths": (3, 5, 5), "partial_dims": (48, 75, 96)}
    return _create_shvit("zoo_shvit_s3", pretrained, **{**args, **kwargs})


@register_model
def zoo_shvit_s4(pretrained: bool = False, **kwargs: Any) -> SHViT:
    """SHViT-S4, for images of 256 pixels."""
    args = {"img_size": 256, "embed_dims": (224, 336, 448), "depths": (4, 7, 6), "partial_dims": (48, 72, 96)}
    return _create_shvit("zoo_shvit_s4", pretrained, **{**args, **kwargs})
