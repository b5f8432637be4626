"""The definition of correct, in plain torch: maths in float32, operands of the two products in the dtype of v."""

import torch
from torch import Tensor


def focused_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    scale: Tensor,
    num_heads: int,
    power: int = 3,
    key_mask: Tensor | None = None,
) -> Tensor:
    """See zoo.kernels.focused_linear_attention."""
    # The values of float16 end where sums over thousands of tokens may go.
    work = torch.float32 if v.dtype == torch.float16 else v.dtype
    wide = torch.promote_types(v.dtype, torch.float32)
    root = q.shape[1] ** -0.5
    keys = focused_keys(k.to(wide), positions, scale, power, key_mask)
    queries = normalised(focus(q.to(wide), scale, power), keys, num_heads)
    # Heads outside before the keys are turned: a product turns them as it reads, where a copy would be written badly.
    queries, keys = by_head(queries, num_heads).to(work), by_head(keys, num_heads).to(work)
    answer = torch.bmm(queries, torch.bmm(keys.transpose(1, 2), by_head(v, num_heads).to(work)) * root)
    return answer.to(v.dtype).unflatten(0, [q.shape[0], num_heads]).transpose(1, 2).flatten(2)


def by_head(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, heads * d) -> (B * heads, N, d)."""
    return x.unflatten(2, [num_heads, x.shape[2] // num_heads]).transpose(1, 2).flatten(0, 1)


def focus(x: Tensor, scale: Tensor, power: int, gain: float = 1.0) -> Tensor:
    """gain * ||t|| * t^p / ||t^p|| over all channels of x (B, N, C), for t = (relu(x) + 1e-6) / scale."""
    # The paper's 1e-6, here and below: keeps queries, keys and the normaliser away from zero.
    x = (x.relu() + 1e-6) / scale
    norm = x.norm(2, dim=-1, keepdim=True)
    # Unit length first: the power of a token that ReLU silenced would fall below the smallest float32.
    raised = (x / norm) ** power
    return raised * (gain * norm / raised.norm(2, dim=-1, keepdim=True))


def focused_keys(k: Tensor, positions: Tensor, scale: Tensor, power: int, key_mask: Tensor | None) -> Tensor:
    """Focused keys / sqrt(tokens) of k (B, N, C); masked ones are zero, and the others make up for them.

    The square root belongs to the mean over keys; the other one is left to the caller, so that neither factor of the
    sum grows with the tokens.
    """
    count = k.shape[1]
    keys = focus(k + positions, scale, power, count**-0.5)
    if key_mask is not None:
        seen = key_mask.sum(dim=1, keepdim=True).clamp(min=1)
        keys = keys * (key_mask * (count / seen))[:, :, None].to(keys.dtype)
    return keys


def normalised(queries: Tensor, keys: Tensor, num_heads: int) -> Tensor:
    """Focused queries (B, N, C), divided head by head by 1e-6 and their product with the mean of `focused_keys`."""
    mean = keys.sum(dim=1, keepdim=True) * keys.shape[1] ** -0.5
    heads = [num_heads, keys.shape[2] // num_heads]
    normaliser = (queries * mean).unflatten(2, heads).sum(dim=-1, keepdim=True) + 1e-6
    return (queries.unflatten(2, heads) / normaliser).flatten(2)
