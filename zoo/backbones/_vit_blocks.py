"""Blocks of the plain ViT: each with attention of its own, or several that share one map.

Sharing - Beyond KV Caching: Shared Attention for Efficient LLMs - https://arxiv.org/abs/2407.12866
Which blocks are alike - EchoAtt: Attend, Copy, then Adjust for More Efficient LLMs - https://arxiv.org/abs/2409.14595
"""

from collections.abc import Callable, Sequence

import torch
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

from zoo.attention import SoftmaxAttention
from zoo.errors import UsageError
from zoo.kernels.precision import without_autocast
from zoo.layers.context_broadcast import ContextBroadcast


class Block(nn.Module):
    """Pre-norm transformer layer: x + attn(norm1(x)), x + cb(mlp(norm2(x))); tokens (B, P + H*W, C)."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float | None = None,
        cb: str | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn
        self.ls1 = LayerScale(dim, init_values=init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop)
        self.cb = ContextBroadcast(dim, scaled=cb == "cbs") if cb else nn.Identity()
        self.ls2 = LayerScale(dim, init_values=init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def shared(self, x: Tensor, weights: Tensor | None) -> Tensor | None:
        """The map that is shared from this block on: the one that was before, unless a block makes a new one."""
        return weights

    def forward(self, x: Tensor, grid: tuple[int, int], weights: Tensor | None = None) -> Tensor:
        """x (B, P + H*W, C) -> the same shape; `weights` are for blocks that reuse a map."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), grid)))
        return x + self.drop_path2(self.ls2(self.cb(self.mlp(self.norm2(x)))))


class ReuseAttention(nn.Module):
    """proj(weights v(x)) with weights (B, heads, N, N) that another layer made: no queries, no keys."""

    layout = "tokens"

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, attn_drop: float, proj_drop: float):
        super().__init__()
        self.num_heads = num_heads
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def head_layers(self) -> list[tuple[nn.Module, int]]:
        """As `Attention.head_layers`."""
        return [(self.proj, self.num_heads)]

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (B, N, dim) and weights (B, heads, N, N) before dropout, float32 -> (B, N, dim)."""
        v = self.v(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        out = self.attn_drop(weights.to(v.dtype)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class SharedMap(nn.Module):
    """softmax(q k^T / sqrt(d)) of x (B, N, dim): float32 weights (B, heads, N, N), kept for the blocks that follow."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, q_norm: nn.Module, k_norm: nn.Module):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.q_norm, self.k_norm = q_norm, k_norm

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(wide), k.to(wide)
        logits = self._logits(q, k) if torch.jit.is_scripting() else self._precise(q, k)
        return logits.softmax(dim=-1)

    def _logits(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * self.scale) @ k.transpose(-2, -1)

    @torch.jit.unused
    def _precise(self, q: Tensor, k: Tensor) -> Tensor:
        with without_autocast(q):
            return self._logits(q, k)


class SharingBlock(Block):
    """A block whose attention is a map that it makes (`leads`) or that an earlier block made, and values of its own.

    The map is no part of `forward`, so that checkpointing of the block does not compute it again.

    Args:
        dim: channels.
        like: the softmax attention whose place it takes: heads, biases, norms of q and k and dropout are its.
        leads: whether it makes the map.
        block: the other arguments of `Block`.
    """

    def __init__(self, dim: int, like: SoftmaxAttention, leads: bool, *block: object):
        bias = like.qkv.bias is not None
        reuse = ReuseAttention(dim, like.num_heads, bias, like.attn_drop.p, like.proj_drop.p)
        super().__init__(dim, reuse, *block)  # type: ignore[arg-type]
        self.leads = leads
        self.share = SharedMap(dim, like.num_heads, bias, like.q_norm, like.k_norm) if leads else None

    def shared(self, x: Tensor, weights: Tensor | None) -> Tensor | None:
        return weights if self.share is None else self.share(self.norm1(x))

    def forward(self, x: Tensor, grid: tuple[int, int], weights: Tensor | None = None) -> Tensor:
        if weights is None:
            raise ValueError("a block that shares a map needs `weights`, what `shared` of its first block answers")
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), weights)))
        return x + self.drop_path2(self.ls2(self.cb(self.mlp(self.norm2(x)))))


def check_spans(spans: Sequence[Sequence[int]] | None, depth: int) -> dict[int, int]:
    """Block -> the block that makes its map, for all blocks of spans [first, last], which count from 0.

    Raises:
        UsageError: a span is no pair in order inside the network, or two overlap.
    """
    leader: dict[int, int] = {}
    for span in spans or ():
        pair = list(span) if isinstance(span, Sequence) else []
        if len(pair) != 2 or not all(isinstance(end, int) for end in pair) or not 0 <= pair[0] <= pair[1] < depth:
            raise UsageError(
                f"attn_share={spans!r}: {span!r} is no span of blocks; give pairs [first, last] with "
                f"0 <= first <= last <= {depth - 1}, such as [[4, 7]]: block 4 makes the map of blocks 4 to 7"
            )
        for index in range(pair[0], pair[1] + 1):
            if index in leader:
                raise UsageError(f"attn_share={spans!r}: block {index} is in two spans")
            leader[index] = pair[0]
    return leader


