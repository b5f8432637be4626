"""Learned tables of positions, resized to the grid at hand."""

from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import register_notrace_module
from torch import Tensor, nn


@register_notrace_module
class TableResize(nn.Module):
    """Resizes a table (1, P + h*w, C), P prefix rows first, to a grid (H, W): (1, P + H*W, C).

    Bicubic with antialiasing, in float32, as timm does it; the table itself at its own grid. In evaluation mode and
    without gradients the result is kept per grid until the table changes or `train()` or `eval()` is called; the cache
    is no part of the state and of no copy. While a model stays in evaluation mode, changes that torch does not count
    (through `.data`, by a fused optimizer) go unseen: call `eval()` after them.
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
        if self.training or torch.is_grad_enabled():
            return self._resize(table, grid)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._resize(table, grid)
        return self._cached(table, grid)

    def _resize(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        old, new = [self.grid_size[0], self.grid_size[1]], [grid[0], grid[1]]
        if grid[1] == 1 and grid[0] > 1:
            # On the CPU torch (2.11 to 2.14) resizes to one column wrongly in some layouts: the same table lying
            # on its side becomes one row, which is right.
            first = table[:, : self.num_prefix_tokens]
            side = table[:, self.num_prefix_tokens :].unflatten(1, old).transpose(1, 2).flatten(1, 2)
            table, old, new = torch.cat([first, side], dim=1), [old[1], old[0]], [1, grid[0]]
        return resample_abs_pos_embed(table, new, old, num_prefix_tokens=self.num_prefix_tokens)

    @torch.jit.unused
    def _cached(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        if table.is_inference():  # such tensors have no version; asked here, where torch.compile does not come
            return self._resize(table, grid)
        # The version counts in-place changes (optimizer steps, load_state_dict); the pointer tells another tensor, as
        # long as the alias keeps this one's memory from being given to the next.
        state: Any = (table.data_ptr(), table._version, table.dtype, table.device)
        if self._cache.get("state") != state:
            self._cache = {"state": state, "alias": table.detach()}
        if grid not in self._cache:
            self._cache[grid] = self._resize(table, grid)
        return self._cache[grid]

    def train(self, mode: bool = True) -> "TableResize":
        """Forgets what was kept: fused optimizers change the table without counting up its version."""
        self._cache = {}
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": {}}
