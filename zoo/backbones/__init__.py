"""Backbones; importing this registers them with timm."""

from zoo.backbones import vit

__all__ = ["vit"]
