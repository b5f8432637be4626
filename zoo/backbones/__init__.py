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

__all__ = [
    "CHECKPOINT_KEYS",
    "UnfitWeightsError",
    "attention_resnet",
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
