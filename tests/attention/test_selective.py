"""Selective self-attention against the equations of arXiv 2411.12892, as loops in float64."""

import math

import pytest
import torch

from zoo.attention import create_attention
from zoo.errors import UsageError

from .loops import (
    DIM,
    EXACT,
    HEADS,
    SCALE,
    close,
    gather,
    heads,
    image,
    make,
    multi_head,
    products,
    project,
    same_weights,
    softmax_rows,
)

SEEN = torch.tensor([[True, False, True, True, False, True, True]])


def temperature(row, gate):
    """1 + tanh(gelu(row) . gate)."""
    total = sum(
        c * 0.5 * (1 + math.erf(c / math.sqrt(2))) * w for c, w in zip(row.tolist(), gate.tolist(), strict=True)
    )
    return 1 + math.tanh(total)


def parts(attention, x):
    return [heads(part) for part in project(attention.qkv, x, DIM, DIM, DIM)]


@pytest.mark.parametrize("mask", [None, SEEN])
@pytest.mark.parametrize("reference", [1, 4])
def test_equals_the_loop(mask, reference):
    attention, x = make("selective", reference_keys=reference), image()
    keys = 7 if mask is None else int(mask.sum())
    length = math.exp(-math.exp(attention.beta.item())) * math.log(keys / reference)
    q, k, v = parts(attention, x[0])
    for a in range(HEADS):
        q[a] = torch.stack([(temperature(row, attention.q_gate[a, :, 0]) + length) * row for row in q[a]])
        v[a] = torch.stack([temperature(row, attention.v_gate[a, :, 0]) * row for row in v[a]])
    want = multi_head(attention, q, k, v, None if mask is None else mask[0])
    torch.testing.assert_close(attention(x, key_mask=mask)[0], want, **EXACT)


def with_gates(attention, gate, beta):
    """beta = 10 makes exp(-exp(beta)) zero."""
    with torch.no_grad():
        attention.q_gate.fill_(gate)
        attention.v_gate.fill_(gate)
        attention.beta.fill_(beta)
    return attention


def test_without_gates_and_length_it_is_multi_head_attention():
    softmax, x = make("softmax"), image()
    attention = same_weights(with_gates(make("selective"), 0.0, 10.0), softmax)
    attention = with_gates(attention, 0.0, 10.0)
    torch.testing.assert_close(attention(x), softmax(x), **EXACT)


def test_it_starts_within_a_thousandth_of_multi_head_attention():
    attention = create_attention("selective", DIM, num_heads=HEADS).double()
    softmax = same_weights(create_attention("softmax", DIM, num_heads=HEADS).double(), attention)
    sharp = attention.project(image(), None, None)[0] / softmax.project(image(), None, None)[0]
    torch.testing.assert_close(sharp, torch.full_like(sharp, 1 + math.exp(-math.exp(2)) * math.log(7)), **EXACT)
    assert sharp.max() < 1 + 4e-3


def test_without_gates_the_length_sharpens():
    attention, x = with_gates(make("selective"), 0.0, -1.0), image()
    q, k, v = parts(attention, x[0])
    factor = 1 + math.exp(-math.exp(-1)) * math.log(7)
    out = [gather(softmax_rows(products(a, b, SCALE * factor)), c) for a, b, c in zip(q, k, v, strict=True)]
    torch.testing.assert_close(attention(x)[0], close(attention, torch.cat(out, dim=1)), **EXACT)


def test_a_temperature_of_zero_is_the_mean():
    """tanh saturates at -1: gelu of queries of ones times a gate far below zero."""
    attention, x = with_gates(make("selective"), 0.0, 10.0), image()
    with torch.no_grad():
        attention.qkv.weight[:DIM] = 0
        attention.qkv.bias[:DIM] = 1
        attention.q_gate.fill_(-100.0)
    (*_, v) = parts(attention, x[0])
    want = close(attention, torch.cat([one.mean(dim=0, keepdim=True) for one in v], dim=1)).expand(7, -1)
    torch.testing.assert_close(attention(x)[0], want, **EXACT)


def test_a_temperature_without_end_takes_the_largest():
    """The factor of queries grows with log(n / reference); a tiny reference makes it as large as wished."""
    attention, x = with_gates(make("selective"), 0.0, -20.0), image()
    q, k, v = parts(attention, x[0])
    attention.reference_keys = 1e-300
    with torch.no_grad():
        attention.qkv.weight[:DIM] *= 1e3
        attention.qkv.bias[:DIM] *= 1e3
    out = [c[products(a, b).argmax(dim=1)] for a, b, c in zip(q, k, v, strict=True)]
    torch.testing.assert_close(attention(x)[0], close(attention, torch.cat(out, dim=1)), **EXACT)


def test_length_is_silent_at_the_reference():
    attention, x = make("selective", reference_keys=7), image()
    before = attention(x)
    with torch.no_grad():
        attention.beta.fill_(-3.0)
    assert torch.equal(attention(x), before)
    assert not torch.allclose(attention(image(9)), with_beta(attention, 10.0)(image(9)))


def with_beta(attention, beta):
    with torch.no_grad():
        attention.beta.fill_(beta)
    return attention


def test_no_keys_to_refer_to_are_refused():
    with pytest.raises(UsageError, match="reference_keys=0"):
        create_attention("selective", DIM, num_heads=HEADS, reference_keys=0)
