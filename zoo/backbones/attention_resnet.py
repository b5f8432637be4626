"""ResNet whose spatial mixing is named: a 3x3 convolution or any attention mechanism, stage by stage or block by block.

Deep Residual Learning for Image Recognition - https://arxiv.org/abs/1512.03385; attention in the place of its 3x3
convolutions as in HaloNet - https://arxiv.org/abs/2103.12731 and LambdaNetworks - https://arxiv.org/abs/2102.08602
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.layers import DropPath, SqueezeExcite, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.attention import Attention, attention_spec, create_attention, with_defaults
from zoo.attention.base import undecayed
from zoo.backbones._build import build, imagenet_cfg, unwrap
from zoo.backbones._checkpoint import rename
from zoo.backbones._staged import MapStage, StagedNetwork, attention_per_stage, per_stage, stage_grids
from zoo.errors import UsageError
from zoo.layers.conv_norm import ConvNorm

__all__ = ["AttentionResNet"]

CONV = "conv"
Pattern = str | Sequence[str | None] | None
# Three 3x3 convolutions of rising width, timm's stem of its "t" networks.
TIERED = (24, 32, 64)


class AttentionNorm(nn.Module):
    """Attention, what its stride leaves to do, and BatchNorm: maps (B, dim, H, W) -> (B, dim_out, H', W').

    Args:
        attn: attention over maps.
        pool: stride of a 3x3 average after it, for a mechanism that has no stride of its own; 1 for none. The average
            is of places inside the map alone, and H' = ceil(H / pool).
    """

    def __init__(self, attn: Attention, pool: int = 1):
        super().__init__()
        self.attn = attn
        self.pool = nn.AvgPool2d(3, pool, padding=1, count_include_pad=False) if pool > 1 else nn.Identity()
        self.bn = nn.BatchNorm2d(attn.dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.pool(self.attn(x)))


class Bottleneck(nn.Module):
    """x + three layers: 1x1 convolution, spatial mixing, 1x1 convolution, each with its BatchNorm; ReLU between them.

    Maps (B, dim, H, W) -> (B, dim_out, H', W').

    Args:
        dim, width, dim_out: channels of x, those that are mixed, those of the answer.
        mixer: what mixes, strided where the block is: a `ConvNorm` or an `AttentionNorm` over `width` channels.
        mixed: channels of its answer.
        shortcut: what makes x the answer's shape.
        se: squeeze and excitation of the answer.
        drop_path: rate at which the three layers are dropped in training.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        dim_out: int,
        mixer: nn.Module,
        mixed: int,
        shortcut: nn.Module,
        se: bool = False,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.conv1 = ConvNorm(dim, width)
        self.mixer = mixer
        self.conv3 = ConvNorm(mixed, dim_out)
        self.se = SqueezeExcite(dim_out, 0.25) if se else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.shortcut = shortcut
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.conv1(x))
        out = self.act(self.mixer(out))
        out = self.se(self.conv3(out))
        return self.act(self.shortcut(x) + self.drop_path(out))


