"""Inverse distance weighting: a key weighs as much as it is near to the query.

Source: McCarter, "Inverse distance weighting attention", arXiv 2310.18805, section 2. Medium confidence on images: the
paper has one layer, whose keys are learned points; here queries and keys are projections of tokens, in heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention._heads import MapAttention, masked_softmax
from zoo.attention.base import Grid
from zoo.attention.registry import register_attention
from zoo.errors import UsageError
from zoo.kernels.precision import without_autocast


@register_attention(
    "inverse_distance",
    paper="Inverse distance weighting attention, arXiv 2310.18805",
    supports=("key_mask", "bias", "prefix"),
    prefix="mix",
    cost="4*N*C**2 + 2*N**2*C",
    forms_map=True,
    confidence="medium",
)
class InverseDistanceAttention(MapAttention):
    """w v with w_ij = 1 / (eps + |q_i - k_j|^p), divided by their sum over j; as softmax of -log(eps + |q_i - k_j|^p).

    Far keys keep weight, and between points of many channels all distances are alike: with p = 2 and heads of 64
    channels the weights are nearly equal, and a larger p is to be chosen or learned.

    Args:
        dim: channels of x.
        num_heads: heads; divides `dim_out`.
        power: p, above 0.
        learn_power: whether p is a parameter of the layer that starts at `power`.
        eps: bounds the weight of a key that is the query.
        dim_out: channels of the answer, and of q, k and v; `dim` unless given.
        qkv_bias: biases in the projections to q, k and v.
        attn_drop, proj_drop: dropout of the weights and of the answer.
        proj: whether a linear layer follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them.

    Forms a map of N x N, bounded by `check_map`; distances are computed in float32 or wider.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        power: float = 2.0,
        learn_power: bool = False,
        eps: float = 1e-3,
        dim_out: int | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(
            "inverse_distance",
            dim,
            num_heads,
            dim_out,
            qkv_bias,
            attn_drop,
            proj_drop,
            proj,
            grid_size,
            num_prefix_tokens,
        )
        if power <= 0 or eps <= 0:
            raise UsageError(f"attention 'inverse_distance': power={power} and eps={eps} must both be above 0")
        self.power = power
        self.eps = eps
        # softplus of this is the power.
        start = torch.tensor(power, dtype=torch.float64).expm1().log().float()
        self.raw_power = nn.Parameter(start) if learn_power else None

    def weigh(
        self, q: Tensor, k: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Weights (B, heads, N, N); a row sums to 1."""
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(wide), k.to(wide)
        # Differences do not change under a common shift, and small numbers cancel less.
        centre = k.mean(dim=2, keepdim=True).detach()
        q, k = q - centre, k - centre
        products = self._products(q, k) if torch.jit.is_scripting() else self._precise_products(q, k)
        squares = q.square().sum(dim=-1, keepdim=True) + k.square().sum(dim=-1).unsqueeze(2) - 2 * products
        # 1e-12 is far below what float32 tells from zero here, and keeps the slope of the logarithm finite.
        far = self.power_of(squares.clamp(min=1e-12).log())
        # log(eps + exp(far)), whatever the power.
        return masked_softmax(-(far + F.softplus(math.log(self.eps) - far)), key_mask, bias)

    def power_of(self, log_squares: Tensor) -> Tensor:
        """log |q - k|^p of log |q - k|^2."""
        if self.raw_power is not None:
            return log_squares * (F.softplus(self.raw_power.to(log_squares.dtype)) / 2)
        return log_squares * (self.power / 2)

    @staticmethod
    def _products(q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-2, -1)

    @torch.jit.unused
    def _precise_products(self, q: Tensor, k: Tensor) -> Tensor:
        # Rounded products would drown the distances of near neighbours.
        with without_autocast(q):
            return self._products(q, k)
