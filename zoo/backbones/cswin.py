"""CSWin Transformer with attention by name, and its FLatten form.

CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows - https://arxiv.org/abs/2107.00652
FLatten Transformer: Vision Transformer using Focused Linear Attention - https://arxiv.org/abs/2308.00442
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.backbones._build import build, unwrap
from zoo.backbones._checkpoint import fit, rename, stage_of
from zoo.backbones._pyramid import Embed, Place, Pyramid, flatten_cfg, pyramid_cfg
from zoo.backbones._staged import own_attention, per_stage

__all__ = ["CSWinTransformer"]


class CSWinTransformer(Pyramid):
    """CSWin Transformer for images of any size; see `Pyramid` for the sizes of its maps.

    Args:
        img_size: side, or (height, width), for which tables of positions are made, where an attention has one.
        embed_dim: channels of the first stage; every further one has twice as many.
        depths, num_heads, stripe_widths: one value a stage.
        stripe_widths: width of the stripes of softmax attention; None for one window over the whole grid.
        attn: attention by name, one for all stages or one a stage; None or "softmax" is softmax with locally enhanced
            positions in crossed stripes; any other one sees the whole grid of its stage, with locally enhanced
            positions if it knows them; "cross_window" means stripes over any `inner` mechanism.
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
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 32, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        stripe_widths: Sequence[int | None] = (1, 2, 7, None),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attn: str | Sequence[str | None] | None = None,
        attn_options: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        def attend(place: Place) -> nn.Module:
            name, options = "softmax" if place.name is None else place.name, place.options
            width = widths[place.stage]
            if name == "softmax" and width is not None:
                name, options = "cross_window", {"inner_options": options or {}}
            return place.create(name, options, lepe=3, **({} if width is None else {"stripe_width": width}))

        widths = per_stage("stripe_widths", stripe_widths, len(depths))
        dims = [embed_dim * 2**stage for stage in range(len(depths))]
        super().__init__(
            img_size=img_size,
            patch_size=4,
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
                Embed(in_chans, embed_dim, 7, 4, padding=2),
                *(Embed(dim, 2 * dim, 3, 2, padding=1) for dim in dims[:-1]),
            ],
            attend=attend,
            final_norm=True,
        )


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: CSWinTransformer) -> dict[str, Tensor]:
    """Weights of CSWin's, FLatten's and our files for this model."""
    state = rename(
        unwrap(state_dict),
        {
            r"^stage1_conv_embed\.0\.": "patch_embed.proj.",
            r"^stage1_conv_embed\.2\.": "patch_embed.norm.",
            r"^merge(\d)\.norm\.": stage_of("stages.", ".downsample.norm.", 0),
            r"^merge(\d)\.conv\.": stage_of("stages.", ".downsample.proj.", 0),
            r"^stage(\d)\.": stage_of("stages.", ".blocks."),
            r"^(stages\.\d\.blocks\.\d+)\.(qkv|proj|attns)\.": r"\1.attn.\2.",
            r"\.get_v\.": ".lepe.",
        },
    )
    own = model.state_dict().keys()
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if match := re.fullmatch(r"(.+\.attn)\.qkv\.(weight|bias)", key):
            branches = [f"{match[1]}.branches.{side}.qkv.{match[2]}" for side in (0, 1)]
            if branches[0] in own:
                out |= zip(branches, _halves(value), strict=True)
                continue
        branch = re.sub(r"\.attns\.(\d)\.", r".branches.\1.", key)
        out[branch if branch in own else re.sub(r"\.attns\.0\.", ".", key)] = value
    return fit(out, model)


