"""Attention written as loops over tokens in float64: what the tests of single mechanisms compare with."""

import math

import torch

from zoo.attention import create_attention

DIM, HEADS = 12, 3
WIDTH = DIM // HEADS
SCALE = 1 / math.sqrt(WIDTH)
# Both sides are computed in float64; only the order of sums differs.
EXACT = {"rtol": 1e-9, "atol": 1e-10}


def make(name, **options):
    """The mechanism in float64, for evaluation, every parameter moved off its start."""
    torch.manual_seed(3)
    attention = create_attention(name, DIM, **{"num_heads": HEADS, **options}).double().eval()
    with torch.no_grad():
        for value in attention.parameters():
            value += 0.3 * torch.randn_like(value)
    return attention


def same_weights(attention, like, **other):
    """`attention` with the parameters of `like` where names and shapes agree, and `other` values by name."""
    mine = attention.state_dict()
    theirs = {key: value for key, value in like.state_dict().items() if key in mine and mine[key].shape == value.shape}
    attention.load_state_dict({**mine, **theirs, **other}, strict=True)
    return attention


def image(count=7, dim=DIM, batch=1, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, dim, dtype=torch.float64, generator=generator)


def linear(layer, row):
    out = layer.weight @ row
    return out if layer.bias is None else out + layer.bias


def project(layer, x, *widths):
    """Rows of one image x (N, dim) through a linear layer, cut into parts of these widths: tensors (N, width)."""
    return torch.stack([linear(layer, row) for row in x]).split(list(widths) or [DIM], dim=1)


def heads(x, count=HEADS):
    """(N, C) as a list of (N, d), contiguous slices of the channels."""
    width = x.shape[1] // count
    return [x[:, a * width : (a + 1) * width] for a in range(count)]


def softmax_rows(logits, seen=None):
    """exp over sum of exp, entry by entry; zero where seen[j] is False."""
    out = torch.zeros_like(logits)
    for i in range(logits.shape[0]):
        allowed = [j for j in range(logits.shape[1]) if seen is None or seen[j]]
        top = max(logits[i, j].item() for j in allowed)
        total = sum(math.exp(logits[i, j].item() - top) for j in allowed)
        for j in allowed:
            out[i, j] = math.exp(logits[i, j].item() - top) / total
    return out


def products(q, k, scale=SCALE):
    """scale * q_i . k_j, entry by entry."""
    out = torch.zeros(len(q), len(k), dtype=torch.float64)
    for i in range(len(q)):
        for j in range(len(k)):
            out[i, j] = scale * sum((q[i, c] * k[j, c]).item() for c in range(q.shape[1]))
    return out


def gather(weights, v):
    """sum_j weights_ij v_j."""
    out = torch.zeros(weights.shape[0], v.shape[1], dtype=torch.float64)
    for i in range(weights.shape[0]):
        for j in range(weights.shape[1]):
            out[i] += weights[i, j] * v[j]
    return out


def close(attention, merged):
    """The output projection of every token."""
    return torch.stack([linear(attention.proj, row) for row in merged])


def multi_head(attention, q, k, v, seen=None):
    """Softmax attention of lists of heads, and the output projection."""
    out = [gather(softmax_rows(products(a, b), seen), c) for a, b, c in zip(q, k, v, strict=True)]
    return close(attention, torch.cat(out, dim=1))


def pairs_resized(table, old, new):
    """(h*w, h*w) bilinearly to (H*W, H*W), divided among the new number of places."""
    (h, w), (height, width) = old, new
    axes = [torch.eye(n)[:, None, :] for n in (h, w)]
    rows, columns = (
        torch.nn.functional.interpolate(axis, size=size, mode="linear", align_corners=False)[:, 0]
        for axis, size in zip(axes, (height, width), strict=True)
    )
    grid = torch.einsum("abcd,aA,bB,cC,dD->ABCD", table.view(h, w, h, w), rows, columns, rows, columns)
    return grid.reshape(height * width, -1) * (h * w / (height * width))