def can_share(attention: nn.Module, index: int, leader: nn.Module | None) -> SoftmaxAttention:
    """The softmax attention of block `index`, which a shared map takes the place of.

    Args:
        leader: the block that makes the map; None for that block itself.

    Raises:
        UsageError: it is another mechanism, has other heads, or options that no shared map has.
    """
    if not isinstance(attention, SoftmaxAttention):
        raise UsageError(
            f"attn_share: block {index} has {type(attention).__name__}, but only maps of attention 'softmax' are shared"
        )
    if attention.qkv is None or attention.lepe is not None or not isinstance(attention.proj, nn.Linear):
        raise UsageError(f"attn_share: block {index} has sr_ratio, lepe or proj=False, which a shared map has not")
    if leader is not None and attention.num_heads != leader.attn.num_heads:
        raise UsageError(
            f"attn_share: block {index} has {attention.num_heads} heads, but the map that it is to share has "
            f"{leader.attn.num_heads}"
        )
    return attention


def split_shared(state: dict[str, Tensor], leaders: dict[int, int]) -> dict[str, Tensor]:
    """Weights of blocks that have a joint projection to q, k and v, for blocks that share maps.

    A block that makes a map takes all three; one that reuses it leaves q, k and their norms.
    """
    out = {}
    for key, value in state.items():
        head, _, rest = key.partition(".attn.")
        index = int(head.removeprefix("blocks.")) if head.startswith("blocks.") and rest else -1
        leads = leaders.get(index) == index
        if index not in leaders or not rest.startswith(("qkv.", "q_norm.", "k_norm.")):
            out[key] = value
        elif rest.startswith("qkv."):
            third, kind = value.shape[0] // 3, rest.removeprefix("qkv.")
            out[f"{head}.attn.v.{kind}"] = value[2 * third :]
            if leads:
                out[f"{head}.share.qk.{kind}"] = value[: 2 * third]
        elif leads:
            out[f"{head}.share.{rest}"] = value
    return out


@torch.no_grad()
def choose_attn_share(model: nn.Module, images: Tensor, threshold: float, longest: int = 4) -> list[list[int]]:
    """Spans for the option `attn_share` of a trained ViT: runs of blocks whose maps are alike, as EchoAtt finds them.

    The first and the last block never share. EchoAtt's own threshold is not published; it trains on afterwards.

    Args:
        model: a `VisionTransformer` with softmax attention in all blocks.
        images: some images (B, in_chans, H, W), normalised.
        threshold: the least similarity of a map to that of the first block of its span, between 0 and 1.
        longest: the most blocks of a span.

    Raises:
        UsageError: the network is another one, `threshold` no share, or `longest` less than two blocks.
    """
    blocks = getattr(model, "blocks", ())
    if not blocks or not all(isinstance(getattr(block, "attn", None), SoftmaxAttention) for block in blocks):
        raise UsageError(
            "choose_attn_share looks at the maps of a zoo ViT with softmax attention in all blocks, as "
            f"create_model('zoo_vit_tiny_patch16_224') makes it, not of {type(model).__name__}"
        )
    if not 0 <= threshold <= 1 or longest < 2:
        raise UsageError(f"threshold={threshold} lies between 0 and 1, and longest={longest} is 2 blocks or more")
    maps = []
    x, grid = model.embed(images)
    for block in model.blocks:
        maps.append(block.attn.attention_map(block.norm1(x), grid))
        x = block(x, grid)
    return similar_spans(map_similarity(maps), threshold, longest)


def map_similarity(maps: Sequence[Tensor]) -> Tensor:
    """Cosine of the maps (B, heads, N, N) of every two blocks, mean over images and heads: float32 (blocks, blocks)."""
    flat = torch.stack([nn.functional.normalize(map_.flatten(2).float(), dim=-1) for map_ in maps])
    return torch.einsum("abhn,cbhn->acbh", flat, flat).mean(dim=(2, 3))


def similar_spans(similarity: Tensor, threshold: float, longest: int) -> list[list[int]]:
    """What `choose_attn_share` says, of the similarity (blocks, blocks) of every two maps."""
    spans: list[list[int]] = []
    first, depth = 1, len(similarity)
    while first < depth - 1:
        last = first
        while last + 1 < min(first + longest, depth - 1) and similarity[first, last + 1] >= threshold:
            last += 1
        if last > first:
            spans.append([first, last])
        first = last + 1
    return spans
