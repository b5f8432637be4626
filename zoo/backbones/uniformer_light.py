"""UniFormer XXS and XS: the global stages attend among the half of the tokens that a class token looks at most.

UniFormer: Unifying Convolution and Self-attention for Visual Recognition - https://arxiv.org/abs/2201.09450
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.attention import SoftmaxAttention
from zoo.backbones._staged import linear_classifier, per_stage
from zoo.backbones.uniformer import LocalBlock, UniFormer, cfg, create
from zoo.errors import UsageError
from zoo.layers.conv_norm import ResidualConv
from zoo.layers.sdpa import dot_product_attention

__all__ = ["ShrinkingUniFormer"]


class ShrinkingBlock(nn.Module):
    """A global block that leaves half of the tokens out of attention and MLP.

    The tokens with the lowest scores are replaced by one, their mean weighted by the scores; what it gains, they all
    gain. A score is what the class token's weights were, of which every block blends its own in.

    Args:
        dim: channels.
        attn: softmax attention over tokens.
        mlp_ratio: widening in the MLP.
        proj_drop, drop_path: dropout of the MLP, and rate at which a branch is dropped.
        whole: keep all tokens and make the first scores.
    """

    def __init__(
        self,
        dim: int,
        attn: SoftmaxAttention,
        mlp_ratio: float,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        whole: bool = False,
    ):
        super().__init__()
        if attn.sr_ratio > 1 or attn.lepe is not None:
            raise UsageError("tokens that shrink have no grid: sr_ratio=1 and lepe=0 are the only ones that work here")
        self.whole = whole
        self.pos_embed = ResidualConv(dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, cls: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map x (B, dim, H, W), class token (B, 1, dim) and float32 scores (B, H*W) -> the same, gone on."""
        x = self.pos_embed(x)
        grid = (x.shape[2], x.shape[3])
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        if self.whole:
            mixed, row, _, _ = self.mix(torch.cat([cls, tokens], dim=1))
            # Dense, so that the next convolution finds a channels-last map.
            cls, tokens, score = mixed[:, :1], mixed[:, 1:].contiguous(), row[:, 1:]
        else:
            cls, tokens, score = self.shrink(cls, tokens, score)
        return tokens.transpose(1, 2).unflatten(2, grid), cls, score

    def shrink(self, cls: Tensor, tokens: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keep = tokens.shape[1] // 2
        order = score.argsort(dim=1, descending=True)
        score = score.gather(1, order)
        index = order.unsqueeze(2).expand(-1, -1, tokens.shape[2])
        tokens = tokens.gather(1, index)
        rest = tokens[:, keep:]
        # Scores of tokens that no one attends to may all be zero in float32, whose smallest normal is 1.2e-38.
        share = score[:, keep:] / score[:, keep:].sum(dim=1, keepdim=True).clamp_min(1e-37)
        stand_in = (rest * share.unsqueeze(2).to(rest.dtype)).sum(dim=1, keepdim=True)

        mixed, row, attended, fed = self.mix(torch.cat([cls, tokens[:, :keep], stand_in], dim=1))
        kept = mixed[:, 1 : keep + 1]
        # What the stand-in gains reaches the tokens that it stands for even where drop path silences it.
        rest = rest + attended[:, -1:] + fed[:, -1:]
        score = torch.cat([0.5 * score[:, :keep] + 0.5 * row[:, 1 : keep + 1], score[:, keep:]], dim=1)
        tokens = torch.cat([kept, rest.to(kept.dtype)], dim=1)
        tokens = torch.zeros_like(tokens).scatter(1, index, tokens)
        return mixed[:, :1], tokens, torch.zeros_like(score).scatter(1, order, score)

    def mix(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attention and MLP of tokens (B, N, dim), the class token first.

        Returns the tokens after both, the class token's weights (B, N) in float32, their mean over heads, and what each
        branch added before drop path.
        """
        q, k, v, _ = self.attn.project(self.norm1(tokens), None, None)
        drop = self.attn.attn_drop.p if self.training else 0.0
        attended = dot_product_attention(q, k, v, dropout_p=drop).transpose(1, 2).flatten(2)
        attended = self.attn.proj_drop(self.attn.proj(attended))
        # Products and a sum: autocast would give a matrix product a precision that changes the order.
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = (q[:, :, :1].to(wide) * k.to(wide)).sum(dim=-1) * self.attn.scale
        row = logits.softmax(dim=-1).mean(dim=1)
        tokens = tokens + self.drop_path1(attended)
        fed = self.mlp(self.norm2(tokens))
        return tokens + self.drop_path2(fed), row, attended, fed


class LocalStage(nn.Module):
    """A stage of `MapStage` that hands class token and scores on."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, cls: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.downsample(x)
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing and not torch.jit.is_scripting() else block(x)
        return x, cls, score


class ShrinkingStage(nn.Module):
    """Blocks over a map, a class token and scores.

    Args:
        downsample, cls_upsample: make the map smaller and the class token wider first.
        blocks: `ShrinkingBlock`s.
        pool: whether the scores leave for a map of half the size.
    """

    def __init__(self, downsample: nn.Module, cls_upsample: nn.Module, blocks: list[nn.Module], pool: bool):
        super().__init__()
        self.grad_checkpointing = False
        self.pool = pool
        self.downsample = downsample
        self.cls_upsample = cls_upsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, cls: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, cls = self.downsample(x), self.cls_upsample(cls)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, cls, score = checkpoint(block, x, cls, score)
            else:
                x, cls, score = block(x, cls, score)
        return x, cls, pool_scores(score, (x.shape[2], x.shape[3])) if self.pool else score


def pool_scores(score: Tensor, grid: tuple[int, int]) -> Tensor:
    """Scores (B, H*W) of a grid (H, W) as those (B, h*w) of its 2x2 cells, of the same sum.

    A cell that the edge cuts off has the mean of the places it has.
    """
    cells = score.reshape(-1, 1, grid[0], grid[1])
    small = F.avg_pool2d(cells, 2, ceil_mode=True, count_include_pad=False).flatten(1)
    return small * (score.sum(dim=1, keepdim=True) / small.sum(dim=1, keepdim=True).clamp_min(1e-37))


class ShrinkingUniFormer(UniFormer):
    """UniFormer whose global stages shrink their tokens, in training and evaluation alike.

    Every block of theirs but the very first keeps the better half of the tokens. Which half depends on the image, so
    the order of memory accesses does too; all shapes are fixed. Scores that nearly tie may fall out otherwise in
    another precision, and the answer with them: compare and export in float32.

    In training the logits are the mean of those of the pooled map and those of the class token; in evaluation the first
    alone, as the authors do it. `forward_auxiliary` gives both.

    The arguments are those of `UniFormer` without init_values and aux_head; the defaults are those of UniFormer-XXS.
    """

    def __init__(self, **kwargs: Any):
        for name in (name for name in ("init_values", "aux_head") if kwargs.get(name)):
            raise UsageError(f"a UniFormer that shrinks its tokens takes no {name}; those of other sizes do")
        own = {"embed_dims": (56, 112, 224, 448), "depths": (2, 5, 8, 2), "head_dim": 28}
        super().__init__(**{**own, "mlp_ratio": 3.0, "conv_stem": True, **kwargs})
        widths = [info["num_chs"] for info in self.feature_info]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, widths[2]))
        self.norm_cls: nn.Module = nn.LayerNorm(widths[3], eps=1e-5)

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
        if stage < 2:
            return LocalBlock(dim, attn, mlp_ratio, proj_drop, drop_path)
        assert isinstance(attn, SoftmaxAttention)
        return ShrinkingBlock(dim, attn, mlp_ratio, proj_drop, drop_path)

    def make_stage(
        self, stage: int, downsample: nn.Module, blocks: list[nn.Module], embed_dims: Sequence[int]
    ) -> nn.Module:
        if stage < 2:
            return LocalStage(downsample, blocks)
        if stage == 2:
            first = blocks[0]
            assert isinstance(first, ShrinkingBlock)
            first.whole = True
            return ShrinkingStage(downsample, nn.Identity(), blocks, pool=True)
        return ShrinkingStage(downsample, nn.Linear(embed_dims[2], embed_dims[3]), blocks, pool=False)

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        super()._set_head(num_classes, global_pool)
        self.head_cls = linear_classifier(self.head_hidden_size, num_classes) if num_classes else None

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The classifiers of the pooled map and of the class token."""
        return self.head if self.head_cls is None else (self.head, self.head_cls)

    def start(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first map of images x, the class token (B, 1, C), and no scores yet."""
        x = self.patch_embed(x)
        # A copy, not a view of the parameter: torch's counter of operations takes that for a sign of gradients.
        cls = self.cls_token.repeat(x.shape[0], 1, 1)
        return x, cls, torch.zeros(1, 0, device=x.device)

    def walk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the last stage answers to images x: its map, and the class token (B, 1, C)."""
        x, cls, score = self.start(x)
        for stage in self.stages:
            x, cls, score = stage(x, cls, score)
        return x, cls

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> map (B, num_features, h, w)."""
        return self.norm(self.walk(x)[0])

    def forward(self, x: Tensor) -> Tensor:
        x, cls = self.walk(x)
        logits = self.forward_head(self.norm(x))
        if self.training and self.head_cls is not None:
            logits = 0.5 * (logits + self.head_cls(self.norm_cls(cls[:, 0])))
        return logits

    @torch.jit.ignore
    def forward_auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, in_chans, H, W) -> logits (B, classes) of the pooled map, and those of the class token.

        The authors train both alike: the mean of the two losses.

        Raises:
            UsageError: the network has no classifier.
        """
        if self.head_cls is None:
            raise UsageError("this network has no classifier: give num_classes")
        x, cls = self.walk(x)
        return self.forward_head(self.norm(x)), self.head_cls(self.norm_cls(cls[:, 0]))

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages after the last one taken; the norms and heads go with them, or on request."""
        whole = len(self.stages)
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_norm or len(self.stages) < whole:
            self.norm_cls = nn.Identity()
        return take

    @torch.jit.ignore
    def stage_maps(self, x: Tensor, count: int) -> list[Tensor]:
        """What each of the first `count` stages answers to images x."""
        (x, cls, score), maps = self.start(x), []
        for stage in list(self.stages)[:count]:
            x, cls, score = stage(x, cls, score)
            maps.append(x)
        return maps