class AttentionResNet(StagedNetwork):
    """ResNet of bottleneck blocks for images of any size: stages of reduction 4, 8, 16 and 32.

    Args:
        img_size: side, or (height, width), for which tables of positions are made, where an attention has one.
        stem_dims: channels of the stem's convolutions: one 7x7, or several 3x3; the first has a stride of 2, and a
            3x3 maximum of stride 2 follows.
        widths: channels of each stage that are mixed.
        depths: blocks of each stage.
        expansion: channels of each stage's answer, in `widths`.
        value_ratio: channels that attention answers, in `widths`, where the mechanism can answer other than it takes.
        num_heads: heads of each stage, for mechanisms that have some.
        mixers: the network's own mixing of every stage, "conv" or an attention: a name for all of its blocks, or
            names that its blocks take in turn.
        mixer_options: options of the network's own mechanisms, by their names; `attn_options` go first.
        avg_down: a 2x2 average before the 1x1 convolution of shortcuts, instead of its stride.
        se: squeeze and excitation in the blocks that mix with convolutions.
        final_dim: channels of a 1x1 convolution after the stages; 0 for none.
        attn: mixing by name, "conv" or an attention: one for all blocks that attend in `mixers`, or one a stage, where
            None keeps the stage's own. A stage's is a name, for its blocks that attend or for all if there are none,
            or names that its blocks take in turn.
        attn_options: options of attention, one mapping for all stages or one a stage.
        drop_rate, drop_path_rate: dropout before the classifier, and of whole blocks (rising linearly with depth).

    The other arguments are timm's.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_dims: Sequence[int] = (64,),
        widths: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        expansion: float = 4.0,
        value_ratio: float = 1.0,
        num_heads: Sequence[int] = (8, 8, 8, 8),
        mixers: Sequence[Pattern] = (CONV, CONV, "softmax", "softmax"),
        mixer_options: Mapping[str, Mapping[str, Any]] | None = None,
        avg_down: bool = False,
        se: bool = False,
        final_dim: int = 0,
        attn: str | Sequence[Pattern] | None = None,
        attn_options: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        names, (_, options) = _names(attn, mixers, depths), attention_per_stage(None, attn_options, len(depths))
        widths, num_heads = per_stage("widths", widths, len(depths)), per_stage("num_heads", num_heads, len(depths))
        if not stem_dims or min(*stem_dims, *widths, *depths, *num_heads) < 1:
            raise UsageError(
                f"stem_dims={stem_dims}, widths={widths}, depths={depths}, num_heads={num_heads}; all at least 1"
            )
        for name in mixer_options or {}:
            attention_spec(name)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        grids = stage_grids(img_size, 4, len(depths))
        self.patch_embed = _stem(in_chans, stem_dims)
        dim = stem_dims[-1]
        for stage, width in enumerate(widths):
            dim_out = int(width * expansion)
            blocks: list[nn.Module] = []
            for index, name in enumerate(names[stage]):
                stride = 2 if stage and not index else 1
                own = {
                    "num_heads": num_heads[stage],
                    "dim_head": width // num_heads[stage],
                    "dim_out": int(width * value_ratio),
                    "stride": stride,
                    # The block's last convolution projects what attention answers.
                    "proj": False,
                }
                given = {**(mixer_options or {}).get(name, {}), **(options[stage] or {})}
                # The first block of a strided stage still sees the map of the stage before.
                grid = grids[stage - 1] if stride > 1 else grids[stage]
                mixer, mixed = _mixer(name, width, stride, grid, own, given)
                shortcut = _shortcut(dim, dim_out, stride, avg_down)
                excite = se and name == CONV
                blocks.append(Bottleneck(dim, width, dim_out, mixer, mixed, shortcut, excite, rates[stage][index]))
                dim = dim_out
            self.stages.append(MapStage(nn.Identity(), blocks))
            self.feature_info.append({"module": f"stages.{stage}", "num_chs": dim, "reduction": 4 * 2**stage})
        self.norm = nn.Sequential(ConvNorm(dim, final_dim), nn.ReLU()) if final_dim else nn.Identity()
        self.make_head(final_dim or dim, num_classes, global_pool, drop_rate)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Convolutions: normal by their fan out; every block starts as its shortcut. Attention starts as it does."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                nn.init.kaiming_normal_(module.conv.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.conv3.bn.weight)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages after the last one taken; the final convolution and the head go with them, or on request.

        A classifier of the final convolution's channels goes with it.
        """
        widened = not isinstance(self.norm, nn.Identity)
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head or (prune_norm and widened))
        if widened and isinstance(self.norm, nn.Identity):
            self.num_features = self.head_hidden_size = self.feature_info[len(self.stages) - 1]["num_chs"]
        return take

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        tables = ("relative_position_bias_table", "height_rel", "width_rel", "pos_emb")
        return {name for name, _ in self.named_parameters() if name.endswith(tables)} | undecayed(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}


