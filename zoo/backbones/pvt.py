"""Pyramid Vision Transformer (PVT) with attention by name, and its FLatten form.

Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions - https://arxiv.org/abs/2102.12122
FLatten Transformer: Vision Transformer using Focused Linear Attention - https://arxiv.org/abs/2308.00442

As in FLatten, the mean over tokens is classified: no class token, and no norm after the last block (FLatten's files
hold one that is never applied; it is dropped on loading).
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.backbones._build import build, unwrap
from zoo.backbones._checkpoint import fit, rename, stage_of
from zoo.backbones._pyramid import Embed, Place, Pyramid, flatten_cfg, pyramid_cfg
from zoo.backbones._staged import own_attention, per_stage

__all__ = ["PyramidVisionTransformer"]


class PyramidVisionTransformer(Pyramid):
    """PVT for images of any size; see `Pyramid` for the sizes of its maps.

    Args:
        img_size: side, or (height, width), for which tables of positions are made.
        patch_size: side of a patch of the first stage.
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
        patch_size: int = 4,
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
            patch_size=patch_size,
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
                Embed(in_chans, embed_dims[0], patch_size, patch_size),
                *(Embed(before, after, 2, 2) for before, after in steps),
            ],
            attend=attend,
            norm_eps=1e-6,
            pos_embed=True,
        )


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: PyramidVisionTransformer) -> dict[str, Tensor]:
    """Weights of FLatten's and our files for this model."""
    state = rename(
        unwrap(state_dict),
        {
            r"^patch_embed1\.": "patch_embed.",
            r"^patch_embed(\d)\.": stage_of("stages.", ".downsample."),
            r"^pos_embed(\d)$": stage_of("stages.", ".pos_embed"),
            r"^block(\d)\.": stage_of("stages.", ".blocks."),
        },
    )
    return fit({key: value for key, value in state.items() if not key.startswith("norm.")}, model)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    own = {
        "paper_ids": "arXiv:2102.12122",
        "paper_name": "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions",
        "notes": ("no weights: PVT's own files belong to a network with a class token",),
    }
    return pyramid_cfg(**{**own, **kwargs})


default_cfgs = generate_default_cfgs(
    {
        "zoo_pvt_tiny": _cfg(),
        "zoo_pvt_small": _cfg(),
        "zoo_pvt_medium": _cfg(),
        "zoo_pvt_large": _cfg(),
        "zoo_flatten_pvt_tiny.in1k": flatten_cfg("https://cloud.tsinghua.edu.cn/f/3ab1d773f19d45648690/?dl=1"),
        "zoo_flatten_pvt_small": flatten_cfg(),
        "zoo_flatten_pvt_medium": flatten_cfg(),
        "zoo_flatten_pvt_large": flatten_cfg(),
    }
)

_SMALL = {"depths": (3, 4, 6, 3)}
_MEDIUM = {"depths": (3, 4, 18, 3)}
_LARGE = {"depths": (3, 8, 27, 3)}
_FLATTEN = ("focused_linear",) * 4


def _create_pvt(variant: str, pretrained: bool, **kwargs: Any) -> PyramidVisionTransformer:
    return build(PyramidVisionTransformer, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def zoo_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Tiny without class token."""
    return _create_pvt("zoo_pvt_tiny", pretrained, **kwargs)


@register_model
def zoo_pvt_small(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Small without class token."""
    return _create_pvt("zoo_pvt_small", pretrained, **{**_SMALL, **kwargs})


@register_model
def zoo_pvt_medium(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Medium without class token."""
    return _create_pvt("zoo_pvt_medium", pretrained, **{**_MEDIUM, **kwargs})


@register_model
def zoo_pvt_large(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Large without class token."""
    return _create_pvt("zoo_pvt_large", pretrained, **{**_LARGE, **kwargs})


@register_model
def zoo_flatten_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """FLatten-PVT-T: focused linear attention in all stages."""
    return _create_pvt("zoo_flatten_pvt_tiny", pretrained, **own_attention(kwargs, _FLATTEN))


@register_model
def zoo_flatten_pvt_small(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """FLatten-PVT-S: focused linear attention in all stages."""
    return _create_pvt("zoo_flatten_pvt_small", pretrained, **{**_SMALL, **own_attention(kwargs, _FLATTEN)})


@register_model
def zoo_flatten_pvt_medium(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """FLatten-PVT-M: focused linear attention in all stages."""
    return _create_pvt("zoo_flatten_pvt_medium", pretrained, **{**_MEDIUM, **own_attention(kwargs, _FLATTEN)})


@register_model
def zoo_flatten_pvt_large(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """FLatten-PVT-L: focused linear attention in all stages."""
    return _create_pvt("zoo_flatten_pvt_large", pretrained, **{**_LARGE, **own_attention(kwargs, _FLATTEN)})
