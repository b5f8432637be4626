"""Mixture of sparse attention against loops over chosen tokens, and what it becomes at its limits."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.attention import attention_spec, create_attention
from zoo.errors import UsageError

from .pair_loops import DIM, EXACT, attend, image, linear, make


def loop(attention, x, size, always=0, open_=None):
    """y += r_I o W_O over the heads, tokens I chosen by sorting."""
    d = attention.head_dim
    out = torch.zeros(len(x), attention.dim_out, dtype=torch.float64)
    for e in range(attention.num_heads):
        rate = [1 / (1 + math.exp(-(row @ attention.router[e]).item())) for row in x]
        allowed = [n for n in range(len(x)) if open_ is None or open_[n]]
        first = [n for n in allowed if n < always]
        others = sorted((n for n in allowed if n >= always), key=lambda n: -rate[n])
        taken = (first + others)[:size]
        own = x[taken] @ attention.qkv[e]
        answers = attend(own[:, :d], own[:, d : 2 * d], own[:, 2 * d :], lambda n, m: True)
        for token, row in zip(taken, answers, strict=True):
            out[token] += rate[token] * row @ attention.proj[e]
    return out


@pytest.mark.parametrize(("options", "size"), [({"sparsity": 4}, 3), ({"sparsity": 2, "head_dim": 5}, 7)])
def test_heads_attend_among_their_tokens(options, size):
    attention = make("mosa", **options)
    x = image(14)
    torch.testing.assert_close(attention(x)[0], loop(attention, x[0], size), **EXACT)


def test_prefix_tokens_are_always_chosen():
    attention = make("mosa", sparsity=4, num_prefix_tokens=2)
    x = image(26)
    torch.testing.assert_close(attention(x)[0], loop(attention, x[0], 6, always=2), **EXACT)
    assert (attention.attention_map(x)[0, :, :2, :2] > 0).all()


def test_masked_tokens_are_chosen_last():
    attention = make("mosa", sparsity=2)
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[:, [1, 4, 5]] = False
    x = image(12)
    torch.testing.assert_close(
        attention(x, key_mask=mask)[0, mask[0]], loop(attention, x[0], 6, open_=mask[0])[mask[0]], **EXACT
    )


def test_dense_heads_are_added():
    attention = make("mosa", dense_heads=2)
    x = image(12)
    dense, d = attention.dense, attention.head_dim
    rows = torch.stack([linear(dense.qkv, row) for row in x[0]])
    q, k, v = (list(part.split(d, dim=1)) for part in rows.chunk(3, dim=1))
    heads = torch.cat([attend(q[a], k[a], v[a], lambda n, m: True) for a in range(2)], dim=1)
    want = loop(attention, x[0], 3) + heads @ attention.dense_proj.weight.T
    torch.testing.assert_close(attention(x)[0], want, **EXACT)


def test_all_tokens_at_full_rate_are_softmax_attention():
    """k = T, and a constant channel turns the router up to r = 1."""
    attention = make("mosa", sparsity=1)
    with torch.no_grad():
        attention.router.zero_()[:, 0] = 1.0
        x = image(9)
        x[..., 0] = 1000.0
        attention.qkv[:, 0] *= 1e-3
        softmax = create_attention("softmax", DIM, num_heads=4).double().eval()
        q, k, v = attention.qkv.chunk(3, dim=2)
        softmax.qkv.weight.copy_(torch.cat([part.transpose(1, 2).flatten(0, 1) for part in (q, k, v)]))
        softmax.qkv.bias.zero_()
        softmax.proj.weight.copy_(attention.proj.flatten(0, 1).T)
        softmax.proj.bias.zero_()
    torch.testing.assert_close(attention(x), softmax(x), **EXACT)


def test_a_router_at_zero_answers_zero():
    attention = make("mosa")
    with torch.no_grad():
        attention.router.zero_()[:, 0] = -1.0
    x = image(9)
    x[..., 0] = 1000.0
    assert attention(x).abs().max() == 0


def test_a_token_that_no_head_takes_gets_exactly_zero():
    attention = make("mosa", num_heads=2, sparsity=8)
    x = image(24)
    taken = (attention.attention_map(x)[0] > 0).any(dim=0).any(dim=1)
    assert 3 <= int(taken.sum()) <= 6
    out = attention(x)[0]
    assert out[~taken].abs().max() == 0
    assert (out[taken].abs().sum(dim=1) > 0).all()


def test_at_least_two_tokens_are_chosen():
    weights = make("mosa", sparsity=99).attention_map(image(6))
    assert ((weights[0] > 0).any(dim=-1).sum(dim=-1) == 2).all()
    assert make("mosa", sparsity=99)(image(1)).isfinite().all()


def test_the_router_learns_through_the_rate_alone():
    attention = make("mosa").train()
    attention(image(12)).square().sum().backward()
    assert (attention.router.grad.abs().sum(dim=1) > 0).all()


def test_declared_cost_is_what_is_computed():
    attention = create_attention("mosa", 32)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        attention(torch.randn(1, 16, 32, requires_grad=True))
    assert counter.get_total_flops() / 2 == eval(attention_spec("mosa").cost, {"N": 16, "C": 32})


@pytest.mark.parametrize("options", [{"sparsity": 0}, {"head_dim": 0}, {"dense_heads": -1}])
def test_wrong_options_are_named(options):
    with pytest.raises(UsageError, match=r"at least 1"):
        create_attention("mosa", 32, **options)
