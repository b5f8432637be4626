"""Maps of any backbone of timm's at the levels that a head asks for."""

from zoo.features.networks import (
    BUILD_ERRORS,
    build,
    check_backbone_name,
    check_loaded,
    own_size,
    short,
    wants_size,
    weight_arguments,
)
from zoo.features.pyramid import FeaturePyramid, ceil, resize

__all__ = [
    "BUILD_ERRORS",
    "FeaturePyramid",
    "build",
    "ceil",
    "check_backbone_name",
    "check_loaded",
    "own_size",
    "resize",
    "short",
    "wants_size",
    "weight_arguments",
]
