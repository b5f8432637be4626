"""Swin Transformer with attention by name, and its FLatten form.

Swin Transformer: Hierarchical Vision Transformer using Shifted Windows - https://arxiv.org/abs/2103.14030
FLatten Transformer: Vision Transformer using Focused Linear Attention - https://arxiv.org/abs/2308.00442
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from zoo.attention import attention_spec
from zoo.backbones._build import build, unwrap
from zoo.backbones._checkpoint import fit, rename, stage_of
from zoo.backbones._pyramid import Embed, Place, Pyramid, flatten_cfg, pyramid_cfg
from zoo.backbones._staged import own_attention

__all__ = ["SwinTransformer"]


@register_notrace_module  # it pads by the size of the map
class PatchMerging(nn.Module):
    """Four neighbours to one cell: (B, C, H, W) -> (B, 2 C, ceil(H / 2), ceil(W / 2)); an odd side is padded by zeros.

    The neighbours are concatenated column by column: (0, 0), (1, 0), (0, 1), (1, 1) of (row, column).
    """

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=1e-5)
        self.reduction = nn.Linear(4 * dim, dim_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        if x.shape[1] % 2 == 1 or x.shape[2] % 2 == 1:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


def _attend(place: Place, window_size: int | tuple[int, int]) -> nn.Module:
    """Softmax attention lives in windows, shifted in every second block; another mechanism sees the whole grid.

    "shifted_window" by name is the same alternation over the `inner` mechanism of the user's options.
    """
    name = "softmax" if place.name is None else place.name
    options = dict(place.options or {})
    if name == "softmax":
        name, options = "shifted_window", {"inner_options": options}
    biased = "bias" in attention_spec(options.get("inner", "softmax")).supports
    if name == "shifted_window" and place.index % 2 == 0:
        name, _ = "window", options.pop("shift_size", None)
    return place.create(name, options, window_size=window_size, rel_pos_bias=biased)


class SwinTransformer(Pyramid):
    """Swin Transformer for images of any size; see `Pyramid` for the sizes of its maps.

    Args:
        img_size: side, or (height, width), for which tables of positions over a whole grid are made.
        patch_size: side of a patch.
        embed_dim: channels of the first stage; every further one has twice as many.
        depths, num_heads: one value a stage.
        window_size: side, or (height, width), of the windows of softmax attention.
        attn: attention by name, one for all stages or one a stage; None or "softmax" is softmax with relative positions
            in windows, shifted in every second block; "shifted_window" the same over any `inner` mechanism; any other
            one sees the whole grid of its stage.
        attn_options: its options, of the same shape as `attn`.
        drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: dropout before the classifier, after projections, on
            attention weights, and of whole branches (rising linearly with depth).

    The other arguments are timm's.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | tuple[int, int] = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attn: str | Sequence[str | None] | None = None,
        attn_options: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        dims = [embed_dim * 2**stage for stage in range(len(depths))]
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            num_classes=num_classes,
            global_pool=global_pool,
            dims=dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=[mlp_ratio] * len(depths),
            qkv_bias=qkv_bias,
            attn=attn,
            attn_options=attn_options,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            embeds=[
                Embed(in_chans, embed_dim, patch_size, patch_size),
                *(PatchMerging(dim, 2 * dim) for dim in dims[:-1]),
            ],
            attend=lambda place: _attend(place, window_size),
            final_norm=True,
        )


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: SwinTransformer) -> dict[str, Tensor]:
    """Weights of Swin's, FLatten's, timm's and our files for this model."""
    state = unwrap(state_dict)
    # The authors count a downsampling to the stage before it, timm to the stage after it.
    shift = 1 if "layers.0.downsample.reduction.weight" in state else 0
    rules: Mapping[str, Any] = {
        r"^layers\.(\d)\.downsample\.": stage_of("stages.", ".downsample.", shift),
        r"^layers\.": "stages.",
    }
    return fit(rename(state, rules), model)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    own = {
        "license": "mit",
        "paper_ids": "arXiv:2103.14030",
        "paper_name": "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
        "origin_url": "https://github.com/microsoft/Swin-Transformer",
    }
    return pyramid_cfg(**{**own, **kwargs})


