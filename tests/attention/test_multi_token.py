"""Multi-token attention against the equations of arXiv 2504.00927 on a grid, as loops in float64."""

import math

import pytest
import torch

from zoo.attention import create_attention
from zoo.errors import UsageError

from .loops import DIM, EXACT, close, gather, heads, image, make, products, project, same_weights, softmax_rows

GRID = (3, 4)
HEADS = 4
WIDTH = DIM // HEADS


def convolve_loop(logits, kernel, grid, prefix, seen):
    """sum over shifts of kernel * the pair of shifted places; zero off the grid and where a token is hidden."""
    out = logits.clone()
    height, width = grid
    reach, far = kernel.shape[0] // 2, kernel.shape[2] // 2
    for qy in range(height):
        for qx in range(width):
            for ky in range(height):
                for kx in range(width):
                    total = 0.0
                    for a in range(kernel.shape[0]):
                        for b in range(kernel.shape[1]):
                            for u in range(kernel.shape[2]):
                                for w in range(kernel.shape[3]):
                                    y, x = qy + a - reach, qx + b - reach
                                    t, s = ky + u - far, kx + w - far
                                    if min(y, x, t, s) < 0 or max(y, t) >= height or max(x, s) >= width:
                                        continue
                                    query, key = prefix + y * width + x, prefix + t * width + s
                                    if seen[query] and seen[key]:
                                        total += (kernel[a, b, u, w] * logits[query, key]).item()
                    out[prefix + qy * width + qx, prefix + ky * width + kx] = total
    return out


def hide(weights, seen, queries=True):
    out = weights.clone()
    for i in range(len(weights)):
        for j in range(len(weights)):
            if not seen[j] or (queries and not seen[i]):
                out[i, j] = 0
    return out


def by_place(kernel):
    """(a * a, c, c) with the query's offsets row by row -> (a, a, c, c)."""
    side = math.isqrt(kernel.shape[0])
    return kernel.unflatten(0, (side, side))


