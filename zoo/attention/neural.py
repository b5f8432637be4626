"""Neural attention: a small network says how much a key counts for a query, in the place of their product.

Source: DiGiugno and Mahmood, "Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models",
arXiv 2502.17206; layers and widths are those of the authors' release. Two things differ from it: a width has at least
2 (heads of 64 channels would have one unit in the last layer, which is dead or alive from the start), and the last
bias, which no softmax sees, is left out.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention._heads import MapAttention, masked_softmax
from zoo.attention.base import Grid
from zoo.attention.registry import register_attention
from zoo.errors import UsageError


@register_attention(
    "neural",
    paper="Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models, arXiv 2502.17206",
    supports=("key_mask", "bias", "prefix"),
    prefix="mix",
    # 8 heads; widths of 2 in the layers of the network, below 96 channels a head.
    cost="4*N*C**2 + 4*N*C + 64*N + N**2*C + 48*N**2",
    forms_map=True,
)
class NeuralAttention(MapAttention):
    """softmax(w . relu(W2 relu(U q'_i + V k'_j + b1) + b2)) v with q', k' projections of q, k to `width` channels.

    [U V] is the first layer of the network over [q'; k'], so the pairs are a sum and never concatenated. The network
    is one for all heads. The authors replace attention so in the first layer of their network alone (`attn` and
    `attn_options` of a network take a list).

    Args:
        dim: channels of x.
        num_heads: heads; divides `dim_out`.
        width: channels of q' and k' and units of the first layer; the second has half as many, at least 2. A 32nd of
            the channels of a head, at least 2, unless given.
        dim_out: channels of the answer, and of q, k and v; `dim` unless given.
        qkv_bias: biases in the projections to q, k and v.
        attn_drop, proj_drop: dropout of the weights and of the answer.
        proj: whether a linear layer follows.
        grid_size, num_prefix_tokens: as `create_attention` takes them.

    Forms a map of N x N x `width`, bounded by `check_map`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        width: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(
            "neural", dim, num_heads, dim_out, qkv_bias, attn_drop, proj_drop, proj, grid_size, num_prefix_tokens
        )
        width = max(2, self.head_dim // 32) if width is None else width
        if width < 1:
            raise UsageError(f"attention 'neural': width={width}; give at least 1")
        self.map_width = width
        second = max(2, width // 2)
        # Parameters and not linear layers: networks start those anew, so small that no score would differ.
        self.q_in, self.q_bias = _start(self.head_dim, width)
        self.k_in, self.k_bias = _start(self.head_dim, width)
        self.first, self.first_bias = _start(2 * width, width)
        self.second, self.second_bias = _start(width, second)
        self.last = _start(second, 1)[0]

    def weigh(
        self, q: Tensor, k: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Weights (B, heads, N, N); a row sums to 1."""
        return masked_softmax(self.score(q, k), key_mask, bias)

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """Logits (B, heads, N, N) of q and k (B, heads, N, d)."""
        of_q, of_k = self.first.chunk(2, dim=1)
        q = F.linear(F.linear(q, self.q_in, self.q_bias), of_q, self.first_bias)
        k = F.linear(F.linear(k, self.k_in, self.k_bias), of_k)
        pairs = (q.unsqueeze(3) + k.unsqueeze(2)).relu()
        return F.linear(F.linear(pairs, self.second, self.second_bias).relu(), self.last).squeeze(4)


def _start(inputs: int, outputs: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight (outputs, inputs) and bias as torch's linear layers start."""
    layer = nn.Linear(inputs, outputs)
    return nn.Parameter(layer.weight.detach()), nn.Parameter(layer.bias.detach())
