"""Normalized attention pooling against the equations of arXiv 2005.09561, as loops in float64."""

import math

import pytest
import torch

from .loops import DIM, EXACT, HEADS, close, gather, heads, image, make, products, project

SEEN = torch.tensor([[True, False, True, True, False, True, True]])


def weights_loop(attention, x, seen=None, eps=1e-3):
    q, k, _ = (heads(part) for part in project(attention.qkv, x, DIM, DIM, DIM))
    found = []
    for a in range(HEADS):
        logits = products(q[a], k[a], scale=1.0)
        out = torch.zeros_like(logits)
        allowed = [j for j in range(len(x)) if seen is None or seen[j]]
        for i in range(len(x)):
            row = [logits[i, j].item() for j in allowed]
            mean = sum(row) / len(row)
            std = math.sqrt(sum((value - mean) ** 2 for value in row) / len(row))
            for j, value in zip(allowed, row, strict=True):
                out[i, j] = attention.gamma[a, 0, 0] * (value - mean) / (std + eps) + attention.beta[a, 0, 0]
        found.append(out)
    return found


def values(attention, x):
    return heads(project(attention.qkv, x, DIM, DIM, DIM)[2])


def after(attention, merged):
    """LayerNorm over the channels, GELU by its integral, projection."""
    rows = []
    for row in merged:
        centred = row - row.mean()
        row = centred / torch.sqrt((centred**2).mean() + 1e-5) * attention.norm.weight + attention.norm.bias
        if attention.gelu:
            row = torch.tensor([value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in row.tolist()])
        rows.append(row.double())
    return close(attention, torch.stack(rows))


# GELU's numbers pass through a float32 tensor in the loop only when torch's default says so.
@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("mask", [None, SEEN])
def test_equals_the_loop(mask, gelu):
    attention, x = make("normalized", gelu=gelu), image()
    weights = weights_loop(attention, x[0], None if mask is None else mask[0])
    merged = torch.cat([gather(w, v) for w, v in zip(weights, values(attention, x[0]), strict=True)], dim=1)
    torch.testing.assert_close(attention(x, key_mask=mask)[0], after(attention, merged), **EXACT)


def raw(attention, x, v=None):
    """The weighted values (heads, N, d) before the norm, of v or of the mechanism's own."""
    weights, own = attention.attend(x, None, None, None)
    return (weights @ (own if v is None else v))[0]


def with_numbers(attention, gamma, beta):
    with torch.no_grad():
        attention.gamma.fill_(gamma)
        attention.beta.fill_(beta)
    return attention


def test_without_beta_a_vector_added_to_all_values_changes_nothing():
    attention, x = with_numbers(make("normalized"), 0.7, 0.0), image()
    weights, v = attention.attend(x, None, None, None)
    torch.testing.assert_close(weights.sum(-1), torch.zeros(1, HEADS, 7), **EXACT)
    torch.testing.assert_close(
        raw(attention, x, v + torch.randn(1, HEADS, 1, DIM // HEADS)), raw(attention, x), **EXACT
    )


def test_without_beta_it_is_a_covariance():
    """N * cov(l_i, v) / std(l_i)."""
    attention, x = with_numbers(make("normalized"), 1.0, 0.0), image()
    q, k, _ = (heads(part) for part in project(attention.qkv, x[0], DIM, DIM, DIM))
    for a, v in enumerate(values(attention, x[0])):
        logits = products(q[a], k[a], scale=1.0)
        for i in range(7):
            covariance = ((logits[i] - logits[i].mean())[:, None] * (v - v.mean(dim=0))).mean(dim=0)
            want = 7 * covariance / (logits[i].std(correction=0) + 1e-3)
            torch.testing.assert_close(raw(attention, x)[a, i], want, **EXACT)


def test_logits_may_be_stretched_and_moved():
    """Without the small number: l -> 3 l + 5, by queries three times as long and a key that all share."""
    attention, x = make("normalized"), image()
    attention.eps = 0.0
    q, k, _ = attention.qkv(x).unflatten(2, (3 * HEADS, -1)).transpose(1, 2).chunk(3, dim=1)
    shift = torch.randn(1, HEADS, 1, DIM // HEADS)
    plain = attention.weigh(q, k, None, None, None)
    torch.testing.assert_close(attention.weigh(3 * q, k + shift, None, None, None), plain, **EXACT)


@pytest.mark.parametrize(("beta", "total"), [(1 / 7, 1.0), (1.0, 7.0)])
def test_without_gamma_it_pools(beta, total):
    attention, x = with_numbers(make("normalized"), 0.0, beta), image()
    for a, v in enumerate(values(attention, x[0])):
        torch.testing.assert_close(raw(attention, x)[a], total * v.mean(dim=0).expand(7, -1), **EXACT)


def test_one_key_has_no_deviation():
    attention, x = with_numbers(make("normalized"), 2.0, 0.0), image(1).requires_grad_()
    assert torch.equal(raw(attention, x), torch.zeros(HEADS, 1, DIM // HEADS))
    attention(x).sum().backward()
    assert x.grad.isfinite().all()


def test_tokens_that_are_alike_are_no_noise():
    """Standardised and normed once more, what rounding leaves of equal logits would be an answer of its own."""
    attention = with_numbers(make("normalized"), 1.0, 0.0).float()
    x = image(1).expand(1, 196, DIM).float()
    low, high = attention(x), attention.double()(x.double())
    # Without the deviations nothing is left but the bias of the norm.
    torch.testing.assert_close(low.double(), high, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(high[0, 0], after(attention, torch.zeros(1, DIM))[0], rtol=1e-6, atol=1e-6)
