"""Accuracies that the papers or their repositories publish: facts to choose a backbone by, not measured here."""

# ImageNet-1k top-1 in per cent, trained on ImageNet-1k alone, one crop at the default input size of the name. Left out:
# networks without published figures, figures that were only drawn, and PVT's, which belong to a network with a class
# token.
_BY_FAMILY = {
    "zoo_vit_{}_patch16_224": {"tiny": 72.2, "small": 79.8, "base": 81.8},  # DeiT, arXiv 2012.12877
    "zoo_uniformer_{}": {
        "small": 82.9,
        "small_plus": 83.4,
        "small_plus_dim64": 83.4,
        "base": 83.8,
        "base_ls": 83.9,
        "large_ls": 85.6,
        "small_tl": 83.4,
        "small_dim64_tl": 83.4,
        "small_plus_tl": 83.9,
        "small_plus_dim64_tl": 83.6,
        "base_tl": 85.1,
        "base_dim64_tl": 84.8,
        "xxs": 80.6,
        "xs": 82.0,
    },
    "zoo_shvit_{}": {"s1": 72.8, "s2": 75.2, "s3": 77.4, "s4": 79.4},
    "zoo_flatten_{}": {
        "pvt_tiny": 77.8,
        "pvt_v2_b0": 71.1,
        "swin_tiny": 82.1,
        "swin_small": 83.5,
        "swin_base": 83.8,
        "swin_base_384": 85.0,
        "cswin_tiny": 83.1,
    },
    "zoo_swin_{}": {
        "tiny_patch4_window7_224": 81.3,
        "small_patch4_window7_224": 83.0,
        "base_patch4_window7_224": 83.5,
        "base_patch4_window12_384": 84.5,
    },
    "zoo_pvt_v2_{}": {"b0": 70.5, "b1": 78.7, "b2": 82.0, "b3": 83.1, "b4": 83.6},
    "zoo_halonet_{}": {"h0": 77.9, "h1": 79.9, "h2": 80.4, "h3": 81.9, "h4": 83.3, "h5": 84.0, "h6": 84.4, "h7": 84.9},
    "zoo_halonet{}": {"26t": 79.1},  # timm's
    "zoo_lambda_resnet{}": {"50": 78.4, "26t": 79.1},  # the latter timm's
    "zoo_cswin_{}": {"tiny": 82.7, "small": 83.6, "base": 84.2, "base_384": 85.4},
}

PUBLISHED_TOP1 = {
    family.format(variant): top1 for family, variants in _BY_FAMILY.items() for variant, top1 in variants.items()
}


def published_top1(name: str, unknown: str = "-") -> str:
    """What to show of a backbone: the number, or `unknown`."""
    return f"{PUBLISHED_TOP1[name]:.1f}" if name in PUBLISHED_TOP1 else unknown
