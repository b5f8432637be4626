"""The definition of correct, in plain torch: an attention without softmax whose logits depend on positions alone."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits that exist at once, in an eager call on several images; they are made again in the backward pass.
LOGITS = 2**24
# Side of the blocks of queries that share a window of keys; where a window would hold the map, that is one block.
BLOCK = 8


def lambda_attention(q: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """See zoo.kernels.lambda_attention."""
    if torch.jit.is_scripting():
        return _lambda_attention(q, v, table, 8)  # BLOCK: TorchScript reads no globals
    else:
        return _in_chunks(q, v, table)


@torch.jit.unused
def _in_chunks(q: Tensor, v: Tensor, table: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _lambda_attention(q, v, table, BLOCK)  # a graph of one chunk, whatever the batch
    height, width = q.shape[1], q.shape[2]
    window = (2 * (table.shape[0] // 2) + BLOCK) * (2 * (table.shape[1] // 2) + BLOCK)
    logits = height * width * q.shape[3] * min(window, height * width) * v.shape[3]
    images = max(1, LOGITS // max(1, logits))
    if q.shape[0] <= images:
        return _lambda_attention(q, v, table, BLOCK)
    parts = [
        checkpoint(_lambda_attention, *part, table, BLOCK, use_reentrant=False, preserve_rng_state=False)
        for part in zip(q.split(images), v.split(images), strict=True)
    ]
    return torch.cat(parts)


def _lambda_attention(q: Tensor, v: Tensor, table: Tensor, block: int) -> Tensor:
    height, width = q.shape[1], q.shape[2]
    reach_y, reach_x = min(table.shape[0] // 2, height - 1), min(table.shape[1] // 2, width - 1)
    down, right = table.shape[0] // 2 - reach_y, table.shape[1] // 2 - reach_x
    table = table[down : table.shape[0] - down, right : table.shape[1] - right]
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, values, table = q.to(wide), v.to(wide), table.to(wide)
    if (2 * reach_y + block) * (2 * reach_x + block) >= height * width:
        places = _by_place(table, [height, width], [0, 0], [height, width])
        logits = torch.einsum("byxhk,yxpqku->byxhpqu", [queries, places])
        return torch.einsum("byxhpqu,bpqud->byxhd", [logits, values]).to(v.dtype)
    rows, columns = -(-height // block), -(-width // block)
    below, beyond = rows * block - height, columns * block - width
    window_y, window_x = block + 2 * reach_y, block + 2 * reach_x
    queries = F.pad(queries, [0, 0, 0, 0, 0, beyond, 0, below])
    queries = queries.reshape(q.shape[0], rows, block, columns, block, q.shape[3], q.shape[4])
    values = F.pad(values, [0, 0, 0, 0, reach_x, beyond + reach_x, reach_y, below + reach_y])
    windows = values.unfold(1, window_y, block).unfold(2, window_x, block)
    places = _by_place(table, [block, block], [reach_y, reach_x], [window_y, window_x])
    logits = torch.einsum("byixjhk,ijpqku->byxijhpqu", [queries, places])
    out = torch.einsum("byxijhpqu,byxudpq->byixjhd", [logits, windows])
    out = out.reshape(q.shape[0], rows * block, columns * block, q.shape[3], v.shape[4])
    return out[:, :height, :width].to(v.dtype)


def _by_place(table: Tensor, block: list[int], before: list[int], window: list[int]) -> Tensor:
    """(block, block, window, window, k, u): the table's entry for each query of a block and key of its window.

    The window starts `before` places before the block; beyond the table's reach stands zero.
    """
    # One row and column of zeros around the table: every offset beyond its reach falls on them.
    padded = F.pad(table, [0, 0, 0, 0, 1, 1, 1, 1])
    down = _offsets(block[0], before[0], window[0], table.shape[0], table.device)
    right = _offsets(block[1], before[1], window[1], table.shape[1], table.device)
    return padded[down[:, None, :, None], right[None, :, None, :]]


def _offsets(block: int, before: int, window: int, size: int, device: torch.device) -> Tensor:
    """(block, window): index into the padded table."""
    key = torch.arange(window, device=device) - before
    query = torch.arange(block, device=device)
    return (key[None, :] - query[:, None] + size // 2).clamp(-1, size) + 1
