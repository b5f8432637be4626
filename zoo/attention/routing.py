"""Routing attention: tokens attend inside clusters that k-means finds among queries and keys.

Source: Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", arXiv 2003.05997, section 4.
The paper is causal and sets keys to queries; an encoder has no need of either. Updates follow its equation for the
centroids, with means in place of sums and centroids kept at unit length, as a known re-implementation does. There is
no commitment loss: the layer answers with its tokens alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention._choose import first_best
from zoo.attention._heads import HeadAttention, split_heads
from zoo.attention._pairs import pair_bias
from zoo.attention.base import Grid, logit_bias, zero_without_keys
from zoo.attention.registry import register_attention
from zoo.attention.window import grid_tokens, make_cut, split, window_tokens
from zoo.errors import UsageError
from zoo.kernels.precision import without_autocast
from zoo.layers.sdpa import dot_product_attention


@register_attention(
    "routing",
    paper="Efficient Content-Based Sparse Attention with Routing Transformers, arXiv 2003.05997",
    supports=("key_mask", "prefix"),
    prefix="mix",
    # 8 heads, half of them in windows of 7 x 7 that divide the grid, half in 8 clusters whose number divides N; moving
    # the centroids takes 8*N*C more.
    cost="4*N*C**2 + 49*N*C + 8*N*C + N**2*C/8",
    confidence="medium",
)
class RoutingAttention(HeadAttention):
    """Softmax attention inside clusters in half of the heads, inside windows in the others.

    Each of the c centroids of a head takes the N / c (rounded up) queries and as many keys that lie nearest to it, both
    normalised to mean 0 and variance 1 a token. A token in several clusters gets the mean of its answers, one in none
    gets 0. Prefix tokens are keys in every cluster and window, and their queries see all tokens.

    Centroids are no parameters: in training they move towards the mean of the queries and keys nearest to them. They
    are part of the state; among several processes those of the first count, as DDP copies buffers before every step.
    If a step is computed twice (gradient checkpointing), the second time sees the moved ones.

    Args:
        dim: channels of x.
        num_heads: heads; divides `dim_out`.
        dim_out: channels of the answer, and of q, k and v; `dim` unless given.
        clusters: centroids c; about the square root of the tokens is cheapest.
        local_heads: heads that attend inside windows instead; half of them, rounded down, unless given.
        window_size: side of these windows.
        normalized: whether the logits inside a cluster are of normalised queries and keys (the paper's), or raw.
        qkv_bias: biases in the projections to q, k and v.
        attn_drop, proj_drop: dropout of the weights and of the answer.
        proj: whether a linear layer follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        dim_out: int | None = None,
        clusters: int = 8,
        local_heads: int | None = None,
        window_size: int = 7,
        normalized: bool = True,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__("routing", dim, num_heads, dim_out, attn_drop, proj_drop, proj, grid_size, num_prefix_tokens)
        self.local_heads = num_heads // 2 if local_heads is None else local_heads
        if clusters < 1 or window_size < 1 or not 0 <= self.local_heads <= num_heads:
            raise UsageError(
                f"attention 'routing': clusters={clusters}, window_size={window_size}, local_heads={local_heads}; "
                f"clusters and windows are at least 1, local_heads 0 to {num_heads}"
            )
        self.clusters, self.window_size, self.normalized = clusters, window_size, normalized
        # The paper's: how much of a centroid a step keeps.
        self.decay = 0.999
        self.qkv = nn.Linear(dim, 3 * self.dim_out, bias=qkv_bias)
        routed = num_heads - self.local_heads
        self.centroids: Tensor
        self.register_buffer("centroids", F.normalize(torch.randn(routed, clusters, self.head_dim), dim=-1))

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, P + H*W, dim) -> (B, P + H*W, dim_out); see `Attention` for the rest."""
        if bias is not None:
            raise ValueError("attention 'routing' attends inside clusters, so it takes no bias; use 'softmax' for that")
        grid = self.token_grid(x, grid)
        prefix, local = self.num_prefix_tokens, self.local_heads
        q, k, v = self.project(x)
        parts: list[Tensor] = []
        if local < self.num_heads:
            parts.append(self.routed(q[:, local:], k[:, local:], v[:, local:], key_mask))
        if local > 0:
            parts.insert(0, self.windowed(q[:, :local], k[:, :local], v[:, :local], grid, key_mask))
        out = torch.cat(parts, dim=1)
        if prefix > 0:
            drop = self.attn_drop.p if self.training else 0.0
            added = logit_bias(key_mask, None, q.dtype)
            first = dot_product_attention(q[:, :, :prefix], k, v, attn_mask=added, dropout_p=drop)
            out = torch.cat([first, out], dim=2)
        return self.finish(zero_without_keys(out, key_mask))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, heads, tokens, head_dim)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return split_heads(q, self.num_heads), split_heads(k, self.num_heads), split_heads(v, self.num_heads)

    def windowed(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], key_mask: Tensor | None) -> Tensor:
        """Answers (B, heads, H*W, head_dim) of cells to the keys of their window and the prefix."""
        heads = q.shape[1]
        cut = make_cut(grid, (self.window_size, self.window_size))
        every = torch.cat([q, k, v], dim=1).transpose(1, 2).flatten(2)
        windows, mask = window_tokens(every, cut, self.num_prefix_tokens, key_mask)
        inner = windows.unflatten(2, (3, heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        drop = self.attn_drop.p if self.training else 0.0
        added = logit_bias(mask, None, q.dtype)
        out = dot_product_attention(inner[0], inner[1], inner[2], attn_mask=added, dropout_p=drop)
        out = zero_without_keys(out, mask).transpose(1, 2).flatten(2)
        cells = grid_tokens(out, cut, self.num_prefix_tokens, q.shape[0])[:, self.num_prefix_tokens :]
        return cells.unflatten(2, (heads, self.head_dim)).transpose(1, 2)

    def routed(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Answers (B, heads, H*W, head_dim) of cells to the keys of their clusters and the prefix."""
        prefix = self.num_prefix_tokens
        queries, keys = self.cluster(q, k, key_mask, self.training)
        if self.normalized:
            q, k = self.normal(q), self.normal(k)
        drop = self.attn_drop.p if self.training else 0.0
        out = dot_product_attention(
            self.take(q[:, :, prefix:], queries).flatten(1, 2),
            self.with_prefix(k, keys).flatten(1, 2),
            self.with_prefix(v, keys).flatten(1, 2),
            attn_mask=self.unseen(keys, key_mask, q.dtype),
            dropout_p=drop,
        )
        out = out.unflatten(1, (q.shape[1], self.clusters))
        wide = torch.promote_types(out.dtype, torch.float32)
        if key_mask is not None:
            out = out.masked_fill(~self.seen(keys, key_mask).any(dim=-1)[..., None, None], 0.0)
        shape = [q.shape[0], q.shape[1], q.shape[2] - prefix, self.head_dim]
        place = queries.flatten(2)[..., None]
        total = torch.zeros(shape, dtype=wide, device=q.device)
        total = total.scatter_add(2, place.expand(-1, -1, -1, self.head_dim), out.flatten(2, 3).to(wide))
        return (total / self.times(place, shape)).to(v.dtype)

    @staticmethod
    def times(place: Tensor, shape: list[int]) -> Tensor:
        """(B, heads, H*W, 1): how many clusters a cell is in, at least 1."""
        count = torch.zeros(shape[0], shape[1], shape[2], 1, device=place.device)
        return count.scatter_add(2, place, torch.ones_like(place, dtype=count.dtype)).clamp(min=1)

    def cluster(self, q: Tensor, k: Tensor, key_mask: Tensor | None, learn: bool) -> tuple[Tensor, Tensor]:
        """Indices (B, heads, c, w) of the cells whose queries, and whose keys, each centroid takes.

        Moves the centroids after that if they are to `learn`.
        """
        prefix = self.num_prefix_tokens
        q, k = self.normal(q[:, :, prefix:].detach()), self.normal(k[:, :, prefix:].detach())
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k, centroids = q.to(wide), k.to(wide), self.centroids.to(wide)
        if torch.jit.is_scripting():
            fit_q, fit_k = self._fit(q, centroids), self._fit(k, centroids)
        else:
            fit_q, fit_k = self._fit_precisely(q, centroids), self._fit_precisely(k, centroids)
        if key_mask is not None:
            hidden = ~key_mask[:, None, None, prefix:]
            fit_q, fit_k = fit_q.masked_fill(hidden, float("-inf")), fit_k.masked_fill(hidden, float("-inf"))
        count = q.shape[2]
        size = (count + self.clusters - 1) // self.clusters
        taken = first_best(fit_q, size), first_best(fit_k, size)
        if learn:
            self.move(torch.cat([q, k], dim=2), torch.cat([fit_q, fit_k], dim=3))
        return taken

    def move(self, points: Tensor, fit: Tensor) -> None:
        """Moves each centroid towards the mean of the points (B, heads, n, d) that fit (B, heads, c, n) it best."""
        seen = (fit > float("-inf")).any(dim=2, keepdim=True)
        nearest = fit.argmax(dim=2, keepdim=True)
        mine = (nearest == torch.arange(self.clusters, device=fit.device)[None, None, :, None]) & seen
        share = mine.to(points.dtype)
        count = share.sum(dim=(0, 3))[..., None]
        mean = torch.einsum("bhcn,bhnd->hcd", share, points) / count.clamp(min=1)
        old = self.centroids.to(points.dtype)
        moved = F.normalize(self.decay * old + (1 - self.decay) * mean, dim=-1)
        self.centroids.copy_(torch.where(count > 0, moved, old))

    def normal(self, x: Tensor) -> Tensor:
        """LayerNorm without gain and bias over the channels of a head."""
        return F.layer_norm(x, [self.head_dim]).to(x.dtype)

    @staticmethod
    def _fit(points: Tensor, centroids: Tensor) -> Tensor:
        return centroids @ points.transpose(-2, -1)

    @torch.jit.unused
    def _fit_precisely(self, points: Tensor, centroids: Tensor) -> Tensor:
        # Rounded fits would make other clusters.
        with without_autocast(points):
            return self._fit(points, centroids)

    def take(self, x: Tensor, places: Tensor) -> Tensor:
        """Cells (B, heads, H*W, d) at places (B, heads, c, w): (B, heads, c, w, d)."""
        index = places.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
        return x.gather(2, index).unflatten(2, (places.shape[2], places.shape[3]))

    def with_prefix(self, x: Tensor, places: Tensor) -> Tensor:
        """Tokens of every cluster, the prefix before the cells at places: (B, heads, c, P + w, d)."""
        prefix = self.num_prefix_tokens
        inner = self.take(x[:, :, prefix:], places)
        if prefix == 0:
            return inner
        return torch.cat([x[:, :, None, :prefix].expand(-1, -1, places.shape[2], -1, -1), inner], dim=3)

    def seen(self, places: Tensor, key_mask: Tensor) -> Tensor:
        """bool (B, heads, c, P + w): which keys of every cluster may be attended."""
        mask = key_mask[:, None, :, None].expand(places.shape[0], places.shape[1], -1, -1)
        return self.with_prefix(mask, places).squeeze(-1)

    def unseen(self, places: Tensor, key_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What to add to the logits of masked keys: (B, heads * c, 1, P + w)."""
        if key_mask is None:
            return None
        return pair_bias(self.seen(places, key_mask)[:, :, :, None, :].flatten(1, 2), None, dtype)

    def attention_map(self, x: Tensor, grid: Grid | None = None, key_mask: Tensor | None = None) -> Tensor:
        """float32 weights (B, heads, queries, keys); the row of a cell that is in no cluster is 0."""
        grid = self.token_grid(x, grid)
        q, k, _ = self.project(x)
        prefix, local = self.num_prefix_tokens, self.local_heads
        seen = torch.ones(1, x.shape[1], dtype=torch.bool, device=x.device) if key_mask is None else key_mask
        maps = torch.zeros(x.shape[0], self.num_heads, x.shape[1], x.shape[1], device=x.device)
        with without_autocast(x):
            logits = (q.float() * self.scale) @ k.float().transpose(-2, -1)
            maps[:, :, :prefix] = (logits + logit_bias(seen, None, torch.float32)).softmax(dim=-1)[:, :, :prefix]
            if local > 0:
                maps[:, :local, prefix:] = self.window_weights(logits[:, :local], grid, seen)[:, :, prefix:]
            if local < self.num_heads:
                maps[:, local:, prefix:] = self.cluster_weights(q[:, local:], k[:, local:], seen)
        return zero_without_keys(maps, key_mask)

    def window_weights(self, logits: Tensor, grid: tuple[int, int], seen: Tensor) -> Tensor:
        """Weights of the local heads, from logits (B, heads, tokens, tokens)."""
        prefix, cut = self.num_prefix_tokens, make_cut(grid, (self.window_size, self.window_size))
        index = torch.arange(grid[0] * grid[1], device=logits.device).reshape(1, grid[0], grid[1], 1) + 1
        group = torch.zeros(grid[0] * grid[1] + 1, dtype=torch.long, device=logits.device)
        for window, cells in enumerate(split(index, cut)[0, :, :, 0]):
            group[cells] = window
        same = F.pad(group[1:, None] == group[None, 1:], (prefix, 0, prefix, 0), value=True)
        both = same[None, None] & seen[:, None, None, :]
        weights = (logits + pair_bias(both, None, torch.float32)).softmax(dim=-1)
        return weights.masked_fill(~both.any(dim=-1, keepdim=True), 0.0)

    def cluster_weights(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        """Weights (B, heads, H*W, P + H*W) of the routed heads."""
        prefix, count = self.num_prefix_tokens, k.shape[2]
        queries, keys = self.cluster(q, k, seen, False)
        if self.normalized:
            q, k = self.normal(q), self.normal(k)
        inner = (self.take(q[:, :, prefix:], queries).float() * self.scale) @ self.with_prefix(k, keys).float().mT
        local = (inner + self.unseen(keys, seen, torch.float32).unflatten(1, inner.shape[1:3])).softmax(dim=-1)
        local = local.masked_fill(~self.seen(keys, seen).any(dim=-1)[..., None, None], 0.0)
        first = torch.arange(prefix, device=q.device).expand(*keys.shape[:3], -1)
        columns = torch.cat([first, keys + prefix], dim=-1)
        pairs = (queries[..., :, None] * count + columns[..., None, :]).flatten(2)
        full = local.new_zeros(*q.shape[:2], (count - prefix) * count).scatter_add(2, pairs, local.flatten(2))
        place = queries.flatten(2)[..., None]
        return full.unflatten(2, (count - prefix, count)) / self.times(place, [*q.shape[:2], count - prefix])
