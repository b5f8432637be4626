"""HaloNet: a ResNet that mixes by attention of blocks to their surroundings, from the first stage on.

Scaling Local Self-Attention for Parameter Efficient Visual Backbones - https://arxiv.org/abs/2103.12731
"""

from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs, register_model

from zoo.backbones.attention_resnet import TIERED, AttentionResNet, cfg, create

_PAPER = {
    "paper_ids": "arXiv:2103.12731",
    "paper_name": "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
}
_SIDES = {"h0": 256, "h1": 256, "h2": 256, "h3": 320, "h4": 384, "h5": 448, "h6": 512, "h7": 600}

default_cfgs = generate_default_cfgs(
    {
        **{
            f"zoo_halonet_{size}.untrained": cfg(input_size=(3, side, side), crop_pct=0.95, **_PAPER)
            for size, side in _SIDES.items()
        },
        "zoo_halonet26t.a1h_in1k": cfg(
            url="https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-attn-weights/"
            "halonet26t_a1h_256-3083328c.pth",
            input_size=(3, 256, 256),
            crop_pct=0.95,
            origin_url="https://github.com/huggingface/pytorch-image-models",
            **_PAPER,
        ),
    }
)


def _create_halonet(
    size: str,
    pretrained: bool,
    kwargs: Mapping[str, Any],
    depth: int,
    expansion: float,
    block_size: int = 8,
    halo_size: int = 3,
    value_ratio: float = 1.0,
    final_dim: int = 0,
) -> AttentionResNet:
    """A member of the paper's family; its table gives `depth`, that of the third stage, and what follows.

    Agreed by the table of two public reimplementations: heads, blocks, halos, ratios, depths, final widths and image
    sizes. Reconstructed, until parameters and multiply-adds are the table's: queries and keys are as wide as the block
    (`value_ratio` widens values alone), queries have the stride of a block that halves the map while keys and values
    keep the whole map, BatchNorm and ReLU follow attention as they follow the convolution in a ResNet, and a 1x1
    convolution makes the shortcut wherever shapes differ.
    """
    own: dict[str, Any] = {
        "img_size": _SIDES[size],
        "depths": (3, 3, depth, 3),
        "expansion": expansion,
        "value_ratio": value_ratio,
        "num_heads": (4, 8, 8, 8),
        "mixers": ("halo",) * 4,
        "mixer_options": {"halo": {"block_size": block_size, "halo_size": halo_size}},
        "final_dim": final_dim,
    }
    return create(f"zoo_halonet_{size}", pretrained, own, **kwargs)


@register_model
def zoo_halonet_h0(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """HaloNet-H0, for images of 256 pixels."""
    return _create_halonet("h0", pretrained, kwargs, depth=7, expansion=0.5)


@register_model
def zoo_halonet_h1(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """HaloNet-H1, for images of 256 pixels."""
    return _create_halonet("h1", pretrained, kwargs, depth=10, expansion=1.0)


@register_model
def zoo_halonet_h2(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """HaloNet-H2, for images of 256 pixels."""
    return _create_halonet("h2", pretrained, kwargs, depth=11, expansion=1.25)


@register_model
def zoo_halonet_h3(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """HaloNet-H3, for images of 320 pixels."""
    return _create_halonet("h3", pretrained, kwargs, depth=12, expansion=1.5, block_size=10, final_dim=1024)


@register_model
def zoo_halonet_h4(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """HaloNet-H4, for images of 384 pixels."""
    return _create_halonet(
        "h4", pretrained, kwargs, depth=12, expansion=3.0, block_size=12, halo_size=2, final_dim=1280
    )


@register_model
def zoo_halonet_h5(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """HaloNet-H5, for images of 448 pixels."""
    return _create_halonet(
        "h5", pretrained, kwargs, depth=23, expansion=2.0, block_size=14, halo_size=2, value_ratio=2.5, final_dim=1536
    )


@register_model
def zoo_halonet_h6(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """HaloNet-H6, for images of 512 pixels."""
    return _create_halonet(
        "h6", pretrained, kwargs, depth=24, expansion=2.75, halo_size=4, value_ratio=3.0, final_dim=1536
    )


@register_model
def zoo_halonet_h7(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """HaloNet-H7, for images of 600 pixels.

    Its maps are 150, 75, 38 and 19 wide. The table counts them padded to whole blocks, 80, 40 and 20: 8 % more
    multiply-adds than there are here, where only attention pads, and masks what it pads.
    """
    return _create_halonet(
        "h7", pretrained, kwargs, depth=26, expansion=3.5, block_size=10, value_ratio=4.0, final_dim=2048
    )


@register_model
def zoo_halonet26t(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """timm's hybrid of 26 layers, which it trained: convolutions early, where maps are large, halos late.

    As timm's layer does, the map's border of zeros takes part in attention.
    """
    own: dict[str, Any] = {
        "img_size": 256,
        "stem_dims": TIERED,
        "depths": (2, 2, 2, 2),
        "mixers": ("conv", "conv", ("conv", "halo"), "halo"),
        "mixer_options": {"halo": {"block_size": 8, "halo_size": 2, "preset": "timm"}},
    }
    return create("zoo_halonet26t", pretrained, own, **kwargs)
