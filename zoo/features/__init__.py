"""Maps of any backbone of timm's at the levels that a head asks for."""

from zoo.features.networks import check_backbone_name, own_size, wants_size
from zoo.features.pyramid import FeaturePyramid, ceil, resize

__all__ = ["FeaturePyramid", "ceil", "check_backbone_name", "own_size", "resize", "wants_size"]
