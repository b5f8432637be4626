"""Mixture of sparse attention: each head chooses the tokens that it attends among.

Source: Piekos, Csordas, Schmidhuber, "Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via
Expert-Choice Routing", arXiv 2505.00315, section 2.2, without the causal mask. Its rotary positions are left to the
network around, whose tokens carry positions already.
"""

import torch
from torch import Tensor, nn

from zoo.attention._choose import first_best
from zoo.attention._heads import join_heads, split_heads
from zoo.attention._pairs import pair_bias
from zoo.attention.base import Attention, Grid, check_heads
from zoo.attention.registry import register_attention
from zoo.attention.softmax import SoftmaxAttention
from zoo.errors import UsageError
from zoo.kernels.precision import without_autocast
from zoo.layers.sdpa import dot_product_attention


@register_attention(
    "mosa",
    paper="Mixture of Sparse Attention (MoSA), arXiv 2505.00315",
    supports=("key_mask", "prefix"),
    prefix="mix",
    # Where the sparsity of 4 divides N, for 8 heads: the router, four projections and two products of N/4 tokens.
    cost="8*N*C + N*C**2 + N**2*C/8",
)
class MosaAttention(Attention):
    """y = sum_a r_a * softmax(q_a k_a^T / sqrt(d)) v_a W_a, where head a takes the k tokens of the largest r_a.

    r_a = sigmoid(x w_a), and k = tokens / sparsity, at least 2 more than the prefix tokens, which every head takes. A
    token that no head takes gets 0: only the shortcut around the layer is left of it. The sum over heads is in float32.

    Args:
        dim: channels of x.
        num_heads: heads, any number if `head_dim` is given.
        head_dim: channels of q, k and v in a head; dim / num_heads unless given.
        dim_out: channels of the answer; `dim` unless given.
        sparsity: how many times fewer tokens a head takes than there are; 1 takes all.
        dense_heads: heads of softmax attention over all tokens whose answer is added, as in the paper's networks.
        attn_drop, proj_drop: dropout of the weights and of the answer.
        grid_size, num_prefix_tokens: as `create_attention` takes them.

    A masked token is chosen after all others, and then not seen.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        head_dim: int | None = None,
        dim_out: int | None = None,
        sparsity: int = 4,
        dense_heads: int = 0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(dim, dim_out, grid_size, num_prefix_tokens)
        if head_dim is None:
            head_dim = check_heads("mosa", dim, num_heads)
        if min(head_dim, num_heads, sparsity) < 1 or dense_heads < 0:
            raise UsageError(
                f"attention 'mosa': num_heads={num_heads}, head_dim={head_dim}, sparsity={sparsity}, "
                f"dense_heads={dense_heads}; the first three are at least 1, the last at least 0"
            )
        self.num_heads, self.head_dim, self.sparsity = num_heads, head_dim, sparsity
        self.scale = head_dim**-0.5
        # The authors' ranges.
        self.router = nn.Parameter(torch.empty(num_heads, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.qkv = nn.Parameter(torch.empty(num_heads, dim, 3 * head_dim).uniform_(-1, 1) * (3 * head_dim) ** -0.5)
        shrink = (self.dim_out * num_heads) ** -0.5
        self.proj = nn.Parameter(torch.empty(num_heads, head_dim, self.dim_out).uniform_(-shrink, shrink))
        # What heads answer passes through it side by side, for masks of heads.
        self.merge = nn.Identity()
        self.dense: nn.Module | None = None
        self.dense_proj: nn.Module | None = None
        if dense_heads:
            width = dense_heads * head_dim
            self.dense = SoftmaxAttention(
                dim, num_heads=dense_heads, dim_out=width, qkv_bias=False, attn_drop=attn_drop, proj=False
            )
            self.dense_proj = nn.Linear(width, self.dim_out, bias=False)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, P + H*W, dim) -> (B, P + H*W, dim_out); see `Attention` for the rest."""
        if bias is not None:
            raise ValueError(
                "attention 'mosa' attends among chosen tokens, so it takes no bias; use 'softmax' for that"
            )
        chosen, rate = self.choose(x, key_mask)
        q, k, v = self.project(x, chosen)
        added = self.unseen(chosen, key_mask, q.dtype)
        drop = self.attn_drop.p if self.training else 0.0
        out = dot_product_attention(q, k, v, attn_mask=added, dropout_p=drop)
        out = split_heads(self.merge(join_heads(out)), self.num_heads)
        out = (out * rate.to(out.dtype)[..., None]) @ self.proj.to(out.dtype)
        wide = torch.promote_types(out.dtype, torch.float32)
        place = chosen.flatten(1)[:, :, None].expand(-1, -1, self.dim_out)
        total = torch.zeros(x.shape[0], x.shape[1], self.dim_out, dtype=wide, device=x.device)
        total = total.scatter_add(1, place, out.to(wide).flatten(1, 2))
        if key_mask is not None:
            total = total.masked_fill(~key_mask.any(dim=1)[:, None, None], 0.0)
        answer = total.to(out.dtype)
        if self.dense is not None and self.dense_proj is not None:
            answer = answer + self.dense_proj(self.dense(x, grid, key_mask, None))
        return self.proj_drop(answer)

    def attention_map(self, x: Tensor, grid: Grid | None = None, key_mask: Tensor | None = None) -> Tensor:
        """float32 (B, heads, queries, keys): r times the weights, 0 for tokens not chosen; without `dense_heads`."""
        chosen, rate = self.choose(x, key_mask)
        q, k, _ = self.project(x, chosen)
        added = self.unseen(chosen, key_mask, torch.float32)
        with without_autocast(x):
            logits = (q.float() * self.scale) @ k.float().transpose(-2, -1)
        local = (logits if added is None else logits + added).softmax(dim=-1) * rate.float()[..., None]
        if key_mask is not None:
            local = local.masked_fill(~key_mask.any(dim=1)[:, None, None, None], 0.0)
        batch, count, _ = x.shape
        pairs = (chosen[..., :, None] * count + chosen[..., None, :]).flatten(2)
        full = local.new_zeros(batch, self.num_heads, count * count).scatter(2, pairs, local.flatten(2))
        return full.unflatten(2, (count, count))

    def head_layers(self) -> list[tuple[nn.Module, int]]:
        return [(self.merge, self.num_heads)]

    def choose(self, x: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Indices (B, heads, k) of the chosen tokens and their r, float32 or wider."""
        prefix, count = self.num_prefix_tokens, x.shape[1]
        score = self._score(x, self.router) if torch.jit.is_scripting() else self._score_precisely(x, self.router)
        order = score.detach()
        if prefix > 0:
            order = torch.cat([torch.full_like(order[:, :, :prefix], float("inf")), order[:, :, prefix:]], dim=2)
        if key_mask is not None:
            order = order.masked_fill(~key_mask[:, None, :], float("-inf"))
        k = min(max(count // self.sparsity, prefix + 2), count)
        chosen = first_best(order, k)
        return chosen, score.gather(2, chosen).sigmoid()

    @staticmethod
    def _score(x: Tensor, router: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return router.to(wide) @ x.to(wide).transpose(1, 2)

    @torch.jit.unused
    def _score_precisely(self, x: Tensor, router: Tensor) -> Tensor:
        # Rounded scores would choose other tokens.
        with without_autocast(x):
            return self._score(x, router)

    def project(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, heads, k, head_dim) of the chosen tokens."""
        place = chosen.flatten(1)[:, :, None].expand(-1, -1, x.shape[2])
        own = x.gather(1, place).unflatten(1, (self.num_heads, chosen.shape[2]))
        q, k, v = (own @ self.qkv).chunk(3, dim=-1)
        return q, k, v

    @staticmethod
    def unseen(chosen: Tensor, key_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What to add to the logits (B, heads, k, k) of chosen tokens that are masked."""
        if key_mask is None:
            return None
        seen = key_mask[:, None, :].expand(chosen.shape[0], chosen.shape[1], -1).gather(2, chosen)[:, :, None, :]
        return pair_bias(seen, None, dtype)
