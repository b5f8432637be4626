"""Neural attention against the network of arXiv 2502.17206, as loops in float64."""

import pytest
import torch

from zoo.attention import create_attention
from zoo.errors import UsageError

from .loops import DIM, EXACT, HEADS, close, gather, heads, image, make, multi_head, project, softmax_rows

SEEN = torch.tensor([[True, False, True, True, False, True, True]])


def parts(attention, x):
    return [heads(part) for part in project(attention.qkv, x, DIM, DIM, DIM)]


def score_loop(attention, q, k):
    """The network over the concatenation of both projections, pair by pair."""
    out = torch.zeros(len(q), len(k), dtype=torch.float64)
    for i in range(len(q)):
        for j in range(len(k)):
            of_q = attention.q_in @ q[i] + attention.q_bias
            of_k = attention.k_in @ k[j] + attention.k_bias
            hidden = (attention.first @ torch.cat([of_q, of_k]) + attention.first_bias).clamp(min=0)
            hidden = (attention.second @ hidden + attention.second_bias).clamp(min=0)
            out[i, j] = attention.last[0] @ hidden
    return out


@pytest.mark.parametrize("mask", [None, SEEN])
@pytest.mark.parametrize("width", [None, 5])
def test_equals_the_loop(width, mask):
    attention, x = make("neural", width=width), image()
    bias, seen = image(7, 7, batch=HEADS), None if mask is None else mask[0]
    out = []
    for a, (q, k, v) in enumerate(zip(*parts(attention, x[0]), strict=True)):
        out.append(gather(softmax_rows(score_loop(attention, q, k) + bias[a], seen), v))
    want = close(attention, torch.cat(out, dim=1))
    torch.testing.assert_close(attention(x, key_mask=mask, bias=bias[None])[0], want, **EXACT)


def mean_of_values(attention, x):
    (*_, v) = parts(attention, x)
    return close(attention, torch.cat([one.mean(dim=0, keepdim=True) for one in v], dim=1)).expand(len(x), -1)


def test_without_the_last_layer_it_is_the_mean():
    attention, x = make("neural"), image()
    with torch.no_grad():
        attention.last.zero_()
    torch.testing.assert_close(attention(x)[0], mean_of_values(attention, x[0]), **EXACT)


def test_one_dead_unit_is_the_mean():
    attention, x = make("neural", width=1), image()
    with torch.no_grad():
        attention.first_bias.fill_(-1e3)
    torch.testing.assert_close(attention(x)[0], mean_of_values(attention, x[0]), **EXACT)


def test_without_a_change_of_side_queries_do_not_count():
    """All units always on: the score is a part of the query and one of the key, and softmax cancels the first."""
    attention, x = make("neural", width=4), image()
    with torch.no_grad():
        attention.first_bias.fill_(1e3)
        attention.second_bias.fill_(1e5)
    weights = attention.attention_map(x)
    # Scores of 1e5 keep 1e-11 of float64.
    torch.testing.assert_close(weights, weights[:, :, :1].expand_as(weights), rtol=1e-8, atol=1e-9)
    _, k, v = parts(attention, x[0])
    other = [torch.zeros_like(one) for one in k]
    want = [gather(softmax_rows(score_loop(attention, a, b)), c) for a, b, c in zip(other, k, v, strict=True)]
    torch.testing.assert_close(attention(x)[0], close(attention, torch.cat(want, dim=1)), rtol=1e-8, atol=1e-9)


def test_two_units_make_an_absolute_value():
    """A score by hand: relu(t) + relu(-t) for t = the sum of the first channels of query and key."""
    attention, x = make("neural", num_heads=HEADS, width=2), image()
    with torch.no_grad():
        for name in ("q_bias", "k_bias", "first_bias", "second_bias", "q_in", "k_in", "first"):
            getattr(attention, name).zero_()
        attention.q_in[0, 0] = attention.k_in[0, 0] = 1
        attention.first[:, 0] = attention.first[:, 2] = torch.tensor([1.0, -1.0])
        attention.second.copy_(torch.eye(2))
        attention.last.fill_(1)
    q, k, v = parts(attention, x[0])
    out = [gather(softmax_rows((a[:, :1] + b[:, 0]).abs()), c) for a, b, c in zip(q, k, v, strict=True)]
    torch.testing.assert_close(attention(x)[0], close(attention, torch.cat(out, dim=1)), **EXACT)


@pytest.mark.parametrize(("head_dim", "width"), [(4, 2), (64, 2), (96, 3), (256, 8)])
def test_width_unless_given(head_dim, width):
    attention = create_attention("neural", 2 * head_dim, num_heads=2)
    assert attention.map_width == width
    assert attention.second.shape == (max(2, width // 2), width)
    with pytest.raises(UsageError, match="width=0"):
        create_attention("neural", 2 * head_dim, num_heads=2, width=0)


def test_the_loops_know_softmax_attention():
    """The loops of these tests themselves, against torch."""
    softmax, x = make("softmax"), image()
    torch.testing.assert_close(softmax(x)[0], multi_head(softmax, *parts(softmax, x[0])), **EXACT)
