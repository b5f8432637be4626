"""Carry a mechanism into the other layout; a view wherever the memory is the same.

A dense channels-last map (B, C, H, W) and its tokens (B, H*W, C) are the same memory, so both ways are views there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.base import Attention, Grid


def tokens_to_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, H*W, C) as a channels-last map (B, C, H, W): a view."""
    return x.transpose(1, 2).unflatten(2, grid)


def map_to_tokens(x: Tensor) -> Tensor:
    """A map (B, C, H, W) as tokens (B, H*W, C): a view of a dense channels-last map, else one copy."""
    return x.flatten(2).transpose(1, 2) if x.shape[1] == 1 else x.permute(0, 2, 3, 1).flatten(1, 2)


def given(**arguments: Tensor | None) -> dict[str, Tensor]:
    """The arguments that are there: an `attention_map` has to know them only when they are needed."""
    return {name: value for name, value in arguments.items() if value is not None}


class MapAdapter(Attention):
    """A mechanism over tokens, for a caller that lives in maps: (B, dim, H, W) -> (B, dim_out, H', W')."""

    layout = "map"

    def __init__(self, attn: Attention):
        super().__init__(attn.dim, attn.dim_out, attn.grid_size)
        self.attn = attn
        self.crosses_bias = attn.crosses_bias

    def out_grid(self, grid: Grid) -> Grid:
        return self.attn.out_grid(grid)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        grid = (x.shape[2], x.shape[3])
        out = self.attn(map_to_tokens(x), grid, key_mask=key_mask, bias=bias)
        return tokens_to_map(out, self.attn.out_grid(grid))

    def attention_map(
        self, x: Tensor, grid: Grid | None = None, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        there = given(key_mask=key_mask, bias=bias)
        return self.attn.attention_map(map_to_tokens(x), (x.shape[2], x.shape[3]), **there)


class TokensAdapter(Attention):
    """A mechanism for a caller that lives in tokens: a native map, or one that lets prefix tokens pass unchanged.

    (B, P + H*W, dim) -> (B, P + H'*W', dim_out); the prefix tokens come out as they went in.
    """

    def __init__(self, attn: Attention, num_prefix_tokens: int = 0):
        super().__init__(attn.dim, attn.dim_out, attn.grid_size, num_prefix_tokens)
        if num_prefix_tokens and attn.dim != attn.dim_out:
            raise ValueError(f"prefix tokens of {attn.dim} channels cannot pass where {attn.dim_out} come out")
        self.attn = attn
        self.crosses_bias = attn.crosses_bias
        self.native_map = attn.layout == "map"

    def out_grid(self, grid: Grid) -> Grid:
        return self.attn.out_grid(grid)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        grid = self.token_grid(x, grid)
        prefix = self.num_prefix_tokens
        cells = x[:, prefix:] if prefix else x
        if key_mask is not None:
            key_mask = key_mask[:, prefix:]
        bias = self.of_cells(bias)
        if self.native_map:
            out = map_to_tokens(self.attn(tokens_to_map(cells, grid), grid, key_mask=key_mask, bias=bias))
        else:
            out = self.attn(cells, grid, key_mask=key_mask, bias=bias)
        return torch.cat([x[:, :prefix], out], dim=1) if prefix else out

    def of_cells(self, bias: Tensor | None) -> Tensor | None:
        """What a bias over all tokens says of those that do not pass; one of a single query or key goes on as it is."""
        prefix = self.num_prefix_tokens
        if bias is None or prefix == 0:
            return bias
        if bias.shape[-1] > 1:
            bias = bias[..., prefix:]
        return bias[..., prefix:, :] if bias.dim() > 1 and bias.shape[-2] > 1 else bias

    def attention_map(
        self, x: Tensor, grid: Grid | None = None, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Weights (B, heads, queries, keys); a prefix token, which passes, has all of its weight on itself."""
        grid, prefix = self.token_grid(x, grid), self.num_prefix_tokens
        cells = x[:, prefix:]
        there = given(key_mask=None if key_mask is None else key_mask[:, prefix:], bias=self.of_cells(bias))
        weights = self.attn.attention_map(tokens_to_map(cells, grid) if self.native_map else cells, grid, **there)
        weights = F.pad(weights, (prefix, 0, prefix, 0))
        weights[..., range(prefix), range(prefix)] = 1.0
        return weights
