"""Persistent memory against the equations of arXiv 1907.01470, as loops in float64."""

import math

import pytest
import torch

from zoo.attention import create_attention
from zoo.errors import UsageError

from .loops import (
    DIM,
    EXACT,
    HEADS,
    WIDTH,
    close,
    gather,
    heads,
    image,
    make,
    products,
    project,
    same_weights,
    softmax_rows,
)

SEEN = torch.tensor([[True, False, True, True, False, True, True]])


def parts(attention, x):
    """Heads of q, k, v and of the memory's keys and values."""
    own = [heads(part) for part in project(attention.qkv, x, DIM, DIM, DIM)]
    keys = [math.sqrt(WIDTH) * attention.memory_k[a] for a in range(HEADS)]
    return *own, keys, [math.sqrt(attention.slots) * attention.memory_v[a] for a in range(HEADS)]


@pytest.mark.parametrize("mask", [None, SEEN])
@pytest.mark.parametrize("slots", [1, 5])
def test_equals_the_loop(slots, mask):
    attention, x = make("persistent_memory", slots=slots), image()
    bias = image(7, 7, batch=HEADS)
    seen = [True] * 7 if mask is None else mask[0].tolist()
    out = []
    for a, (q, k, v, km, vm) in enumerate(zip(*parts(attention, x[0]), strict=True)):
        logits = torch.cat([products(q, k) + bias[a], products(q, km)], dim=1)
        out.append(gather(softmax_rows(logits, seen + [True] * slots), torch.cat([v, vm])))
    want = close(attention, torch.cat(out, dim=1))
    torch.testing.assert_close(attention(x, key_mask=mask, bias=bias[None])[0], want, **EXACT)


def test_without_slots_it_is_multi_head_attention():
    softmax, x = make("softmax"), image()
    attention = same_weights(make("persistent_memory", slots=0), softmax)
    for mask in (None, SEEN, torch.zeros_like(SEEN)):
        torch.testing.assert_close(attention(x, key_mask=mask), softmax(x, key_mask=mask), **EXACT)


def test_an_empty_slot_adds_one_to_the_divisor():
    attention, x = make("persistent_memory", slots=1), image()
    with torch.no_grad():
        attention.memory_k.zero_()
        attention.memory_v.zero_()
    out = []
    for q, k, v, *_ in zip(*parts(attention, x[0]), strict=True):
        powers = products(q, k).exp()
        out.append(gather(powers / (1 + powers.sum(1, keepdim=True)), v))
    torch.testing.assert_close(attention(x)[0], close(attention, torch.cat(out, dim=1)), **EXACT)


def test_it_is_a_blend_of_attention_and_a_layer_of_keys_and_values():
    """g * attention + (1 - g) * softmax(q k_m) v_m, g the weight of the tokens: what a row of the map sums to."""
    attention, x = make("persistent_memory", slots=5), image()
    share = attention.attention_map(x)[0].sum(-1)
    out = []
    for a, (q, k, v, km, vm) in enumerate(zip(*parts(attention, x[0]), strict=True)):
        g = share[a][:, None]
        out.append(g * gather(softmax_rows(products(q, k)), v) + (1 - g) * gather(softmax_rows(products(q, km)), vm))
    torch.testing.assert_close(attention(x)[0], close(attention, torch.cat(out, dim=1)), **EXACT)


def test_with_every_token_masked_memory_answers_alone():
    attention, x = make("persistent_memory", slots=5), image()
    out = [gather(softmax_rows(products(q, km)), vm) for q, _, _, km, vm in zip(*parts(attention, x[0]), strict=True)]
    hidden = torch.zeros(1, 7, dtype=torch.bool)
    torch.testing.assert_close(attention(x, key_mask=hidden)[0], close(attention, torch.cat(out, dim=1)), **EXACT)


def test_memory_starts_standard_normal():
    """2 * 8 * 512 * 4 numbers: the standard deviation of 16,384 normal numbers is off by 0.6 %; five of these."""
    attention = create_attention("persistent_memory", 32, slots=512)
    effective = torch.cat([attention.memory_k * 2, attention.memory_v * 512**0.5])
    assert effective.std().item() == pytest.approx(1, rel=0.03)


def test_slots_below_zero_are_refused():
    with pytest.raises(UsageError, match="slots=-1"):
        create_attention("persistent_memory", DIM, num_heads=HEADS, slots=-1)