def answer(attention, x, grid, prefix=0, seen=None):
    h = attention.num_heads
    seen = [True] * len(x) if seen is None else seen
    q, k, v = (heads(part, h) for part in project(attention.qkv, x, DIM, DIM, DIM))
    logits = [hide(products(q[a], k[a], (DIM / h) ** -0.5), seen) for a in range(h)]
    logits = [convolve_loop(logits[a], by_place(attention.logit_kernel[a]), grid, prefix, seen) for a in range(h)]
    mixed = [sum(attention.logit_mix[b, a] * logits[a] for a in range(h)) for b in range(h)]
    weights = [hide(softmax_rows(one, seen), seen) for one in mixed]
    weights = [convolve_loop(weights[a], by_place(attention.weight_kernel[a]), grid, prefix, seen) for a in range(h)]
    weights = [hide(one, seen, queries=False) for one in weights]
    group = attention.weight_mix.shape[1]
    out = []
    for b in range(h):
        first = b // group * group
        table = attention.weight_mix[b // group]
        mixed = sum(table[a, b - first] * weights[first + a] for a in range(group))
        rows = gather(mixed, v[b])
        if attention.gain is not None:
            rows = torch.stack([row / torch.sqrt((row**2).mean() + 1e-5) * attention.gain for row in rows])
            gates = torch.sigmoid((rows * attention.gate).sum(dim=1) + attention.gate_bias)
            rows = rows * gates[:, None]
        out.append(rows)
    return close(attention, torch.cat(out, dim=1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head_group": 2, "query_kernel": 1, "norm": False},
        {"head_group": 1, "query_kernel": 3, "key_kernel": 5},
    ],
)
@pytest.mark.parametrize("prefix", [0, 1])
def test_equals_the_loop(options, prefix):
    attention = make("multi_token", num_heads=HEADS, num_prefix_tokens=prefix, **options)
    x = image(prefix + 12)
    torch.testing.assert_close(attention(x, GRID)[0], answer(attention, x[0], GRID, prefix), **EXACT)


def test_hidden_tokens_are_off_the_grid():
    """A masked last row is as a grid without it, for queries and keys alike."""
    attention, x = make("multi_token", num_heads=HEADS), image(12)
    mask = torch.tensor([[True] * 8 + [False] * 4])
    out = attention(x, GRID, key_mask=mask)
    torch.testing.assert_close(out[0], answer(attention, x[0], GRID, seen=mask[0].tolist()), **EXACT)
    torch.testing.assert_close(out[:, :8], attention(x[:, :8], (2, 4)), **EXACT)


def plain(attention):
    """Kernels and mixing as they start."""
    fresh = create_attention("multi_token", DIM, num_heads=HEADS).state_dict()
    return same_weights(attention, attention, **{k: v for k, v in fresh.items() if "kernel" in k or "mix" in k})


def test_as_it_starts_without_norm_it_is_multi_head_attention():
    softmax, x = make("softmax", num_heads=HEADS), image(12)
    attention = plain(same_weights(make("multi_token", num_heads=HEADS, norm=False), softmax))
    torch.testing.assert_close(attention(x, GRID), softmax(x), **EXACT)


def test_kernels_of_zero_are_the_mean():
    attention, x = plain(make("multi_token", num_heads=HEADS, norm=False)), image(12)
    with torch.no_grad():
        attention.logit_kernel.zero_()
    (*_, v) = project(attention.qkv, x[0], DIM, DIM, DIM)
    want = close(attention, v.mean(dim=0, keepdim=True)).expand(12, -1)
    torch.testing.assert_close(attention(x, GRID)[0], want, **EXACT)


def test_groups_of_one_head_do_not_mix():
    attention, x = make("multi_token", num_heads=HEADS, head_group=1, norm=False, proj=False), image(12)
    with torch.no_grad():
        attention.logit_mix.copy_(torch.eye(HEADS))
    before = attention(x, GRID)
    with torch.no_grad():  # another first head
        attention.qkv.weight[:WIDTH] *= -2
    changed = (attention(x, GRID) - before).abs().amax(dim=(0, 1)) > 1e-12
    assert changed[:WIDTH].all()
    assert not changed[WIDTH:].any()


def test_mixing_alone_is_talking_heads():
    """Shazeer et al., arXiv 2003.02436: logits and weights mixed over heads."""
    attention, x = make("multi_token", num_heads=HEADS, query_kernel=1, key_kernel=1, norm=False), image(12)
    with torch.no_grad():
        attention.logit_kernel.fill_(1)
        attention.weight_kernel.fill_(1)
    q, k, v = attention.qkv(x).unflatten(2, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
    logits = torch.einsum("bhid,bhjd,gh->bgij", q, k, attention.logit_mix) / WIDTH**0.5
    weights = torch.einsum("bgij,gf->bfij", logits.softmax(-1), attention.weight_mix[0])
    want = attention.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, GRID), want, **EXACT)


def test_a_kernel_moves_query_and_key_together():
    """Cross-correlation: a one at (+1, 0, +1, 0) reads the logit of both neighbours below."""
    attention, x = plain(make("multi_token", num_heads=HEADS, norm=False)), image(12)
    with torch.no_grad():
        attention.logit_kernel.zero_()
        attention.logit_kernel[:, 2 * 3 + 1, 2, 1] = 1
    weights = attention.attention_map(x, GRID)
    q, k, _ = (heads(part, HEADS) for part in project(attention.qkv, x[0], DIM, DIM, DIM))
    logits = products(q[0], k[0], WIDTH**-0.5)
    moved = torch.zeros_like(logits)
    moved[:8, :8] = logits[4:, 4:]
    torch.testing.assert_close(weights[0, 0], softmax_rows(moved), **EXACT)


def test_head_groups_must_divide_the_heads():
    with pytest.raises(UsageError, match=r"head_group=3 does not divide 4 heads; valid: \[1, 2, 4\]"):
        create_attention("multi_token", DIM, num_heads=HEADS, head_group=3)
    with pytest.raises(UsageError, match="odd"):
        create_attention("multi_token", DIM, num_heads=HEADS, query_kernel=2)