def _stem(in_chans: int, dims: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(pairwise([in_chans, *dims])):
        layers += [ConvNorm(before, after, 7 if len(dims) == 1 else 3, stride=1 if index else 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(3, 2, padding=1))


def _shortcut(dim: int, dim_out: int, stride: int, avg_down: bool) -> nn.Module:
    if dim == dim_out and stride == 1:
        return nn.Identity()
    if not avg_down or stride == 1:
        return ConvNorm(dim, dim_out, stride=stride)
    pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, ConvNorm(dim, dim_out))


def _mixer(
    name: str,
    width: int,
    stride: int,
    grid: tuple[int, int],
    own: Mapping[str, Any],
    options: Mapping[str, Any],
) -> tuple[nn.Module, int]:
    """What mixes `width` channels with a stride, and the channels that it answers."""
    if name == CONV:
        return ConvNorm(width, width, 3, stride=stride), width
    attn = create_attention(name, width, layout="map", grid_size=grid, **with_defaults(name, options, own))
    return AttentionNorm(attn, 1 if attn.out_grid((8, 8)) != (8, 8) else stride), attn.dim_out


def _names(attn: str | Sequence[Pattern] | None, mixers: Sequence[Pattern], depths: Sequence[int]) -> list[list[str]]:
    """The mixing of every block.

    Raises:
        UsageError: there are not as many entries as stages, an entry is no name, or there is no such mechanism.
    """
    mixers = per_stage("mixers", mixers, len(depths))
    own = [_in_turn(pattern, depth) for pattern, depth in zip(mixers, depths, strict=True)]
    given = per_stage("attn", attn, len(depths))
    names = []
    for before, entry in zip(own, given, strict=True):
        attending = any(name != CONV for name in before)
        if entry is None or (isinstance(attn, str) and not attending):
            names.append(before)
        elif isinstance(entry, str):
            names.append([entry if name != CONV or not attending else name for name in before])
        else:
            names.append([new or old for new, old in zip(_in_turn(entry, len(before)), before, strict=True)])
    for name in {name for stage in names for name in stage if name != CONV}:
        attention_spec(name)
    return names


def _in_turn(pattern: Pattern, depth: int) -> list[Any]:
    if not pattern or not isinstance(pattern, Sequence):
        raise UsageError(
            f"a stage mixes by a name or a sequence of names, not {pattern!r}; the 3x3 convolution is 'conv'"
        )
    names = [pattern] if isinstance(pattern, str) else list(pattern)
    return [names[index % len(names)] for index in range(depth)]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights of timm's ResNets (the plain ones, not -D) and of its networks of the same blocks with attention, and
    our files.
    """
    rules: Mapping[str, Any] = {
        r"^(?:stem\.)?conv(\d)\.(?=conv|bn)": lambda m: f"patch_embed.{2 * int(m[1]) - 2}.",
        r"^stem\.(?=conv|bn)": "patch_embed.0.",
        r"^conv1\.": "patch_embed.0.conv.",
        r"^bn1\.": "patch_embed.0.bn.",
        r"^layer(\d)\.(\d+)\.": lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.",
        r"^stages\.(\d+)\.(\d+)\.": r"stages.\1.blocks.\2.",
        r"\.(conv[13])_1x1\.": r".\1.",
        r"\.conv2_kxk\.": ".mixer.",
        r"\.self_attn\.": ".mixer.attn.",
        r"\.post_attn\.": ".mixer.bn.",
        r"\.conv_lambda\.weight$": ".pos_emb",
        r"\.conv_lambda\.bias$": ".pos_bias",
        r"\.conv2\.(?=weight)": ".mixer.conv.",
        r"\.bn2\.": ".mixer.bn.",
        r"\.conv([13])\.(?=weight)": r".conv\1.conv.",
        r"\.bn([13])\.": r".conv\1.bn.",
        r"\.downsample\.0\.": ".shortcut.conv.",
        r"\.downsample\.1\.": ".shortcut.bn.",
        r"^(?:head\.fc|fc)\.": "head.",
    }
    state = rename(unwrap(state_dict), rules)
    # timm's is the kernel of a three-dimensional convolution: (k, u, r, r, 1) instead of (r, r, k, u).
    return {key: value[..., 0].permute(2, 3, 0, 1) if value.ndim == 5 else value for key, value in state.items()}


def cfg(**kwargs: Any) -> dict[str, Any]:
    """The facts about a network whose weights nobody published; its licence is this project's."""
    size = kwargs.get("input_size", (3, 224, 224))
    own = {
        "input_size": size,
        "pool_size": (-(-size[1] // 32), -(-size[2] // 32)),
        "crop_pct": 0.875,
        "first_conv": "patch_embed.0.conv",
        "classifier": "head",
    }
    return imagenet_cfg(**{**own, **kwargs})


default_cfgs = generate_default_cfgs(
    {
        "zoo_attention_resnet50.untrained": cfg(
            paper_ids="arXiv:1512.03385", paper_name="Deep Residual Learning for Image Recognition"
        ),
    }
)


def create(variant: str, pretrained: bool, own: Mapping[str, Any], **kwargs: Any) -> AttentionResNet:
    """A network through timm: its own arguments, under the user's; of `mixer_options` also each mechanism's."""
    mixers = {name: dict(options) for name, options in own.get("mixer_options", {}).items()}
    for name, options in (kwargs.pop("mixer_options", None) or {}).items():
        mixers[name] = {**mixers.get(name, {}), **options}
    return build(
        AttentionResNet,
        variant,
        pretrained,
        checkpoint_filter_fn,
        **{**own, "mixer_options": mixers, **kwargs},
    )


@register_model
def zoo_attention_resnet50(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """ResNet-50 with attention in the last two stages: softmax, or `attn`; with attn="conv" the ResNet-50 itself."""
    return create("zoo_attention_resnet50", pretrained, {}, **kwargs)
