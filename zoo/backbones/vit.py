"""Vision Transformer with attention by name, and Context Broadcasting.

An Image Is Worth 16x16 Words: Transformers for Image Recognition at Scale - https://arxiv.org/abs/2010.11929
Training data-efficient image transformers (DeiT), the origin of the weights - https://arxiv.org/abs/2012.12877
Scratching Visual Transformer's Back with Uniform Attention (CB) - https://arxiv.org/abs/2210.08457
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import (
    PatchEmbed,
    get_act_layer,
    get_norm_layer,
    global_pool_nlc,
    resample_patch_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.attention import SoftmaxAttention, attention_spec, with_defaults
from zoo.attention.base import undecayed
from zoo.backbones._build import build, fit_positions, imagenet_cfg, unwrap
from zoo.backbones._staged import attention_per_stage, check_num_classes, residual_attention
from zoo.backbones._vit_blocks import Block, SharingBlock, can_share, check_spans, split_shared
from zoo.errors import UsageError, unknown
from zoo.layers.position import TableResize

__all__ = ["VisionTransformer"]


class VisionTransformer(nn.Module):
    """Vision Transformer for images of any size.

    Images (B, in_chans, H, W) become a grid of ceil(H / patch) x ceil(W / patch) tokens: sides that the patch does not
    divide are padded with zeros, and the position table is resized to the grid.

    Args:
        img_size: side, or (height, width), for which the position table is made.
        patch_size: side, or (height, width), of a patch.
        attn: attention by name, one for all blocks or one a block; None is softmax attention.
        attn_options: options of the attention, of the same shape as `attn`.
        attn_share: spans [first, last] of blocks, from 0, that share the map of their first; the others of a span have
            no queries and keys. Only softmax attention is shared, and its map is kept in float32.
        cb: None, "cb" (Context Broadcasting) or "cbs" (with a learned scale).
        class_token: whether a class token is prepended; without it `global_pool` has to average.
        global_pool: "token", "avg", "avgmax", "max" or "" (tokens as they are).
        init_values: start of LayerScale; None for none.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: dropout before the classifier, after
            the positions, after projections, on attention weights, and of whole branches (rising linearly with depth).

    The other arguments are timm's.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        init_values: float | None = None,
        class_token: bool = True,
        attn: str | Sequence[str | None] | None = None,
        attn_options: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        attn_share: Sequence[Sequence[int]] | None = None,
        cb: str | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: str | Callable[..., nn.Module] | None = None,
        act_layer: str | Callable[..., nn.Module] | None = None,
    ):
        super().__init__()
        norm_layer = get_norm_layer(norm_layer) or partial(nn.LayerNorm, eps=1e-6)
        act_layer = get_act_layer(act_layer) or nn.GELU
        if min(*to_2tuple(patch_size), depth, *to_2tuple(img_size)) < 1:
            raise UsageError(f"patch_size={patch_size}, img_size={img_size} and depth={depth} must all be at least 1")
        if cb not in (None, "cb", "cbs"):
            raise unknown("cb", cb, ("cb", "cbs"))
        check_num_classes(num_classes)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1 if class_token else 0
        self.grad_checkpointing = False
        self._check_pool(global_pool)
        self.global_pool = global_pool

        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans, embed_dim, strict_img_size=False, dynamic_img_pad=True
        )
        self.patch_size = to_2tuple(patch_size)
        height, width = to_2tuple(img_size)
        self.grid_size = (-(-height // self.patch_size[0]), -(-width // self.patch_size[1]))
        tokens = self.grid_size[0] * self.grid_size[1] + self.num_prefix_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, embed_dim) * 0.02)
        self.resize_pos = TableResize(self.grid_size, self.num_prefix_tokens)
        self.pos_drop = nn.Dropout(pos_drop_rate)

        defaults = {
            "num_heads": num_heads,
            "qkv_bias": qkv_bias,
            "qk_norm": qk_norm,
            "attn_drop": attn_drop_rate,
            "proj_drop": proj_drop_rate,
        }
        names, options = attention_per_stage(attn, attn_options, depth, "blocks")
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.leaders = check_spans(attn_share, depth)
        self.blocks = nn.ModuleList()
        for index, (rate, name, of_block) in enumerate(zip(rates, names, options, strict=True)):
            attention = self._attention(name, of_block, defaults)
            rest = (mlp_ratio, proj_drop_rate, rate, init_values, cb, act_layer, norm_layer)
            if index in self.leaders:
                leads = self.leaders[index] == index
                softmax = can_share(attention, index, None if leads else self.blocks[self.leaders[index]])
                self.blocks.append(SharingBlock(embed_dim, softmax, leads, *rest))
            else:
                self.blocks.append(Block(embed_dim, attention, *rest))
        reduction = max(self.patch_size)
        self.feature_info = [
            {"module": f"blocks.{index}", "num_chs": embed_dim, "reduction": reduction} for index in range(depth)
        ]
        averages = global_pool in ("avg", "avgmax", "max")
        self.norm = nn.Identity() if averages else norm_layer(embed_dim)
        self.fc_norm = norm_layer(embed_dim) if averages else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights()

    def _attention(self, name: str | None, options: Mapping[str, Any] | None, defaults: dict[str, Any]) -> nn.Module:
        place: dict[str, Any] = {"grid_size": self.grid_size, "num_prefix_tokens": self.num_prefix_tokens}
        if name is None and options is None:
            return SoftmaxAttention(self.embed_dim, **defaults, **place)
        name = "softmax" if name is None else name
        if self.num_prefix_tokens and self.global_pool == "token" and attention_spec(name).prefix == "pass":
            raise UsageError(
                f"attention {name!r} hands the class token on unchanged, so nothing of the image would reach the "
                "classifier; use class_token=False, global_pool='avg'"
            )
        return residual_attention(name, self.embed_dim, **place, **with_defaults(name, options, defaults))

    def _check_pool(self, global_pool: str) -> None:
        if global_pool not in ("", "token", "avg", "avgmax", "max"):
            raise unknown("global_pool", global_pool, ("token", "avg", "avgmax", "max", ""))
        if global_pool == "token" and not self.num_prefix_tokens:
            raise UsageError("global_pool='token' needs the class token; with class_token=False use global_pool='avg'")

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Linear layers: truncated normal of std 0.02, biases 0; class token: normal of std 1e-6."""
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        tables = {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}
        return {"pos_embed", "cls_token"} | tables | undecayed(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Exchanges the classifier; `global_pool` may change only among poolings that share the final norm."""
        check_num_classes(num_classes)
        if global_pool is not None:
            self._check_pool(global_pool)
            averages = ("avg", "avgmax", "max")
            if (global_pool in averages) != (self.global_pool in averages):
                raise UsageError(
                    f"global_pool cannot change from {self.global_pool!r} to {global_pool!r}: the final norm sits "
                    "before the one and after the other; create the model with the global_pool you want"
                )
            self.global_pool = global_pool
        self.num_classes = num_classes
        device, dtype = self.pos_embed.device, self.pos_embed.dtype
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.head.to(device=device, dtype=dtype)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (B, in_chans, H, W) as tokens (B, P + h*w, C) with positions, and their grid (h, w)."""
        height, width = x.shape[-2:]
        grid = (
            (height + self.patch_size[0] - 1) // self.patch_size[0],
            (width + self.patch_size[1] - 1) // self.patch_size[1],
        )
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.pos_drop(x + self.resize_pos(self.pos_embed, grid)), grid

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> tokens (B, P + h*w, C) after the last norm."""
        x, grid = self.embed(x)
        weights: Tensor | None = None
        for block in self.blocks:
            weights = block.shared(x, weights)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, grid, weights)
            else:
                x = block(x, grid, weights)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, P + h*w, C) -> logits (B, num_classes), or features (B, C) if `pre_logits`."""
        x = global_pool_nlc(x, pool_type=self.global_pool, num_prefix_tokens=self.num_prefix_tokens)
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """What blocks answer, as timm's networks give it.

        Args:
            x: images (B, in_chans, H, W).
            indices: blocks to take: the last n, a list of indices, or None for all.
            return_prefix_tokens: also give the prefix tokens of each.
            norm: apply the final norm to each.
            stop_early: leave out the blocks after the last one taken.
            output_fmt: "NCHW" for maps (B, C, h, w), "NLC" for tokens (B, h*w, C).
            intermediates_only: give the intermediates alone, without the final tokens.
            output_dict: give a dict of image_features, image_intermediates (and image_intermediates_prefix).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise unknown("output_fmt", output_fmt, ("NCHW", "NLC"))
        take, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self.embed(x)
        taken, weights = [], None
        for index, block in enumerate(self.blocks):
            if index > last and stop_early:
                break
            weights = block.shared(x, weights)
            x = checkpoint(block, x, grid, weights) if self.grad_checkpointing else block(x, grid, weights)
            if index in take:
                taken.append(self.norm(x) if norm else x)
        return_prefix_tokens = return_prefix_tokens and self.num_prefix_tokens > 0
        prefix = [tokens[:, : self.num_prefix_tokens] for tokens in taken]
        maps = [tokens[:, self.num_prefix_tokens :] for tokens in taken]
        if output_fmt == "NCHW":
            maps = [tokens.transpose(1, 2).unflatten(2, grid).contiguous() for tokens in maps]
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": maps}
            if return_prefix_tokens:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        intermediates = list(zip(maps, prefix, strict=True)) if return_prefix_tokens else maps
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the blocks after the last one taken, and the norm and head on request."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0)
        return take


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: VisionTransformer) -> dict[str, Tensor]:
    """Weights of DeiT's, timm's and our files for this model; position table and patches are resampled to fit.

    A model without class token leaves that of the file out.

    Raises:
        UsageError: the grid of the file's position table cannot be told.
    """
    state = unwrap(state_dict)
    kernel = state.get("patch_embed.proj.weight", model.patch_embed.proj.weight).shape[-2:]
    prefix = 1 if "cls_token" in state else 0
    if model.cls_token is None:
        state.pop("cls_token", None)
    out = {}
    for key, value in state.items():
        if key == "patch_embed.proj.weight":
            size = model.patch_embed.proj.weight.shape
            if value.ndim < 4:
                value = value.reshape(size[0], -1, size[2], size[3])
            if value.shape[-2:] != size[-2:]:
                value = resample_patch_embed(value, list(size[-2:]), interpolation="bicubic", antialias=True)
        elif key == "pos_embed":
            value = value[:, prefix - min(prefix, model.num_prefix_tokens) :]
            value = fit_positions(value, model, model.grid_size, model.num_prefix_tokens, kernel)
        elif key.startswith("norm.") and isinstance(model.norm, nn.Identity):
            key = f"fc_{key}"
        out[key] = value
    return split_shared(out, model.leaders)


def cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    """The facts about a network, and the address of its weights where there is one."""
    own = {
        "url": url,
        "pool_size": None,
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return imagenet_cfg(**{**own, **kwargs})


def _deit(file: str) -> dict[str, Any]:
    return cfg(
        url=f"https://dl.fbaipublicfiles.com/deit/{file}",
        paper_ids="arXiv:2012.12877",
        paper_name="Training data-efficient image transformers & distillation through attention",
        origin_url="https://github.com/facebookresearch/deit",
    )


default_cfgs = generate_default_cfgs(
    {
        "zoo_vit_tiny_patch16_224.fb_in1k": _deit("deit_tiny_patch16_224-a1311bcf.pth"),
        "zoo_vit_small_patch16_224.fb_in1k": _deit("deit_small_patch16_224-cd65a155.pth"),
        "zoo_vit_base_patch16_224.fb_in1k": _deit("deit_base_patch16_224-b5f2ef4d.pth"),
    }
)


def create(variant: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    """A network of this family through timm."""
    return build(VisionTransformer, variant, pretrained, checkpoint_filter_fn, **{"out_indices": 3, **kwargs})


TINY = {"embed_dim": 192, "num_heads": 3}
SMALL = {"embed_dim": 384, "num_heads": 6}
BASE = {"embed_dim": 768, "num_heads": 12}


@register_model
def zoo_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-Ti/16 (DeiT-Ti weights)."""
    return create("zoo_vit_tiny_patch16_224", pretrained, **{**TINY, **kwargs})


@register_model
def zoo_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-S/16 (DeiT-S weights)."""
    return create("zoo_vit_small_patch16_224", pretrained, **{**SMALL, **kwargs})


@register_model
def zoo_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-B/16 (DeiT-B weights)."""
    return create("zoo_vit_base_patch16_224", pretrained, **{**BASE, **kwargs})
