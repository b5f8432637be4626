"""Neighbourhoods whose size differs from head to head and from layer to layer.

Source: Xu et al., "MSWA: Refining Local Attention with Multi-Scale Window Attention", arXiv 2501.01039. The paper's
windows are counts of the keys before a query: w/4, w/2, w, 2w over four groups of heads, and again over four groups of
layers. Here a window is a square around the query and the counts are areas, so that their ratios, hence the budget,
stay the paper's: a side changes by the square root of 2.
"""

import torch
from torch import Tensor

from zoo.attention._pairs import PairAttention, places
from zoo.attention.base import Grid
from zoo.attention.registry import register_attention
from zoo.errors import UsageError

GROUPS = 4


def odd_side(side: float, factor: float) -> int:
    """The odd whole number nearest to `side * factor`, at least 3 unless `side` is 1."""
    wanted = side * factor
    return 1 if side == 1 else max(3, 2 * int((wanted - 1) / 2 + 0.5) + 1)


@register_attention(
    "multi_scale_window",
    paper="MSWA: Refining Local Attention with Multi-Scale Window Attention, arXiv 2501.01039",
    supports=("key_mask", "bias", "prefix"),
    prefix="mix",
    cost="4*N*C**2 + 2*N**2*C",
    forms_map=True,
    confidence="medium",
)
class MultiScaleWindowAttention(PairAttention):
    """Softmax attention of each cell to the square around it, whose side depends on the head.

    The heads, in four groups (head a of h is in group g = floor(4a / h)), have sides
    window_size * 2^((g - 2) / 2) * 2^((layer_group - 2) / 2), rounded to odd numbers of at least 3: 3, 5, 7 and 9 for
    7 and the layer group 2. What of a square lies beyond the grid is cut off. All N x N weights are computed (the
    windows themselves have a mean of side^2 keys a query), with one mask for the batch.

    Args:
        dim: channels of x.
        window_size: the odd side of the third group; 1 makes every window the cell itself.
        multi_scale: whether sides differ over the heads; False gives all of them the third group's.
        layer_group: 0 (the first quarter of a network's layers) to 3 (the last). A network takes it block by block,
            in a ViT `attn_options=[{"layer_group": 4 * i // depth} for i in range(depth)]`.

    The other arguments are those of `HeadAttention` and `qkv_bias`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        dim_out: int | None = None,
        window_size: int = 7,
        multi_scale: bool = True,
        layer_group: int = 2,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(
            *("multi_scale_window", dim, num_heads, dim_out, qkv_bias, attn_drop, proj_drop, proj),
            *(grid_size, num_prefix_tokens),
        )
        if window_size < 1 or window_size % 2 == 0:
            raise UsageError(
                f"attention 'multi_scale_window': window_size={window_size}; a window is centred on its query, so give "
                "an odd size such as 5 or 7"
            )
        if layer_group not in range(GROUPS):
            raise UsageError(f"attention 'multi_scale_window': layer_group={layer_group}; valid: 0, 1, 2, 3")
        depth = 2 ** ((layer_group - 2) / 2)
        groups = [GROUPS * head // num_heads if multi_scale else 2 for head in range(num_heads)]
        self.sides = [odd_side(window_size, depth * 2 ** ((group - 2) / 2)) for group in groups]

    def pairs(self, q: Tensor, k: Tensor, grid: tuple[int, int], key_mask: Tensor | None) -> Tensor:
        """bool (1, heads, H*W, H*W): no further apart than half a side along either axis."""
        y, x = places(grid, q.device)
        apart = torch.maximum((y[:, None] - y[None, :]).abs(), (x[:, None] - x[None, :]).abs())
        return torch.stack([apart <= side // 2 for side in self.sides])[None]
