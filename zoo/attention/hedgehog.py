"""Hedgehog: linear attention whose feature maps learn to imitate softmax.

Source: Zhang et al., "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
arXiv 2402.04347, sections 4.1 (feature maps) and 4.2 (distillation).
"""

from typing import Any

import torch
from torch import Tensor, nn

from zoo.attention._heads import HeadAttention, check_map, masked_softmax, product, split_heads
from zoo.attention.base import MASKED, Grid, zero_without_keys
from zoo.attention.registry import register_attention
from zoo.kernels.precision import without_autocast


@register_attention(
    "hedgehog",
    paper="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry, arXiv 2402.04347",
    supports=("key_mask", "prefix"),
    prefix="mix",
    # 8 heads.
    cost="4*N*C**2 + 6*N*C**2/8",
)
class HedgehogAttention(HeadAttention):
    """f(q_i) (sum_j f(k_j)^T v_j) / (f(q_i) sum_j f(k_j)^T) with f(u) = [exp(M u + b), exp(-M u - b)].

    M and b are learned, one each for the queries and the keys of every head; M starts at 1, b at 0. As the maps are
    alone what `softmax` attention has not, a file of a network with `softmax` can be loaded into the same network with
    `hedgehog`: the maps then keep their start, and `distil` says how they learn.

    Args:
        dim: channels of x.
        num_heads: heads; divides `dim_out`.
        dim_out: channels of the answer, and of q, k and v; `dim` unless given.
        qkv_bias: biases in the projections to q, k and v.
        qk_norm: LayerNorm (eps 1e-6) over each head of q and k, as `softmax` has it.
        proj_drop: dropout of the answer.
        proj: whether a linear layer follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them.

    Features and sums are computed in float32 or wider.
    """

    undecayed = ("q_map", "q_offset", "k_map", "k_offset")

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        dim_out: int | None = None,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__("hedgehog", dim, num_heads, dim_out, 0.0, proj_drop, proj, grid_size, num_prefix_tokens)
        width = self.head_dim
        self.qkv = nn.Linear(dim, 3 * self.dim_out, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(width, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width, eps=1e-6) if qk_norm else nn.Identity()
        self.q_map = nn.Parameter(torch.eye(width).repeat(num_heads, 1, 1))
        self.q_offset = nn.Parameter(torch.zeros(num_heads, 1, width))
        self.k_map = nn.Parameter(torch.eye(width).repeat(num_heads, 1, 1))
        self.k_offset = nn.Parameter(torch.zeros(num_heads, 1, width))
        self.register_load_state_dict_pre_hook(_complete)

    @torch.jit.unused
    def complete(self, state: dict[str, Any], prefix: str) -> None:
        """A state of softmax attention has no maps: those at hand stay."""
        names = ("q_map", "q_offset", "k_map", "k_offset")
        if f"{prefix}qkv.weight" in state and not any(prefix + name in state for name in names):
            state.update({prefix + name: getattr(self, name).detach().clone() for name in names})

    def maps(self) -> list[nn.Parameter]:
        """What distillation trains."""
        return [self.q_map, self.q_offset, self.k_map, self.k_offset]

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, P + H*W, dim) -> (B, P + H*W, dim_out); see `Attention` for the rest."""
        if bias is not None:
            raise ValueError("attention 'hedgehog' has no logits, so it takes no bias; use 'softmax' for that")
        q, k, v = self.project(x)
        out = self._weigh(q, k, v, key_mask) if torch.jit.is_scripting() else self._weigh_precisely(q, k, v, key_mask)
        return self.finish(zero_without_keys(out, key_mask).to(v.dtype))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, heads, N, d)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self.q_norm(split_heads(q, self.num_heads)), self.k_norm(split_heads(k, self.num_heads))
        return q, k, split_heads(v, self.num_heads)

    def features(self, q: Tensor, k: Tensor, key_mask: Tensor | None, masked: float = MASKED) -> tuple[Tensor, Tensor]:
        """f(q) and f(k) (B, heads, N, 2 d), up to factors that cancel in the weights; for q, k float32 or wider.

        Every feature of the keys is divided by its largest value over them, and that of the queries multiplied by it;
        then every query's features by the largest of them. So no exponential overflows, and the normaliser of a query
        is at least 1.
        """
        q = q @ self.q_map.to(q.dtype).transpose(-2, -1) + self.q_offset.to(q.dtype)
        k = k @ self.k_map.to(k.dtype).transpose(-2, -1) + self.k_offset.to(k.dtype)
        q, k = torch.cat([q, -q], dim=-1), torch.cat([k, -k], dim=-1)
        if key_mask is not None:
            k = k.masked_fill(~key_mask[:, None, :, None], masked)
        top = k.detach().amax(dim=2, keepdim=True)
        q = q + top
        return (q - q.detach().amax(dim=-1, keepdim=True)).exp(), (k - top).exp()

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        wide = torch.promote_types(v.dtype, torch.float32)
        q, k = self.features(q.to(wide), k.to(wide), key_mask)
        normaliser = (q * k.sum(dim=2, keepdim=True)).sum(dim=-1, keepdim=True)
        return q @ (k.transpose(-2, -1) @ v.to(wide)) / normaliser

    @torch.jit.unused
    def _weigh_precisely(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        with without_autocast(q):
            return self._weigh(q, k, v, key_mask)

    def attention_map(
        self, x: Tensor, grid: Grid | None = None, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Weights (B, heads, queries, keys) that forward implies, float32 or wider."""
        q, k, _ = self.project(x)
        return zero_without_keys(self.log_weights(q, k, key_mask).exp(), key_mask)

    def log_weights(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Logarithms of the weights (B, heads, queries, keys), float32 or wider, of q and k (B, heads, N, d)."""
        with without_autocast(q):
            wide = torch.promote_types(q.dtype, torch.float32)
            q, k = self.features(q.to(wide), k.to(wide), key_mask)
            # Two far ends of an exponential may miss each other; a logarithm needs something there.
            tiny = torch.finfo(wide).tiny
            weights = q @ k.transpose(-2, -1)
            return weights.clamp(min=tiny).log() - weights.sum(dim=-1, keepdim=True).log()

    @torch.jit.unused
    def distil(self, x: Tensor, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What softmax attention of the same projections answers, and how far its weights are from ours.

        Args:
            x: tokens (B, N, dim).
            key_mask: as forward takes it.

        Returns:
            The answer (B, N, dim_out) of softmax(q k^T / sqrt(d)) v, and the loss, a number: the mean over images,
            heads and queries of -sum_j A_ij log W_ij, A the weights of softmax and W ours (equation 4 of the paper).
            It forms maps of N x N, bounded by `check_map`.
        """
        check_map("hedgehog", x.shape[0], self.num_heads, x.shape[1], x.shape[1])
        q, k, v = self.project(x)
        teacher = masked_softmax(product(q * self.scale, k.transpose(-2, -1)), key_mask, None)
        loss = -(teacher.detach() * self.log_weights(q.detach(), k.detach(), key_mask)).sum(dim=-1).mean()
        return self.finish(teacher.to(v.dtype) @ v), loss


def _complete(module: HedgehogAttention, state: dict[str, Any], prefix: str, *_: Any) -> None:
    module.complete(state, prefix)
