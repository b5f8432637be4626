"""UniFormer: depthwise convolutions gather locally in two stages, softmax attention globally in two more.

UniFormer: Unifying Convolution and Self-attention for Visual Recognition - https://arxiv.org/abs/2201.09450
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerScale, LayerScale2d, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.attention import LocalRelationAttention, attention_spec, with_defaults
from zoo.attention.base import undecayed
from zoo.backbones._build import build, imagenet_cfg, unwrap
from zoo.backbones._checkpoint import rename, stage_of
from zoo.backbones._pyramid import Embed
from zoo.backbones._staged import (
    MapStage,
    StagedNetwork,
    attention_per_stage,
    linear_classifier,
    per_stage,
    residual_attention,
    stage_grids,
)
from zoo.errors import UsageError
from zoo.layers.conv_norm import ConvNorm, ResidualConv, absorb_norm, fuse_children

__all__ = ["UniFormer"]


class LocalBlock(nn.Module):
    """Depthwise positions, attention and MLP over maps (B, dim, H, W), each residual, BatchNorm before the last two."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float | None = None,
    ):
        super().__init__()
        self.pos_embed = ResidualConv(dim)
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = attn
        self.ls1 = LayerScale2d(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, use_conv=True)
        self.ls2 = LayerScale2d(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    @torch.jit.ignore
    def fuse(self) -> "LocalBlock":
        """Folds the residual convolution into one, and norms into the 1x1 convolutions after them, in place."""
        self.eval()
        fuse_children(self)
        if isinstance(self.norm1, nn.BatchNorm2d) and isinstance(self.attn, LocalRelationAttention):
            absorb_norm(self.norm1, self.attn.v)
            self.norm1 = nn.Identity()  # type: ignore[assignment]
        if isinstance(self.norm2, nn.BatchNorm2d):
            absorb_norm(self.norm2, self.mlp.fc1)
            self.norm2 = nn.Identity()  # type: ignore[assignment]
        return self


class GlobalBlock(nn.Module):
    """Depthwise positions over maps (B, dim, H, W); attention and MLP over their tokens, LayerNorm before them."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float | None = None,
    ):
        super().__init__()
        self.pos_embed = ResidualConv(dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x)
        grid = (x.shape[2], x.shape[3])
        # Views both ways: an Embed leaves maps whose memory is channels last, and convolutions keep that.
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), grid)))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x.transpose(1, 2).unflatten(2, grid)


class UniFormer(StagedNetwork):
    """UniFormer for images of any size: stages of reduction 4, 8, 16 and 32.

    A side that a patch does not divide is padded with zeros on the right and at the bottom.

    Args:
        img_size: side, or (height, width), for which tables of positions are made, where an attention has one.
        embed_dims, depths: channels and blocks of the four stages.
        head_dim: channels of one head of attention.
        mlp_ratio: widening in MLPs.
        qkv_bias: biases in the projections to queries, keys and values.
        conv_stem: two overlapping convolutions with BatchNorm as the stem, instead of patches with LayerNorm.
        conv_down: an overlapping one with BatchNorm before the other stages.
        init_values: start of LayerScale, one for all stages or one a stage; None for none.
        aux_head: a classifier of every place of the last map as well, made for token labelling; the logits then are
            those of the pooled map and half of the largest of all places.
        attn: attention by name, one for all stages or one a stage; None is the paper's own, `local_relation` in the
            first two stages and `softmax` in the others.
        attn_options: its options, of the same shape as `attn`.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: dropout before the classifier, after
            the stem, after projections, on attention weights, and of whole branches (rising linearly with depth).

    The other arguments are timm's.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 8, 3),
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        conv_stem: bool = False,
        conv_down: bool = False,
        init_values: float | Sequence[float | None] | None = None,
        aux_head: bool = False,
        attn: str | Sequence[str | None] | None = None,
        attn_options: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        count = len(depths)
        names, options = attention_per_stage(attn, attn_options, count)
        embed_dims = per_stage("embed_dims", embed_dims, count)
        scales = per_stage("init_values", init_values, count)
        grids = stage_grids(img_size, 4, count)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        defaults = {"qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}

        self.patch_embed = _stem(in_chans, embed_dims[0], conv_stem)
        for stage, dim in enumerate(embed_dims):
            local = stage < 2
            own = "local_relation" if local else "softmax"
            given = names[stage]
            name = own if given is None else given
            heads = {"num_heads": _heads(name, options[stage] or {}, dim, head_dim)}
            merged = with_defaults(name, options[stage], {**defaults, **heads})
            blocks = []
            for rate in rates[stage]:
                layout = "map" if local else "tokens"
                mixer = residual_attention(name, dim, layout=layout, grid_size=grids[stage], **merged)
                blocks.append(self.make_block(stage, dim, mixer, mlp_ratio, proj_drop_rate, rate, scales[stage]))
            down = _downsample(embed_dims[stage - 1], dim, conv_down) if stage else nn.Dropout(pos_drop_rate)
            self.stages.append(self.make_stage(stage, down, blocks, embed_dims))
        self.feature_info = [
            {"module": f"stages.{stage}", "num_chs": dim, "reduction": 4 * 2**stage}
            for stage, dim in enumerate(embed_dims)
        ]
        self.norm = nn.BatchNorm2d(embed_dims[-1])
        self.has_aux_head = aux_head
        self.make_head(embed_dims[-1], num_classes, global_pool, drop_rate)
        self.init_weights()

    def make_block(
        self,
        stage: int,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        proj_drop: float,
        drop_path: float,
        init_values: float | None,
    ) -> nn.Module:
        kind = LocalBlock if stage < 2 else GlobalBlock
        return kind(dim, attn, mlp_ratio, proj_drop, drop_path, init_values)

    def make_stage(
        self, stage: int, downsample: nn.Module, blocks: list[nn.Module], embed_dims: Sequence[int]
    ) -> nn.Module:
        return MapStage(downsample, blocks)

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        super()._set_head(num_classes, global_pool)
        both = self.has_aux_head and num_classes > 0
        self.aux_head = linear_classifier(self.head_hidden_size, num_classes) if both else None

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The classifier; with an auxiliary one, both."""
        return self.head if self.aux_head is None else (self.head, self.aux_head)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Linear layers: truncated normal of std 0.02, biases 0; convolutions as torch starts them."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        tables = ("relative_position_bias_table", "cls_token")
        return {name for name, _ in self.named_parameters() if name.endswith(tables)} | undecayed(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [
            (r"^stages\.(\d+)\.(?:downsample|cls_upsample)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed|^cls_token", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (B, num_features, h, w) -> logits (B, num_classes), or features (B, num_features) if `pre_logits`."""
        features = self.head_drop(self.global_pool(x))
        if pre_logits:
            return features
        logits = self.head(features)
        if self.aux_head is not None:
            logits = logits + 0.5 * self.aux_head(x.flatten(2).transpose(1, 2)).amax(dim=1)
        return logits

    @torch.jit.ignore
    def forward_auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What token labelling trains: images (B, in_chans, H, W) -> logits (B, classes) of the pooled map alone, and
        (B, h*w, classes) of every place, row by row.

        Raises:
            UsageError: the network has no auxiliary head.
        """
        if self.aux_head is None:
            raise UsageError("this network has no auxiliary head; those of the zoo_uniformer_*_tl do, or aux_head=True")
        x = self.forward_features(x)
        return self.head(self.forward_head(x, pre_logits=True)), self.aux_head(x.flatten(2).transpose(1, 2))


def _stem(in_chans: int, dim: int, conv: bool) -> nn.Module:
    if not conv:
        return Embed(in_chans, dim, 4, 4)
    first = ConvNorm(in_chans, dim // 2, 3, stride=2, bias=True)
    return nn.Sequential(first, nn.GELU(), ConvNorm(dim // 2, dim, 3, stride=2, bias=True))


def _downsample(before: int, after: int, conv: bool) -> nn.Module:
    return ConvNorm(before, after, 3, stride=2, bias=True) if conv else Embed(before, after, 2, 2)


def _heads(name: str, options: Mapping[str, Any], dim: int, head_dim: int) -> int:
    if "num_heads" in attention_spec(name).options and "num_heads" not in options and dim % head_dim:
        raise UsageError(f"head_dim={head_dim} does not divide the {dim} channels of a stage; give a divisor")
    return max(1, dim // head_dim)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights of the authors' (all of their image models) and our files for this model."""
    rules: Mapping[str, Any] = {
        r"^patch_embed1\.proj\.0\.": "patch_embed.0.conv.",
        r"^patch_embed1\.proj\.1\.": "patch_embed.0.bn.",
        r"^patch_embed1\.proj\.3\.": "patch_embed.2.conv.",
        r"^patch_embed1\.proj\.4\.": "patch_embed.2.bn.",
        r"^patch_embed1\.": "patch_embed.",
        r"^patch_embed(\d)\.proj\.0\.": stage_of("stages.", ".downsample.conv."),
        r"^patch_embed(\d)\.proj\.1\.": stage_of("stages.", ".downsample.bn."),
        r"^patch_embed(\d)\.": stage_of("stages.", ".downsample."),
        r"^blocks(\d)\.": stage_of("stages.", ".blocks."),
        r"\.conv1\.": ".attn.v.",
        r"\.conv2\.": ".attn.proj.",
        r"\.attn\.(weight|bias)$": r".attn.affinity.\1",
        r"\.gamma_([12])$": r".ls\1.gamma",
        r"^cls_upsample\.": "stages.3.cls_upsample.",
    }
    state = rename(unwrap(state_dict), rules)
    return {key: value.flatten() if key.endswith(".gamma") else value for key, value in state.items()}


_PAPER = ("arXiv:2201.09450", "UniFormer: Unifying Convolution and Self-attention for Visual Recognition")
_DRIVE = "https://drive.google.com/file/d/"


def cfg(file: str, side: int = 224, **kwargs: Any) -> dict[str, Any]:
    """The facts about a file of the authors; their links open a page, so that no `url` is a direct one."""
    own = {
        "input_size": (3, side, side),
        "pool_size": (side // 32, side // 32),
        "crop_pct": 0.875,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": _PAPER[0],
        "paper_name": _PAPER[1],
        "origin_url": f"{_DRIVE}{file}/view?usp=sharing",
    }
    return imagenet_cfg(**{**own, **kwargs})


CONV: dict[str, Any] = {"first_conv": "patch_embed.0.conv"}

default_cfgs = generate_default_cfgs(
    {
        "zoo_uniformer_small.in1k": cfg("1-uepH3Q3BhTmWU6HK-sGAGQC_MpfIiPD"),
        "zoo_uniformer_small_plus.in1k": cfg("10IN5ULcjz0Ld_lDokkTGOSmRFXLzUkEs", **CONV),
        "zoo_uniformer_small_plus_dim64.in1k": cfg("178ipRvMBKeAP_Fzy6fEr2HQkIQWdgEY6", **CONV),
        "zoo_uniformer_base.in1k": cfg("1-wT39QazTGELxgrQIu6J12D3qcla3hui"),
        "zoo_uniformer_base_ls.in1k": cfg("10FnwzMVgGL8bPO3EMZ7oG4vDvqnPoBK5"),
    }
)

SMALL_PLUS: dict[str, Any] = {"depths": (3, 5, 9, 3), "conv_stem": True, "conv_down": True}
BASE: dict[str, Any] = {"depths": (5, 8, 20, 7)}


def create(cls: type[nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """A network of this family through timm."""
    return build(cls, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def zoo_uniformer_small(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-S."""
    return create(UniFormer, "zoo_uniformer_small", pretrained, **kwargs)


@register_model
def zoo_uniformer_small_plus(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-S with overlapping convolutions, one block more, and heads of 32."""
    args = {**SMALL_PLUS, "head_dim": 32}
    return create(UniFormer, "zoo_uniformer_small_plus", pretrained, **{**args, **kwargs})


@register_model
def zoo_uniformer_small_plus_dim64(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-S with overlapping convolutions, one block more, and heads of 64."""
    return create(UniFormer, "zoo_uniformer_small_plus_dim64", pretrained, **{**SMALL_PLUS, **kwargs})


@register_model
def zoo_uniformer_base(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-B."""
    return create(UniFormer, "zoo_uniformer_base", pretrained, **{**BASE, **kwargs})


@register_model
def zoo_uniformer_base_ls(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-B with LayerScale in the global stages."""
    args = {**BASE, "init_values": (None, None, 1e-6, 1e-6)}
    return create(UniFormer, "zoo_uniformer_base_ls", pretrained, **{**args, **kwargs})
