"""Small forms of every `zoo_*` network, for tests that run over all of them.

By default narrow ones of one network of each kind; `-m slow` runs every registered name at its own width, with few
layers.
"""

import fnmatch

import pytest
import timm
import torch

import zoo  # noqa: F401  (registers the networks)

QUICK = (
    "zoo_vit_tiny_patch16_224",
    "zoo_vit_tiny_cb_patch16_224",
    "zoo_vit_tiny_cbs_patch16_224",
    "zoo_shvit_s1",
    "zoo_uniformer_small_tl",
    "zoo_uniformer_xxs",
    "zoo_attention_resnet50",
    "zoo_halonet_h0",
    "zoo_lambda_resnet50",
)
# Shallow, so that the whole registry fits in minutes; the first pattern that matches counts.
SHALLOW = {
    "zoo_vit_*": {"depth": 2},
    "zoo_shvit_*": {"depths": (1, 1, 1)},
    "zoo_uniformer_x*": {"depths": (1, 1, 2, 1)},
    "*": {"depths": (1, 1, 1, 1)},
}
NARROW_RESNET = {"stem_dims": (8,), "widths": (8, 8, 16, 16), "expansion": 2.0, "num_heads": (2, 2, 2, 2)}
NARROW = {
    "zoo_vit_*": {"patch_size": 8, "embed_dim": 24, "num_heads": 2, "mlp_ratio": 2.0},
    "zoo_shvit_*": {"embed_dims": (16, 24, 32), "partial_dims": (4, 6, 7)},
    "zoo_uniformer_*": {"embed_dims": (8, 16, 24, 32), "head_dim": 8},
    "zoo_attention_*": NARROW_RESNET,
    "zoo_halonet_*": {**NARROW_RESNET, "mixer_options": {"halo": {"block_size": 4, "halo_size": 2}}},
    "zoo_lambda_*": {**NARROW_RESNET, "mixer_options": {"lambda": {"kernel_size": 7}}},
}
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in timm.list_models("zoo_*")]
each = pytest.mark.parametrize("name", NAMES)
# Tracing takes seconds: by default only the kind with the most operations of its own.
traced = pytest.mark.parametrize(
    "name",
    [name if name == QUICK[2] else pytest.param(name, marks=pytest.mark.slow) for name in timm.list_models("zoo_*")],
)
# Two orders of the same float32 sums, over features of size 1 and a few layers.
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def options(name):
    few, narrow = (
        next(value for pattern, value in table.items() if fnmatch.fnmatch(name, pattern))
        for table in (SHALLOW, NARROW if name in QUICK else {"*": {}})
    )
    return {"img_size": 64, "num_classes": 5, **few, **narrow}


def stage_count(name):
    """How many maps there are to ask for: blocks of a ViT, stages of a pyramid."""
    return 2 if "depth" in options(name) else len(options(name)["depths"])


def create(name, **kwargs):
    torch.manual_seed(1)
    return timm.create_model(name, **{**options(name), **kwargs}).eval()


@torch.no_grad()
def shaken(model):
    """Moves every parameter off its start, where biases, scales and class tokens would hide mistakes."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def images(height=64, width=64, batch=2, channels=3):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(3))
