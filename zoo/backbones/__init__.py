"""Backbones; importing this registers them with timm."""

from zoo.backbones import (
    attention_resnet,
    cswin,
    halonet,
    lambda_resnet,
    pvt,
    pvt_v2,
    shvit,
    swin,
    uniformer,
    uniformer_light,
    uniformer_tl,
    vit,
    vit_cb,
)
from zoo.backbones._build import CHECKPOINT_KEYS, UnfitWeightsError
from zoo.backbones._vit_blocks import choose_attn_share

__all__ = [
    "CHECKPOINT_KEYS",
    "UnfitWeightsError",
    "attention_resnet",
    "choose_attn_share",
    "cswin",
    "halonet",
    "lambda_resnet",
    "pvt",
    "pvt_v2",
    "shvit",
    "swin",
    "uniformer",
    "uniformer_light",
    "uniformer_tl",
    "vit",
    "vit_cb",
]
