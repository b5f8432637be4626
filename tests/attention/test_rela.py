"""Rectified linear attention against the equations of arXiv 2104.07012, as loops in float64."""

import pytest
import torch

from .loops import DIM, EXACT, close, gather, heads, image, make, products, project

SEEN = torch.tensor([[True, False, True, True, False, True, True]])


def answer(attention, x, gated, seen=None, bias=None):
    q, k, v = (heads(part) for part in project(attention.qkv, x, DIM, DIM, DIM))
    z = []
    for a in range(len(q)):
        weights = products(q[a], k[a])
        for i in range(len(x)):
            for j in range(len(x)):
                logit = weights[i, j].item() + (0.0 if bias is None else bias[a, i, j].item())
                weights[i, j] = max(logit, 0.0) if seen is None or seen[j] else 0.0
        z.append(gather(weights, v[a]))
    z = torch.cat(z, dim=1)
    out = torch.stack([row / torch.sqrt((row**2).mean() + 1e-6) * attention.gain for row in z])
    if gated:
        out = out / (1 + torch.exp(-attention.gate * z))
    return close(attention, out)


@pytest.mark.parametrize("mask", [None, SEEN])
@pytest.mark.parametrize("name", ["rela", "rela_gated"])
def test_equals_the_loop(name, mask):
    attention, x = make(name), image()
    seen = None if mask is None else mask[0]
    torch.testing.assert_close(attention(x, key_mask=mask)[0], answer(attention, x[0], "gated" in name, seen), **EXACT)
    bias = image(7, 7, batch=3)
    with_bias = answer(attention, x[0], "gated" in name, seen, bias)
    torch.testing.assert_close(attention(x, key_mask=mask, bias=bias[None])[0], with_bias, **EXACT)


def test_a_masked_key_is_nothing_however_large_its_product():
    for name in ("rela", "rela_gated"):
        attention, x = make(name), 300 * image()
        want = answer(attention, x[0], "gated" in name, SEEN[0])
        q, k, _ = (heads(part) for part in project(attention.qkv, x[0], DIM, DIM, DIM))
        assert products(q[0], k[0]).max() > 3e4
        torch.testing.assert_close(attention(x, key_mask=SEEN)[0], want, **EXACT)


def test_the_scale_of_queries_is_cosmetic_without_a_gate():
    for name in ("rela", "rela_gated"):
        attention, x = make(name), image()
        attention.eps = 0.0
        before = attention(x)
        with torch.no_grad():
            attention.qkv.weight[:DIM] *= 3
            attention.qkv.bias[:DIM] *= 3
        after = attention(x)
        assert torch.allclose(before, after, rtol=1e-9, atol=1e-10) == (name == "rela")


def constant_logits(attention, value):
    """Queries and keys whose product is `value` in every head, whatever the tokens."""
    with torch.no_grad():
        attention.qkv.weight[: 2 * DIM] = 0
        attention.qkv.bias[:DIM] = value
        attention.qkv.bias[DIM : 2 * DIM] = 1
    return attention


@pytest.mark.parametrize("name", ["rela", "rela_gated"])
def test_equal_logits_above_zero_are_the_norm_of_the_mean(name):
    attention, x = constant_logits(make(name), 0.5), image()
    attention.eps = 0.0
    (*_, v) = project(attention.qkv, x[0], DIM, DIM, DIM)
    mean = v.mean(dim=0)
    want = mean / torch.sqrt((mean**2).mean()) * attention.gain
    if name == "rela_gated":
        # 7 keys, each of weight 0.5 * 4 / sqrt(4).
        want = want * torch.sigmoid(attention.gate * 7 * mean)
    torch.testing.assert_close(attention(x)[0], close(attention, want[None]).expand(7, -1), **EXACT)


@pytest.mark.parametrize("name", ["rela", "rela_gated"])
def test_logits_below_zero_answer_exactly_nothing(name):
    attention, x = constant_logits(make(name, proj=False), -0.5), image().requires_grad_()
    out = attention(x)
    assert torch.equal(out, torch.zeros_like(out))
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_sums_of_many_half_precision_keys_stay_finite():
    """4,096 keys of weight 30 and values of 10 sum to more than float16 holds."""
    attention = constant_logits(make("rela", num_heads=1), 30.0).half()
    with torch.no_grad():
        attention.qkv.bias[2 * DIM :] = 10
    out = attention(image(4096).half())
    assert out.isfinite().all()
    assert out.abs().max() > 0
