"""The UniFormers trained with token labels: they classify every place of the last map as well.

UniFormer: Unifying Convolution and Self-attention for Visual Recognition - https://arxiv.org/abs/2201.09450
All Tokens Matter: Token Labeling for Training Better Vision Transformers - https://arxiv.org/abs/2104.10858
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from zoo.backbones.uniformer import BASE, CONV, SMALL_PLUS, UniFormer, cfg, create

_TL: dict[str, Any] = {"classifier": ("head", "aux_head")}
_LARGE: dict[str, Any] = {"depths": (5, 10, 24, 7), "embed_dims": (128, 192, 448, 640)}

default_cfgs = generate_default_cfgs(
    {
        "zoo_uniformer_large_ls.in1k": cfg("173e2qaJhOwbuC_DbNQSH47Oo_04mSfDj", **_TL),
        "zoo_uniformer_large_ls.in1k_384": cfg("174rcA6rNzYVG9Ya9ik-NwTGoxW1M79ez", 384, **_TL),
        "zoo_uniformer_small_tl.in1k": cfg("16wjfeyqQFZ2x9W91EXf0Py1bfv4Fydfr", **_TL),
        "zoo_uniformer_small_tl.in1k_384": cfg("16p4CXzuXC5J4_SJK67dsvnc8gTKmtKN1", 384, **_TL),
        "zoo_uniformer_small_dim64_tl.in1k": cfg("17NC5qqAWCT2gI_jY_cJnFTOqRQTSwsoz", **_TL),
        "zoo_uniformer_small_plus_tl.in1k": cfg("16rgtEVEeX3jVTQaiLsojBQP5sRaj_2aZ", **CONV, **_TL),
        "zoo_uniformer_small_plus_tl.in1k_384": cfg("16wJT87vTc43Dt1q2sXrxZRUuEdrNdFdk", 384, **CONV, **_TL),
        "zoo_uniformer_small_plus_dim64_tl.in1k": cfg("17OfoDWt2_nA0BYN0OuLPpG8mHJDTluQQ", **CONV, **_TL),
        "zoo_uniformer_base_tl.in1k": cfg("16nsTjawiYZuoCHBRarr58zA7vCFcmQmL", **_TL),
        "zoo_uniformer_base_tl.in1k_384": cfg("16kZlIarIwf9ldkCdHVKTQfFmDgfkucQ7", 384, **_TL),
        "zoo_uniformer_base_dim64_tl.in1k": cfg("17MneG9CnZG6zBvXYUr4WUXoTYc4rjJj5", **_TL),
    }
)


@register_model
def zoo_uniformer_large_ls(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-L with LayerScale in all stages, trained with token labels."""
    args = {**_LARGE, "init_values": 1e-6, "aux_head": True}
    return create(UniFormer, "zoo_uniformer_large_ls", pretrained, **{**args, **kwargs})


@register_model
def zoo_uniformer_small_tl(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-S with heads of 32, trained with token labels."""
    args = {"head_dim": 32, "aux_head": True}
    return create(UniFormer, "zoo_uniformer_small_tl", pretrained, **{**args, **kwargs})


@register_model
def zoo_uniformer_small_dim64_tl(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-S with heads of 64, trained with token labels."""
    return create(UniFormer, "zoo_uniformer_small_dim64_tl", pretrained, **{"aux_head": True, **kwargs})


@register_model
def zoo_uniformer_small_plus_tl(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-S with overlapping convolutions and heads of 32, trained with token labels."""
    args = {**SMALL_PLUS, "head_dim": 32, "aux_head": True}
    return create(UniFormer, "zoo_uniformer_small_plus_tl", pretrained, **{**args, **kwargs})


@register_model
def zoo_uniformer_small_plus_dim64_tl(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-S with overlapping convolutions and heads of 64, trained with token labels."""
    args = {**SMALL_PLUS, "aux_head": True}
    return create(UniFormer, "zoo_uniformer_small_plus_dim64_tl", pretrained, **{**args, **kwargs})


@register_model
def zoo_uniformer_base_tl(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-B with heads of 32, trained with token labels."""
    args = {**BASE, "head_dim": 32, "aux_head": True}
    return create(UniFormer, "zoo_uniformer_base_tl", pretrained, **{**args, **kwargs})


@register_model
def zoo_uniformer_base_dim64_tl(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-B with heads of 64, trained with token labels."""
    args = {**BASE, "aux_head": True}
    return create(UniFormer, "zoo_uniformer_base_dim64_tl", pretrained, **{**args, **kwargs})
