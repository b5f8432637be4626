"""Backbones; importing this registers them with timm."""

from zoo.backbones import cswin, pvt, pvt_v2, shvit, swin, uniformer, uniformer_light, uniformer_tl, vit

__all__ = ["cswin", "pvt", "pvt_v2", "shvit", "swin", "uniformer", "uniformer_light", "uniformer_tl", "vit"]
