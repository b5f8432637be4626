"""Vision Transformers with Context Broadcasting: after every MLP each token gains the mean of all.

Scratching Visual Transformer's Back with Uniform Attention - https://arxiv.org/abs/2210.08457
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from zoo.backbones.vit import BASE, SMALL, TINY, VisionTransformer, cfg, create


def _broadcast() -> dict[str, Any]:
    return cfg(
        paper_ids="arXiv:2210.08457",
        paper_name="Scratching Visual Transformer's Back with Uniform Attention",
        notes=("the authors released no weights; CB loads those of the plain ViT",),
    )


default_cfgs = generate_default_cfgs(
    {f"zoo_vit_{size}_{kind}_patch16_224": _broadcast() for kind in ("cb", "cbs") for size in ("tiny", "small", "base")}
)


@register_model
def zoo_vit_tiny_cb_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-Ti/16 with Context Broadcasting."""
    return create("zoo_vit_tiny_cb_patch16_224", pretrained, **{"cb": "cb", **TINY, **kwargs})


@register_model
def zoo_vit_small_cb_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-S/16 with Context Broadcasting."""
    return create("zoo_vit_small_cb_patch16_224", pretrained, **{"cb": "cb", **SMALL, **kwargs})


@register_model
def zoo_vit_base_cb_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-B/16 with Context Broadcasting."""
    return create("zoo_vit_base_cb_patch16_224", pretrained, **{"cb": "cb", **BASE, **kwargs})


@register_model
def zoo_vit_tiny_cbs_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-Ti/16 with Context Broadcasting and a learned scale."""
    return create("zoo_vit_tiny_cbs_patch16_224", pretrained, **{"cb": "cbs", **TINY, **kwargs})


@register_model
def zoo_vit_small_cbs_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-S/16 with Context Broadcasting and a learned scale."""
    return create("zoo_vit_small_cbs_patch16_224", pretrained, **{"cb": "cbs", **SMALL, **kwargs})


@register_model
def zoo_vit_base_cbs_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-B/16 with Context Broadcasting and a learned scale."""
    return create("zoo_vit_base_cbs_patch16_224", pretrained, **{"cb": "cbs", **BASE, **kwargs})
