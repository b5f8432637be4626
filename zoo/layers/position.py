"""Learned tables of positions, resized to the grid at hand."""

from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import register_notrace_module
from torch import Tensor, nn


@register_notrace_module
class TableResize(nn.Module):
    """Resizes a table (1, P + h*w, C), P prefix rows first, to a grid (H, W): (1, P + H*W, C).

    Bicubic with antialiasing, in float32, as timm does it; the table itself at its own grid. Without gradients the
    result is kept per grid until the table changes; the cache is no part of the state and of no copy.
    """

    def __init__(self, grid_size: tuple[int, int], num_prefix_tokens: int = 0):
        super().__init__()
        self.grid_size = (int(grid_size[0]), int(grid_size[1]))
        self.num_prefix_tokens = num_prefix_tokens
        self._cache: dict[Any, Tensor] = {}

    def forward(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid_size:
            return table
        if torch.jit.is_scripting():
            return self._resize(table, grid)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._resize(table, grid)
        return self._cached(table, grid)

    def _resize(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        old, new = [self.grid_size[0], self.grid_size[1]], [grid[0], grid[1]]
        return resample_abs_pos_embed(table, new, old, num_prefix_tokens=self.num_prefix_tokens)

    @torch.jit.unused
    def _cached(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        # The version counts in-place changes (optimizer steps, load_state_dict); the pointer tells another tensor.
        state: Any = (table.data_ptr(), table._version, table.dtype, table.device)
        if self._cache.get("state") != state:
            self._cache = {"state": state}
        if grid not in self._cache:
            self._cache[grid] = self._resize(table, grid)
        return self._cache[grid]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": {}}
