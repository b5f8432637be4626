"""Oracles that several mechanisms share: attention of one image, pair by pair in float64."""

import math

import torch

from zoo.attention import create_attention

DIM, HEADS = 16, 4
# Both sides are computed in float64; only the order of sums differs.
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def make(name, dim=DIM, **options):
    torch.manual_seed(3)
    return create_attention(name, dim, **{"num_heads": HEADS, **options}).double().eval()


def image(count, dim=DIM, seed=4):
    return torch.randn(1, count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cells(grid):
    """(row, column) of every token of a grid."""
    return [(row, column) for row in range(grid[0]) for column in range(grid[1])]


def linear(module, row):
    out = module.weight @ row
    return out if module.bias is None else out + module.bias


def projected(attention, x):
    """q, k, v of one image: lists over heads of (tokens, head_dim), from a joint projection `qkv`."""
    rows = torch.stack([linear(attention.qkv, row) for row in x])
    return [list(part.split(attention.head_dim, dim=1)) for part in rows.chunk(3, dim=1)]


def softmax_row(logits, values):
    """sum_m softmax(logits)_m values_m for a list of logits; zero for an empty list."""
    if not logits:
        return 0.0
    top = max(logits)
    total = sum(math.exp(logit - top) for logit in logits)
    return sum(math.exp(logit - top) / total * value for logit, value in zip(logits, values, strict=True))


def attend(q, k, v, seen):
    """Answers (tokens, head_dim) of one head; `seen(n, m)` says whether query n sees key m."""
    out = torch.zeros(len(q), v.shape[1], dtype=torch.float64)
    for n in range(len(q)):
        keys = [m for m in range(len(k)) if seen(n, m)]
        out[n] += softmax_row([(q[n] @ k[m]).item() / math.sqrt(q.shape[1]) for m in keys], [v[m] for m in keys])
    return out


def answer(attention, heads):
    """The projection of what the heads answer."""
    return torch.stack([linear(attention.proj, row) for row in torch.cat(heads, dim=1)])


def as_softmax(attention, name="softmax"):
    """Softmax attention with the same projections."""
    twin = make(name, num_heads=attention.num_heads, num_prefix_tokens=attention.num_prefix_tokens)
    twin.load_state_dict({key: value for key, value in attention.state_dict().items() if key in twin.state_dict()})
    return twin
