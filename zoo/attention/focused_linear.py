"""Focused linear attention: cost linear in the tokens, sharpness by a power of queries and keys.

Source: Han et al., "FLatten Transformer: Vision Transformer using Focused Linear Attention", arXiv 2308.00442,
equations 4 to 8; the order of sums is that of the authors' release of May 2024 (means instead of sums).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.base import Attention, Grid, check_heads
from zoo.attention.depthwise import check_kernel, depthwise_tokens
from zoo.attention.registry import register_attention
from zoo.errors import UsageError
from zoo.kernels.precision import without_autocast
from zoo.layers.position import TableResize


@register_attention(
    "focused_linear",
    paper="FLatten Transformer: Vision Transformer using Focused Linear Attention, arXiv 2308.00442",
    supports=("key_mask", "prefix"),
    prefix="mix",
    cost="4*N*C**2 + 2*N*C**2/8 + 25*N*C",
    fixed_grid=True,
)
class FocusedLinearAttention(Attention):
    """y_n = sum_m w_nm v_m + dwc(v)_n with w_nm = f(q_n) f(k_m) / sum_j f(q_n) f(k_j), then a projection.

    f takes the ReLU, divides by a learned scale a channel and raises to a power, keeping the norm over all channels.
    The weights are never formed: f(k)^T v is summed first, one head_dim x head_dim matrix a head.

    Args:
        dim: channels of x.
        num_heads: heads; divides `dim_out`.
        dim_out: channels of the answer, and of q, k and v; `dim` unless given.
        qkv_bias: biases in the projections to q, k and v.
        focusing_factor: the power; 1 is plain ReLU linear attention.
        kernel_size: of the depthwise convolution of v, one kernel a channel of a head, shared by the heads.
        lepe: kernel size of a second one with a kernel for every channel, as CSWin adds it; 0 for none.
        proj_drop: dropout of the answer.
        proj: whether a linear layer follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them; keys carry a learned table of positions, made
            for this grid and resized to others.

    A masked key counts neither in sums nor in means, and is zero for the convolutions.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        dim_out: int | None = None,
        qkv_bias: bool = True,
        focusing_factor: int = 3,
        kernel_size: int = 5,
        lepe: int = 0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(dim, dim_out, grid_size, num_prefix_tokens)
        self.num_heads = num_heads
        self.head_dim = check_heads("focused_linear", self.dim_out, num_heads)
        if focusing_factor < 1:
            raise UsageError(f"attention 'focused_linear': focusing_factor={focusing_factor}, it must be at least 1")
        self.focusing_factor = focusing_factor
        # The paper's: keeps queries, keys and the normaliser away from zero.
        self.eps = 1e-6
        kernel = check_kernel("focused_linear", "kernel_size", kernel_size)
        local = check_kernel("focused_linear", "lepe", lepe, smallest=0)
        rows = num_prefix_tokens + self.grid_size[0] * self.grid_size[1]
        self.qkv = nn.Linear(dim, 3 * self.dim_out, bias=qkv_bias)
        self.scale = nn.Parameter(torch.zeros(1, 1, self.dim_out))
        self.positional_encoding = nn.Parameter(torch.zeros(1, rows, self.dim_out))
        self.resize = TableResize(self.grid_size, num_prefix_tokens)
        self.dwc = nn.Conv2d(self.head_dim, self.head_dim, kernel, padding=kernel // 2, groups=self.head_dim)
        width = self.dim_out
        self.lepe = nn.Conv2d(width, width, local, padding=local // 2, groups=width) if local else None
        self.proj = nn.Linear(self.dim_out, self.dim_out) if proj else nn.Identity()
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
            raise ValueError("attention 'focused_linear' has no logits, so it takes no bias; use 'softmax' for that")
        grid = self.token_grid(x, grid)
        q, k, v = self.project(x, grid, key_mask)
        # The values of float16 end where sums over thousands of tokens may go.
        work = torch.float32 if v.dtype == torch.float16 else v.dtype
        values = v.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2).to(work)
        q, k = q.to(work), k.to(work)
        out = self._weigh(q, k, values) if torch.jit.is_scripting() else self._weigh_precisely(q, k, values)
        out = out.transpose(1, 2).flatten(2).to(v.dtype)
        out = out + self.depthwise(v, grid, key_mask)
        if key_mask is not None:
            out = out.masked_fill(~key_mask.any(dim=1)[:, None, None], 0.0)
        return self.proj_drop(self.proj(out))

    @staticmethod
    def _weigh(q: Tensor, k: Tensor, values: Tensor) -> Tensor:
        return q @ (k.transpose(-2, -1) @ values * q.shape[2] ** -0.5)

    @torch.jit.unused
    def _weigh_precisely(self, q: Tensor, k: Tensor, values: Tensor) -> Tensor:
        # A query that meets no key is divided by 1e-6 and would leave float16, which autocast went back to.
        with without_autocast(q):
            return self._weigh(q, k, values)

    def attention_map(
        self, x: Tensor, grid: Grid | None = None, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """float32 weights (B, heads, queries, keys) that forward implies, without the depthwise terms.

        A row sums to 1 minus the share of the normaliser's 1e-6.
        """
        q, k, _ = self.project(x, self.token_grid(x, grid), key_mask)
        with without_autocast(x):
            return (q.float() @ k.float().transpose(-2, -1)) * x.shape[1] ** -0.5

    def project(self, x: Tensor, grid: tuple[int, int], key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised f(q), f(k) / sqrt(tokens): (B, heads, tokens, head_dim), float32 or wider; v (B, tokens, C).

        The square root belongs to the mean over keys; the other one is left to the caller, so that neither factor of
        the sum grows with the tokens.
        """
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        wide = torch.promote_types(v.dtype, torch.float32)
        scale = F.softplus(self.scale.to(wide))
        k = k.to(wide) + self.resize(self.positional_encoding, grid)
        root = x.shape[1] ** -0.5
        q = self.focus(q.to(wide), scale, 1.0)
        k = self.focus(k, scale, root)
        if key_mask is not None:
            count = key_mask.sum(dim=1, keepdim=True).clamp(min=1)
            k = k * (key_mask * (x.shape[1] / count))[:, :, None].to(wide)
        mean = k.sum(dim=1, keepdim=True) * root
        heads = (self.num_heads, self.head_dim)
        normaliser = (q * mean).unflatten(2, heads).sum(dim=-1, keepdim=True) + self.eps
        q = q.unflatten(2, heads) / normaliser
        return q.transpose(1, 2), k.unflatten(2, heads).transpose(1, 2), v

    def focus(self, x: Tensor, scale: Tensor, gain: float) -> Tensor:
        """gain * ||t|| * t^p / ||t^p|| over all channels, for t = (relu(x) + 1e-6) / scale."""
        x = (x.relu() + self.eps) / scale
        norm = x.norm(2, dim=-1, keepdim=True)
        # Unit length first: the power of a token that ReLU silenced would fall below the smallest float32.
        power = (x / norm) ** self.focusing_factor
        return power * (gain * norm / power.norm(2, dim=-1, keepdim=True))

    def depthwise(self, v: Tensor, grid: tuple[int, int], key_mask: Tensor | None = None) -> Tensor:
        """What is added to the weighted values: the convolutions of v (B, tokens, C)."""
        # (heads, head_dim) is the order of the channels, so one kernel a head repeats.
        weight = self.dwc.weight.repeat(self.num_heads, 1, 1, 1)
        offset = self.dwc.bias
        if offset is not None:
            offset = offset.repeat(self.num_heads)
        out = depthwise_tokens(v, weight, offset, grid, self.num_prefix_tokens, key_mask)
        if self.lepe is not None:
            local = depthwise_tokens(v, self.lepe.weight, self.lepe.bias, grid, self.num_prefix_tokens, key_mask)
            out = out + local
        return out
