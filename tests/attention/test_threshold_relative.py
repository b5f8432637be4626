"""Threshold relative attention against loops over keys, and what it becomes at its limits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from zoo.attention import attention_spec, create_attention
from zoo.errors import UsageError

from .pair_loops import EXACT, answer, cells, image, linear, make, projected, softmax_row


def chebyshev(a, b):
    return max(abs(a[0] - b[0]), abs(a[1] - b[1]))


def euclidean(a, b):
    return math.dist(a, b)


def unit(row):
    return row / torch.sqrt((row**2).mean() + 1e-6)


def logits_of(attention, x):
    """S (heads, tokens, tokens) and v."""
    q, k, v = projected(attention, x)
    scores = []
    for a in range(attention.num_heads):
        left, right = (torch.stack([unit(row) for row in part]) for part in (q[a], k[a]))
        scores.append(torch.relu(left @ right.T / math.sqrt(attention.head_dim)))
    return scores, v


def loop(attention, x, place, apart, prefix=0, seen=None):
    scores, v = logits_of(attention, x)
    delta = torch.stack([F.logsigmoid(linear(attention.decay, row)) for row in x])
    heads = []
    for a, score in enumerate(scores):
        out = torch.zeros_like(v[a])
        for i in range(len(x)):
            kept = [j for j in range(len(x)) if score[i, j] > 0 and (seen is None or seen[j])]
            logits = []
            for j in kept:
                count = 0
                if i >= prefix and j >= prefix:
                    distance = apart(place[i - prefix], place[j - prefix])
                    cells_kept = [t for t in kept if t >= prefix]
                    count = sum(apart(place[i - prefix], place[t - prefix]) <= distance for t in cells_kept)
                logits.append((score[i, j] + delta[i, a] * count).item())
            out[i] += softmax_row(logits, [v[a][j] for j in kept])
        heads.append(out)
    return answer(attention, heads)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("apart", [chebyshev, euclidean])
def test_counts_the_keys_that_are_left(apart, prefix):
    attention = make("threshold_relative", distance=apart.__name__, num_prefix_tokens=prefix)
    x = image(prefix + 15)
    want = loop(attention, x[0], cells((3, 5)), apart, prefix)
    torch.testing.assert_close(attention(x, (3, 5))[0], want, **EXACT)


def test_a_masked_key_is_below_the_threshold():
    attention = make("threshold_relative")
    mask = torch.ones(1, 15, dtype=torch.bool)
    mask[:, [0, 7, 8]] = False
    x = image(15)
    want = loop(attention, x[0], cells((3, 5)), chebyshev, seen=mask[0])
    torch.testing.assert_close(attention(x, (3, 5), key_mask=mask)[0], want, **EXACT)


def test_the_last_query_of_a_line_counts_as_the_papers():
    """The paper's n_ij = #{kept t: j <= t <= i}; for the last query of a line all keys come before it."""
    attention = make("threshold_relative")
    x = image(9)
    kept = [bool(s > 0) for s in logits_of(attention, x[0])[0][0][8]]
    found = attention.nearer((logits_of(attention, x[0])[0][0] > 0)[None, None], (1, 9))[0, 0, 8]
    assert found.tolist() == [sum(kept[j:]) for j in range(9)]


def decay_to(attention, value):
    attention.decay.weight.data.zero_()
    attention.decay.bias.data.fill_(value)


def test_without_decay_it_is_a_softmax_over_what_is_left():
    attention = make("threshold_relative")
    decay_to(attention, 1e3)
    x = image(15)
    scores, v = logits_of(attention, x[0])
    heads = [
        torch.stack([softmax_row(s[s > 0].tolist(), list(v[a][s > 0])) + torch.zeros_like(v[a][0]) for s in score])
        for a, score in enumerate(scores)
    ]
    torch.testing.assert_close(attention(x, (3, 5))[0], answer(attention, heads), **EXACT)


def positive(attention, x):
    """Makes every product of q and k positive: one large constant in a channel of every head."""
    bias = attention.qkv.bias.data.view(3, attention.num_heads, attention.head_dim)
    bias[:2, :, 0] = 20.0
    assert all((score > 0).all() for score in logits_of(attention, x)[0])


def test_with_nothing_below_the_threshold_and_no_decay_it_is_softmax():
    attention, x = make("threshold_relative"), image(15)
    decay_to(attention, 1e3)
    positive(attention, x[0])
    scores, v = logits_of(attention, x[0])
    heads = [score.softmax(dim=1) @ v[a] for a, score in enumerate(scores)]
    torch.testing.assert_close(attention(x, (3, 5))[0], answer(attention, heads), **EXACT)


def test_with_endless_decay_it_is_the_nearest_key():
    """With every key kept, the nearest is the token's own."""
    attention, x = make("threshold_relative"), image(15)
    decay_to(attention, -1e3)
    positive(attention, x[0])
    torch.testing.assert_close(attention(x, (3, 5))[0], answer(attention, projected(attention, x[0])[2]), **EXACT)


def test_with_endless_decay_and_no_key_of_its_own_it_is_the_nearest_ring():
    """Its own key masked, the token in the middle of 3 x 3 sees the ring around it; in 5 x 5 nothing beyond it."""
    attention, x = make("threshold_relative"), image(25)
    decay_to(attention, -1e3)
    positive(attention, x[0])
    mask = torch.ones(1, 25, dtype=torch.bool)
    mask[:, 12] = False
    weights = attention.attention_map(x, (5, 5), key_mask=mask)[0, :, 12]
    ring = torch.tensor([chebyshev((2, 2), place) == 1 for place in cells((5, 5))])
    assert (weights[:, ring] > 0).all()
    assert weights[:, ~ring].max() == 0


def test_no_decay_however_large_brings_back_a_key_below_the_threshold():
    """A key of nobody's own, nearer than all that are kept, counts none of them, so no decay moves it."""
    attention, x = make("threshold_relative"), image(15)
    decay_to(attention, -1e6)
    scores, v = logits_of(attention, x[0])
    heads = []
    for a, score in enumerate(scores):
        assert (score.diagonal() <= 0).any()
        rows = []
        for i, row in enumerate(score):
            far = [chebyshev(cells((3, 5))[i], place) if row[j] > 0 else 99 for j, place in enumerate(cells((3, 5)))]
            nearest = [j for j, distance in enumerate(far) if distance == min(far) < 99]
            rows.append(row[nearest].softmax(dim=0) @ v[a][nearest] if nearest else torch.zeros_like(v[a][0]))
        heads.append(torch.stack(rows))
    torch.testing.assert_close(attention(x, (3, 5))[0], answer(attention, heads), **EXACT)


def test_a_query_without_keys_answers_the_bias_of_the_projection():
    attention = make("threshold_relative")
    bias = attention.qkv.bias.data.view(3, 4, 4)
    bias[0, :, 0], bias[1, :, 0] = 50.0, -50.0
    x = image(15)
    assert not any((score > 0).any() for score in logits_of(attention, x[0])[0])
    torch.testing.assert_close(attention(x, (3, 5))[0], attention.proj.bias.expand(15, -1), **EXACT)


def test_declared_cost_is_what_is_computed():
    attention = create_attention("threshold_relative", 32)
    with FlopCounterMode(display=False) as counter:
        attention(torch.randn(1, 12, 32, requires_grad=True), (3, 4))
    assert counter.get_total_flops() / 2 == eval(attention_spec("threshold_relative").cost, {"N": 12, "C": 32})


def test_wrong_options_are_named():
    with pytest.raises(UsageError, match="Did you mean 'euclidean'"):
        create_attention("threshold_relative", 32, distance="euclid")
