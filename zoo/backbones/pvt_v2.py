"""Pyramid Vision Transformer v2 (PVTv2) with attention by name, and its FLatten form.

PVT v2: Improved Baselines with Pyramid Vision Transformer - https://arxiv.org/abs/2106.13797
FLatten Transformer: Vision Transformer using Focused Linear Attention - https://arxiv.org/abs/2308.00442
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.backbones._build import build, unwrap
from zoo.backbones._checkpoint import fit, rename, stage_of
from zoo.backbones._pyramid import Block, Embed, Place, Pyramid, flatten_cfg, pyramid_cfg
from zoo.backbones._staged import own_attention, per_stage
from zoo.layers.conv2d import Conv2d

__all__ = ["PyramidVisionTransformerV2"]


class ConvMlp(nn.Module):
    """Linear, depthwise 3x3 convolution over the grid, GELU, linear; tokens (B, H*W, C) -> (B, H*W, C)."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.dwconv(self.fc1(x).transpose(1, 2).unflatten(2, grid)).permute(0, 2, 3, 1).flatten(1, 2)
        return self.drop2(self.fc2(self.drop1(self.act(x))))


class ConvBlock(Block):
    """A block whose MLP looks at the neighbours too."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        norm_eps: float,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__(dim, attn, mlp_ratio, norm_eps, proj_drop, drop_path)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), proj_drop)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x), grid))
        return x + self.drop_path2(self.mlp(self.norm2(x), grid))


class PyramidVisionTransformerV2(Pyramid):
    """PVTv2 for images of any size; see `Pyramid` for the sizes of its maps, each closed by a LayerNorm.

    Args:
        img_size: side, or (height, width), for which tables of positions are made, where an attention has one.
        embed_dims, depths, num_heads, mlp_ratios, sr_ratios: one value a stage.
        sr_ratios: how many times softmax attention reduces the grid of keys along each side.
        attn: attention by name, one for all stages or one a stage; None is softmax with reduced keys.
        attn_options: its options, of the same shape as `attn`.
        drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: dropout before the classifier, after projections, on
            attention weights, and of whole branches (rising linearly with depth).

    The other arguments are timm's.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        attn: str | Sequence[str | None] | None = None,
        attn_options: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        def attend(place: Place) -> nn.Module:
            name = "softmax" if place.name is None else place.name
            # Not in a window: it would reduce the keys of each.
            reduction = {"sr_ratio": ratios[place.stage]} if name == "softmax" else {}
            return place.create(name, place.options, **reduction)

        ratios = per_stage("sr_ratios", sr_ratios, len(depths))
        steps = pairwise(embed_dims)
        super().__init__(
            img_size=img_size,
            patch_size=4,
            num_classes=num_classes,
            global_pool=global_pool,
            dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            qkv_bias=qkv_bias,
            attn=attn,
            attn_options=attn_options,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            embeds=[
                Embed(in_chans, embed_dims[0], 7, 4, padding=3),
                *(Embed(before, after, 3, 2, padding=1) for before, after in steps),
            ],
            attend=attend,
            block=ConvBlock,
            norm_eps=1e-6,
            stage_norm=True,
        )

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Linear layers as in `Pyramid`; convolutions: normal with the variance 2 / fan-out, biases 0."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: PyramidVisionTransformerV2) -> dict[str, Tensor]:
    """Weights of PVTv2's, FLatten's, timm's and our files for this model."""
    rules: Mapping[str, Any] = {
        r"^patch_embed1\.": "patch_embed.",
        r"^patch_embed(\d)\.": stage_of("stages.", ".downsample."),
        r"^block(\d)\.": stage_of("stages.", ".blocks."),
        r"^norm(\d)\.": stage_of("stages.", ".norm."),
        r"\.dwconv\.dwconv\.": ".dwconv.",
    }
    return fit(rename(unwrap(state_dict), rules), model)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    own = {
        "paper_ids": "arXiv:2106.13797",
        "paper_name": "PVT v2: Improved Baselines with Pyramid Vision Transformer",
        "origin_url": "https://github.com/whai362/PVT",
    }
    return pyramid_cfg(**{**own, **kwargs})