def _halves(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [q | k | v] of all channels as the rows of the first and of the second half of q, k and v."""
    thirds = qkv.unflatten(0, (3, 2, -1))
    return thirds[:, 0].flatten(0, 1), thirds[:, 1].flatten(0, 1)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    own = {
        "license": "mit",
        "paper_ids": "arXiv:2107.00652",
        "paper_name": "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows",
        "origin_url": "https://github.com/microsoft/CSWin-Transformer",
    }
    return pyramid_cfg(**{**own, **kwargs})


_CFG_384: dict[str, Any] = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}

default_cfgs = generate_default_cfgs(
    {
        "zoo_cswin_tiny.in1k": _cfg(),
        "zoo_cswin_small.in1k": _cfg(),
        "zoo_cswin_base.in1k": _cfg(),
        "zoo_cswin_base_384.in1k": _cfg(**_CFG_384),
        "zoo_flatten_cswin_tiny.in1k": flatten_cfg("https://cloud.tsinghua.edu.cn/f/48ba765ba8b0451d9d5a/?dl=1"),
        "zoo_flatten_cswin_small": flatten_cfg(),
        "zoo_flatten_cswin_base": flatten_cfg(),
        "zoo_flatten_cswin_base_384": flatten_cfg(**_CFG_384),
    }
)

_SIZE_384: dict[str, Any] = {"img_size": 384, "stripe_widths": (1, 2, 12, None)}
_BASE: dict[str, Any] = {"embed_dim": 96, "num_heads": (4, 8, 16, 32)}
_FLATTEN_BASE: dict[str, Any] = {**_BASE, "depths": (3, 6, 29, 2)}
_FLATTEN = ("focused_linear", "focused_linear", "softmax", "softmax")


def _create_cswin(variant: str, pretrained: bool, **kwargs: Any) -> CSWinTransformer:
    return build(CSWinTransformer, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def zoo_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> CSWinTransformer:
    """CSWin-T."""
    return _create_cswin("zoo_cswin_tiny", pretrained, **{"depths": (1, 2, 21, 1), **kwargs})


@register_model
def zoo_cswin_small(pretrained: bool = False, **kwargs: Any) -> CSWinTransformer:
    """CSWin-S."""
    return _create_cswin("zoo_cswin_small", pretrained, **kwargs)


@register_model
def zoo_cswin_base(pretrained: bool = False, **kwargs: Any) -> CSWinTransformer:
    """CSWin-B."""
    return _create_cswin("zoo_cswin_base", pretrained, **{**_BASE, **kwargs})


@register_model
def zoo_cswin_base_384(pretrained: bool = False, **kwargs: Any) -> CSWinTransformer:
    """CSWin-B at 384 pixels."""
    return _create_cswin("zoo_cswin_base_384", pretrained, **{**_BASE, **_SIZE_384, **kwargs})


@register_model
def zoo_flatten_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> CSWinTransformer:
    """FLatten-CSWin-T: focused linear attention over the whole grid in the first two stages."""
    own = {"depths": (2, 4, 18, 1), **own_attention(kwargs, _FLATTEN)}
    return _create_cswin("zoo_flatten_cswin_tiny", pretrained, **own)


@register_model
def zoo_flatten_cswin_small(pretrained: bool = False, **kwargs: Any) -> CSWinTransformer:
    """FLatten-CSWin-S: focused linear attention over the whole grid in the first two stages."""
    return _create_cswin("zoo_flatten_cswin_small", pretrained, **own_attention(kwargs, _FLATTEN))


@register_model
def zoo_flatten_cswin_base(pretrained: bool = False, **kwargs: Any) -> CSWinTransformer:
    """FLatten-CSWin-B: focused linear attention over the whole grid in the first two stages."""
    own = {**_FLATTEN_BASE, **own_attention(kwargs, _FLATTEN)}
    return _create_cswin("zoo_flatten_cswin_base", pretrained, **own)


@register_model
def zoo_flatten_cswin_base_384(pretrained: bool = False, **kwargs: Any) -> CSWinTransformer:
    """FLatten-CSWin-B at 384 pixels: focused linear attention over the whole grid in the first two stages."""
    own = {**_FLATTEN_BASE, **_SIZE_384, **own_attention(kwargs, _FLATTEN)}
    return _create_cswin("zoo_flatten_cswin_base_384", pretrained, **own)
