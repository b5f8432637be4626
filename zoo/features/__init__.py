"""Maps of any backbone of timm's at the levels that a head asks for."""

from zoo.features.networks import (
    BUILD_ERRORS,
    build,
    check_backbone_name,
    check_loaded,
    checked_options,
    own_size,
    short,
    wants_size,
    weight_arguments,
)
from zoo.features.pyramid import FeaturePyramid, as_map, ceil, layout_of, resize

__all__ = [
    "BUILD_ERRORS",
    "FeaturePyramid",
    "as_map",
    "build",
    "ceil",
    "check_backbone_name",
    "check_loaded",
    "checked_options",
    "layout_of",
    "own_size",
    "resize",
    "short",
    "wants_size",
    "weight_arguments",
]