def _pvt(file: str) -> dict[str, Any]:
    return _cfg(url=f"https://github.com/whai362/PVT/releases/download/v2/{file}")


default_cfgs = generate_default_cfgs(
    {
        "zoo_pvt_v2_b0.in1k": _pvt("pvt_v2_b0.pth"),
        "zoo_pvt_v2_b1.in1k": _pvt("pvt_v2_b1.pth"),
        "zoo_pvt_v2_b2.in1k": _pvt("pvt_v2_b2.pth"),
        "zoo_pvt_v2_b3.in1k": _pvt("pvt_v2_b3.pth"),
        "zoo_pvt_v2_b4.in1k": _pvt("pvt_v2_b4.pth"),
        "zoo_flatten_pvt_v2_b0.in1k": flatten_cfg("https://cloud.tsinghua.edu.cn/f/5d1f01532b104da28e7b/?dl=1"),
        "zoo_flatten_pvt_v2_b1": flatten_cfg(),
        "zoo_flatten_pvt_v2_b2": flatten_cfg(),
        "zoo_flatten_pvt_v2_b3": flatten_cfg(),
        "zoo_flatten_pvt_v2_b4": flatten_cfg(),
    }
)

_B0 = {"embed_dims": (32, 64, 160, 256)}
_B2 = {"depths": (3, 4, 6, 3)}
_B3 = {"depths": (3, 4, 18, 3)}
_B4 = {"depths": (3, 8, 27, 3)}
_FLATTEN = ("focused_linear",) * 4


def _create_pvt_v2(variant: str, pretrained: bool, **kwargs: Any) -> PyramidVisionTransformerV2:
    return build(PyramidVisionTransformerV2, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def zoo_pvt_v2_b0(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformerV2:
    """PVTv2-B0."""
    return _create_pvt_v2("zoo_pvt_v2_b0", pretrained, **{**_B0, **kwargs})


@register_model
def zoo_pvt_v2_b1(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformerV2:
    """PVTv2-B1."""
    return _create_pvt_v2("zoo_pvt_v2_b1", pretrained, **kwargs)


@register_model
def zoo_pvt_v2_b2(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformerV2:
    """PVTv2-B2."""
    return _create_pvt_v2("zoo_pvt_v2_b2", pretrained, **{**_B2, **kwargs})


@register_model
def zoo_pvt_v2_b3(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformerV2:
    """PVTv2-B3."""
    return _create_pvt_v2("zoo_pvt_v2_b3", pretrained, **{**_B3, **kwargs})


@register_model
def zoo_pvt_v2_b4(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformerV2:
    """PVTv2-B4."""
    return _create_pvt_v2("zoo_pvt_v2_b4", pretrained, **{**_B4, **kwargs})


@register_model
def zoo_flatten_pvt_v2_b0(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformerV2:
    """FLatten-PVTv2-B0: focused linear attention in all stages."""
    return _create_pvt_v2("zoo_flatten_pvt_v2_b0", pretrained, **{**_B0, **own_attention(kwargs, _FLATTEN)})


@register_model
def zoo_flatten_pvt_v2_b1(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformerV2:
    """FLatten-PVTv2-B1: focused linear attention in all stages."""
    return _create_pvt_v2("zoo_flatten_pvt_v2_b1", pretrained, **own_attention(kwargs, _FLATTEN))


@register_model
def zoo_flatten_pvt_v2_b2(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformerV2:
    """FLatten-PVTv2-B2: focused linear attention in all stages."""
    return _create_pvt_v2("zoo_flatten_pvt_v2_b2", pretrained, **{**_B2, **own_attention(kwargs, _FLATTEN)})


@register_model
def zoo_flatten_pvt_v2_b3(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformerV2:
    """FLatten-PVTv2-B3: focused linear attention in all stages."""
    return _create_pvt_v2("zoo_flatten_pvt_v2_b3", pretrained, **{**_B3, **own_attention(kwargs, _FLATTEN)})


@register_model
def zoo_flatten_pvt_v2_b4(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformerV2:
    """FLatten-PVTv2-B4: focused linear attention in all stages."""
    return _create_pvt_v2("zoo_flatten_pvt_v2_b4", pretrained, **{**_B4, **own_attention(kwargs, _FLATTEN)})
