"""The definition of correct, in plain torch: every window gathered, its softmax in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor | None,
    width_rel: Tensor | None,
    block: int,
    halo: int,
    scale: float,
    stride: int = 1,
    scale_rel: bool = False,
    mask: bool = True,
) -> Tensor:
    """See zoo.kernels.halo_attention."""
    height, width = k.shape[1], k.shape[2]
    rows, columns = -(-height // block), -(-width // block)
    window, side = block + 2 * halo, block // stride
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = F.pad(q, [0, 0, 0, 0, 0, columns * side - q.shape[2], 0, rows * side - q.shape[1]]).to(wide)
    queries = queries.reshape(q.shape[0], rows, side, columns, side, q.shape[3], q.shape[4])
    keys = _windows(k, rows, columns, block, halo).to(wide)
    values = _windows(v, rows, columns, block, halo).to(wide)
    logits = scale * torch.einsum("byixjhd,byxhduv->byxhijuv", [queries, keys])
    if height_rel is not None and width_rel is not None:
        offsets = torch.arange(window, device=q.device) - torch.arange(side, device=q.device)[:, None] + window - 1
        gain = scale if scale_rel else 1.0
        # One product with a whole table, of which each query then takes the window's part.
        down = (queries @ height_rel.to(wide).t()).permute(0, 1, 3, 5, 2, 4, 6)
        right = (queries @ width_rel.to(wide).t()).permute(0, 1, 3, 5, 2, 4, 6)
        sizes = [down.shape[0], rows, columns, down.shape[3], side, side, window]
        down = down.gather(6, offsets[:, None].expand(sizes))
        right = right.gather(6, offsets.expand(sizes))
        logits = logits + gain * (down[..., :, None] + right[..., None, :])
    border = 0 if mask else halo
    inside_y = _inside(height, rows, block, halo, border, q.device)[:, None, :, None]
    inside_x = _inside(width, columns, block, halo, border, q.device)[None, :, None, :]
    outside = ~(inside_y & inside_x)[:, :, None, None, None]
    # Below every logit, and finite: queries beyond the map may see no key at all, and are cut off in the end.
    weights = logits.masked_fill(outside, -1.0e30).flatten(-2).softmax(dim=-1)
    out = torch.einsum("byxhijm,byxhdm->byixjhd", [weights, values.flatten(-2)])
    out = out.reshape(q.shape[0], rows * side, columns * side, q.shape[3], v.shape[4])
    return out[:, : q.shape[1], : q.shape[2]].to(v.dtype)


def _windows(t: Tensor, rows: int, columns: int, block: int, halo: int) -> Tensor:
    """(B, H, W, heads, d) -> (B, rows, columns, heads, d, window, window), zero beyond the map."""
    below, right = rows * block - t.shape[1] + halo, columns * block - t.shape[2] + halo
    padded = F.pad(t, [0, 0, 0, 0, halo, right, halo, below])
    window = block + 2 * halo
    return padded.unfold(1, window, block).unfold(2, window, block)


def _inside(size: int, count: int, block: int, halo: int, border: int, device: torch.device) -> Tensor:
    """(count, window): which places of each window lie in the map or its border of zeros."""
    first = torch.arange(count, device=device)[:, None] * block - halo
    place = first + torch.arange(block + 2 * halo, device=device)
    return (place >= -border) & (place < size + border)