def _create(variant: str, pretrained: bool, **kwargs: Any) -> UniFormer:
    names = per_stage("attn", kwargs.get("attn"), 4)
    # Scores are weights of softmax attention; with another mechanism there is no class token, and nothing shrinks.
    if all(name in (None, "softmax") for name in names[2:]):
        return create(ShrinkingUniFormer, variant, pretrained, **kwargs)
    return create(UniFormer, variant, pretrained, **{"conv_stem": True, "mlp_ratio": 3.0, **kwargs})


def _cfg(file: str, side: int) -> dict[str, Any]:
    return cfg(file, side, first_conv="patch_embed.0.conv", classifier=("head", "head_cls"))


default_cfgs = generate_default_cfgs(
    {
        "zoo_uniformer_xxs.in1k": _cfg("1Cw9r_3c30N-esFI8RFYa6rQXJrr1rAHY", 224),
        "zoo_uniformer_xxs.in1k_192": _cfg("1CjrCEnZCk2aLrN7nVG8vFvu3FAUL4_Y_", 192),
        "zoo_uniformer_xxs.in1k_160": _cfg("1CsXCzfVFPyM2mY8BA_1fO3q_VBngnF44", 160),
        "zoo_uniformer_xxs.in1k_128": _cfg("1Cr7uB5hUck1BHioEROWZjfLpYRwg4Zps", 128),
        "zoo_uniformer_xs.in1k": _cfg("1CwQ91fjuAu3Rhn3zV4vjAmQ8v36AfYPT", 224),
        "zoo_uniformer_xs.in1k_192": _cfg("1Ce2Dk9-k_-sHt5dXp-gfNOEK37Jdcffv", 192),
    }
)


@register_model
def zoo_uniformer_xxs(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-XXS; it shrinks tokens unless a global stage is given another attention than softmax."""
    args = {"embed_dims": (56, 112, 224, 448), "depths": (2, 5, 8, 2), "head_dim": 28}
    return _create("zoo_uniformer_xxs", pretrained, **{**args, **kwargs})


@register_model
def zoo_uniformer_xs(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    """UniFormer-XS; it shrinks tokens unless a global stage is given another attention than softmax."""
    args = {"embed_dims": (64, 128, 256, 512), "depths": (3, 5, 9, 3), "head_dim": 32}
    return _create("zoo_uniformer_xs", pretrained, **{**args, **kwargs})