def _swin(file: str, **kwargs: Any) -> dict[str, Any]:
    return _cfg(url=f"https://github.com/SwinTransformer/storage/releases/download/v1.0.0/{file}", **kwargs)


_CFG_384: dict[str, Any] = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}

default_cfgs = generate_default_cfgs(
    {
        "zoo_swin_tiny_patch4_window7_224.ms_in1k": _swin("swin_tiny_patch4_window7_224.pth"),
        "zoo_swin_small_patch4_window7_224.ms_in1k": _swin("swin_small_patch4_window7_224.pth"),
        "zoo_swin_base_patch4_window7_224.ms_in1k": _swin("swin_base_patch4_window7_224.pth"),
        "zoo_swin_base_patch4_window12_384.ms_in1k": _swin("swin_base_patch4_window12_384.pth", **_CFG_384),
        "zoo_flatten_swin_tiny.in1k": flatten_cfg("https://cloud.tsinghua.edu.cn/f/e1518e76703e4e57a7f2/?dl=1"),
        "zoo_flatten_swin_small.in1k": flatten_cfg("https://cloud.tsinghua.edu.cn/f/94188e52af354bf4a88b/?dl=1"),
        "zoo_flatten_swin_base.in1k": flatten_cfg("https://cloud.tsinghua.edu.cn/f/7a9e5186bad04e7fb3a9/?dl=1"),
        "zoo_flatten_swin_base_384.in1k": flatten_cfg(
            "https://cloud.tsinghua.edu.cn/f/0d0330cf2e5249f1abb6/?dl=1", **_CFG_384
        ),
    }
)

_SMALL: dict[str, Any] = {"depths": (2, 2, 18, 2)}
_BASE: dict[str, Any] = {"depths": (2, 2, 18, 2), "embed_dim": 128, "num_heads": (4, 8, 16, 32)}
_BASE_384: dict[str, Any] = {**_BASE, "img_size": 384, "window_size": 12}
_FLATTEN = ("focused_linear", "focused_linear", "softmax", "softmax")


def _create_swin(variant: str, pretrained: bool, **kwargs: Any) -> SwinTransformer:
    return build(SwinTransformer, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def zoo_swin_tiny_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """Swin-T."""
    return _create_swin("zoo_swin_tiny_patch4_window7_224", pretrained, **kwargs)


@register_model
def zoo_swin_small_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """Swin-S."""
    return _create_swin("zoo_swin_small_patch4_window7_224", pretrained, **{**_SMALL, **kwargs})


@register_model
def zoo_swin_base_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """Swin-B."""
    return _create_swin("zoo_swin_base_patch4_window7_224", pretrained, **{**_BASE, **kwargs})


@register_model
def zoo_swin_base_patch4_window12_384(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """Swin-B at 384 pixels."""
    return _create_swin("zoo_swin_base_patch4_window12_384", pretrained, **{**_BASE_384, **kwargs})


@register_model
def zoo_flatten_swin_tiny(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """FLatten-Swin-T: focused linear attention over the whole grid in the first two stages."""
    return _create_swin("zoo_flatten_swin_tiny", pretrained, **own_attention(kwargs, _FLATTEN))


@register_model
def zoo_flatten_swin_small(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """FLatten-Swin-S: focused linear attention over the whole grid in the first two stages."""
    return _create_swin("zoo_flatten_swin_small", pretrained, **{**_SMALL, **own_attention(kwargs, _FLATTEN)})


@register_model
def zoo_flatten_swin_base(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """FLatten-Swin-B: focused linear attention over the whole grid in the first two stages."""
    return _create_swin("zoo_flatten_swin_base", pretrained, **{**_BASE, **own_attention(kwargs, _FLATTEN)})


@register_model
def zoo_flatten_swin_base_384(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """FLatten-Swin-B at 384 pixels: focused linear attention over the whole grid in the first two stages."""
    return _create_swin("zoo_flatten_swin_base_384", pretrained, **{**_BASE_384, **own_attention(kwargs, _FLATTEN)})
