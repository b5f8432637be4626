"""LambdaResNet: ResNets whose 3x3 convolutions are lambda layers, in all stages or in the last ones.

LambdaNetworks: Modeling Long-Range Interactions Without Attention - https://arxiv.org/abs/2102.08602
"""

from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model

from zoo.backbones.attention_resnet import TIERED, AttentionResNet, Pattern, cfg, create

_PAPER = {
    "paper_ids": "arXiv:2102.08602",
    "paper_name": "LambdaNetworks: Modeling Long-Range Interactions Without Attention",
}
_SIDES = {50: 224, 101: 224, 152: 256, 200: 256, 270: 256, 350: 288, 420: 320}

default_cfgs = generate_default_cfgs(
    {
        **{
            f"zoo_lambda_resnet{layers}.untrained": cfg(input_size=(3, side, side), **_PAPER)
            for layers, side in _SIDES.items()
        },
        "zoo_lambda_resnet26t.c1_in1k": cfg(
            url="https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-attn-weights/"
            "lambda_resnet26t_c_256-e5a5c857.pth",
            input_size=(3, 256, 256),
            crop_pct=0.94,
            origin_url="https://github.com/huggingface/pytorch-image-models",
            **_PAPER,
        ),
    }
)

_LAST_TWO: Sequence[Pattern] = ("conv", "conv", "lambda", "lambda")


def _create_lambda_resnet(
    layers: int,
    pretrained: bool,
    kwargs: Mapping[str, Any],
    depths: Sequence[int],
    mixers: Sequence[Pattern] = _LAST_TWO,
    se: bool = False,
) -> AttentionResNet:
    """A member of the family: keys of 16 channels, 4 heads, positions in 23 x 23 places, a stem of three convolutions
    and averages in shortcuts (ResNet-D).

    Only the parameters of 50, 152 and 200 layers are published by reimplementations; what the paper gives for 101,
    270, 350 and 420 is remembered with little certainty, and so are the image sizes. Which stages keep convolutions,
    and whether those blocks have squeeze and excitation, is reconstructed as the simplest choice whose parameters are
    the published or remembered ones. Depths are those of ResNet-RS.
    """
    own: dict[str, Any] = {
        "img_size": _SIDES[layers],
        "stem_dims": (32, 32, 64),
        "depths": depths,
        "num_heads": (4, 4, 4, 4),
        "mixers": mixers,
        # Without a stride of its own, for the 3x3 average that the paper strides by.
        "mixer_options": {"lambda": {"kernel_size": 23, "stride": 1}},
        "avg_down": True,
        "se": se,
    }
    return create(f"zoo_lambda_resnet{layers}", pretrained, own, **kwargs)


@register_model
def zoo_lambda_resnet50(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """LambdaResNet-50, lambda layers in all blocks: 15.0 M parameters, as published."""
    return _create_lambda_resnet(50, pretrained, kwargs, (3, 4, 6, 3), mixers=("lambda",) * 4)


@register_model
def zoo_lambda_resnet101(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """LambdaResNet-101, convolutions with squeeze and excitation in two stages, lambda layers in two: 25.9 M
    parameters, remembered as 26 M.
    """
    return _create_lambda_resnet(101, pretrained, kwargs, (3, 4, 23, 3), se=True)


@register_model
def zoo_lambda_resnet152(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """LambdaResNet-152, convolutions with squeeze and excitation in two stages, lambda layers in two: 35.0 M
    parameters, as published.
    """
    return _create_lambda_resnet(152, pretrained, kwargs, (3, 8, 36, 3), se=True)


@register_model
def zoo_lambda_resnet200(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """LambdaResNet-200, convolutions with squeeze and excitation in two stages, lambda layers in two: 41.6 M
    parameters, published as 42 M.
    """
    return _create_lambda_resnet(200, pretrained, kwargs, (3, 24, 36, 3), se=True)


@register_model
def zoo_lambda_resnet270(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """LambdaResNet-270, convolutions in two stages, lambda layers in two: 51.8 M parameters, remembered as 51 M."""
    return _create_lambda_resnet(270, pretrained, kwargs, (4, 29, 53, 4))


@register_model
def zoo_lambda_resnet350(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """LambdaResNet-350, convolutions in two stages, lambda layers in two: 64.6 M parameters, remembered as 64 M."""
    return _create_lambda_resnet(350, pretrained, kwargs, (4, 36, 72, 4))


@register_model
def zoo_lambda_resnet420(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """LambdaResNet-420, convolutions in three stages, lambda layers in the last: 122.8 M parameters, remembered,
    with the least certainty of all, as 124 M.
    """
    return _create_lambda_resnet(420, pretrained, kwargs, (4, 44, 87, 4), mixers=("conv", "conv", "conv", "lambda"))


@register_model
def zoo_lambda_resnet26t(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """timm's hybrid of 26 layers, which it trained: convolutions early, where maps are large, lambda layers late."""
    own: dict[str, Any] = {
        "img_size": 256,
        "stem_dims": TIERED,
        "depths": (2, 2, 2, 2),
        "num_heads": (4, 4, 4, 4),
        "mixers": ("conv", "conv", ("conv", "lambda"), "lambda"),
        "mixer_options": {"lambda": {"kernel_size": 9}},
    }
    return create("zoo_lambda_resnet26t", pretrained, own, **kwargs)
