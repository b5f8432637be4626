"""Dual attention against loops over pairs with their relations and symbols, and what it becomes at its limits."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.attention import attention_spec, create_attention
from zoo.attention.relational import RelativeSymbols
from zoo.errors import UsageError

from .pair_loops import DIM, EXACT, attend, cells, image, linear, make

GRID = (3, 4)


def heads_of(attention, x):
    """q, k of all heads and v of the ordinary ones, lists of (tokens, head_dim)."""
    q, k = torch.stack([linear(attention.qk, row) for row in x]).chunk(2, dim=1)
    v = torch.stack([linear(attention.v, row) for row in x]) if attention.v is not None else torch.zeros(len(x), 0)
    return [list(part.split(attention.head_dim, dim=1)) if part.shape[1] else [] for part in (q, k, v)]


def symbol(attention, x, i, j, prefix, place):
    """s_ij before its projection."""
    if attention.library is not None:
        logits = linear(attention.library.q, x[j]) @ attention.library.templates.T / math.sqrt(DIM)
        return logits.softmax(dim=0) @ attention.library.values
    if i < prefix or j < prefix:
        return attention.offsets.prefix[0]
    reach = attention.offsets.reach
    down, right = (max(-reach, min(reach, b - a)) for a, b in zip(place[i - prefix], place[j - prefix], strict=True))
    return attention.offsets.rows[down + reach] + attention.offsets.columns[right + reach]


def relational_heads(attention, x, prefix=0, symbols=None):
    """Before the projection: each head's sum over keys of W_r r_ij + W_s s_ij."""
    q, k, _ = heads_of(attention, x)
    d, count, size = attention.head_dim, attention.num_relations, attention.relation_dim
    width = attention.relational_heads * d
    related = x @ attention.relate.weight.T
    left, right = related[:, :width], related[:, -width:]
    out = []
    for a in range(attention.relational_heads):
        head = attention.plain_heads + a
        weights = (q[head] @ k[head].T / math.sqrt(d)).softmax(dim=1)
        answers = torch.zeros(len(x), d, dtype=torch.float64)
        for i in range(len(x)):
            for j in range(len(x)):
                parts = [slice(n * size, (n + 1) * size) for n in range(count)]
                r = torch.stack([left[i, part] @ right[j, part] / math.sqrt(size) for part in parts])
                s = symbol(attention, x, i, j, prefix, cells(GRID)) if symbols is None else symbols[j]
                s = linear(attention.symbol_proj, s)[a * d : (a + 1) * d]
                answers[i] += weights[i, j] * (attention.relation_weight[a] @ r + s)
        out.append(answers)
    return out


def plain_heads(attention, x):
    q, k, v = heads_of(attention, x)
    return [attend(q[a], k[a], v[a], lambda n, m: True) for a in range(attention.plain_heads)]


def joined(attention, plain, related):
    first = torch.stack([linear(attention.proj, row) for row in torch.cat(plain, dim=1)])
    second = torch.stack([linear(attention.relational_proj, row) for row in torch.cat(related, dim=1)])
    return torch.cat([first, second], dim=1)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_offset": 1}, {"symmetric": True, "num_relations": 4}, {"library_size": 5}, {"relational_heads": 3}],
)
@torch.no_grad()
def test_relations_and_symbols(options, prefix):
    attention = make("relational", num_prefix_tokens=prefix, **options)
    x = image(prefix + 12)
    want = joined(attention, plain_heads(attention, x[0]), relational_heads(attention, x[0], prefix))
    torch.testing.assert_close(attention(x, GRID)[0], want, **EXACT)


@torch.no_grad()
def test_without_symbols_one_relation_is_a_weighted_mean_of_products():
    """W_s = 0, n = 1: every head answers its column W_r times sum_j w_ij r_ij."""
    attention = make("relational", relational_heads=4, num_relations=1, proj=False)
    attention.symbol_proj.weight.zero_()
    x = image(12)
    q, k, _ = heads_of(attention, x[0])
    left, right = (x[0] @ attention.relate.weight.T).chunk(2, dim=1)
    r = left @ right.T / math.sqrt(DIM)
    for a in range(4):
        weights = (q[a] @ k[a].T / 2).softmax(dim=1)
        want = (weights * r).sum(dim=1)[:, None] * attention.relation_weight[a, :, 0]
        torch.testing.assert_close(attention(x, GRID)[0, :, 4 * a : 4 * a + 4], want, **EXACT)


@torch.no_grad()
def test_without_relations_values_know_no_content():
    """W_r = 0: weights over symbols that depend on places alone, so equal queries and keys make it a table."""
    attention = make("relational", relational_heads=4)
    attention.relation_weight.zero_()
    attention.qk.weight.zero_()
    one, other = attention(image(12), GRID), attention(image(12, seed=9), GRID)
    torch.testing.assert_close(one, other, **EXACT)
    assert (one[0] - one[0, :1]).abs().max() > 1e-3
    attention.relation_weight.fill_(1.0)
    assert not torch.allclose(attention(image(12), GRID), attention(image(12, seed=9), GRID))


@torch.no_grad()
def test_without_relational_heads_it_is_softmax_attention():
    attention = make("relational", relational_heads=0)
    softmax = make("softmax")
    softmax.qkv.weight.copy_(torch.cat([attention.qk.weight, attention.v.weight]))
    softmax.qkv.bias.copy_(torch.cat([attention.qk.bias, attention.v.bias]))
    softmax.proj.load_state_dict(attention.proj.state_dict())
    torch.testing.assert_close(attention(image(12), GRID), softmax(image(12)), **EXACT)


@torch.no_grad()
def test_symbols_that_are_the_tokens_without_relations_are_softmax_attention():
    attention = make("relational", relational_heads=4, library_size=3)
    attention.library = torch.nn.Identity()
    attention.relation_weight.zero_()
    softmax = make("softmax")
    softmax.qkv.weight.copy_(torch.cat([attention.qk.weight, attention.symbol_proj.weight]))
    softmax.qkv.bias.copy_(torch.cat([attention.qk.bias, torch.zeros(DIM)]))
    softmax.proj.load_state_dict(attention.relational_proj.state_dict())
    torch.testing.assert_close(attention(image(12), GRID), softmax(image(12)), **EXACT)


def test_heads_of_a_bias_are_the_ordinary_ones_first():
    attention = make("relational", relational_heads=1)
    x = image(12)
    for head, part in ((0, slice(0, 12)), (3, slice(12, 16))):
        bias = torch.zeros(1, 4, 12, 12, dtype=torch.float64)
        bias[:, head, :, 0] = 5.0
        apart = (attention(x, GRID, bias=bias) - attention(x, GRID)).abs().amax(dim=(0, 1))
        assert apart[part].min() > 0
        apart[part] = 0
        assert apart.max() == 0


def test_declared_cost_is_what_is_computed():
    attention = create_attention("relational", 32)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        attention(torch.randn(1, 36, 32, requires_grad=True), (6, 6))
    assert counter.get_total_flops() / 2 == eval(attention_spec("relational").cost, {"N": 36, "C": 32})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"relational_heads": 9}, "0 to 8 relational heads"),
        ({"num_relations": 3}, r"num_relations=3 does not divide the 16 channels.*valid: .1, 2, 4"),
        ({"max_offset": 0}, "max_offset=0"),
        ({"library_size": 0}, "library_size=0; valid: None"),
    ],
)
def test_wrong_options_are_named(options, named):
    with pytest.raises(UsageError, match=named):
        create_attention("relational", 32, **options)


def test_gradients_of_symbols_on_large_grids_in_bfloat16():
    """On a side of 64 a thousand pairs share the farthest offset."""
    symbols = RelativeSymbols(8, 16, False)
    table, grad = torch.randn(33, 8).bfloat16(), torch.rand(64, 64, 8).bfloat16()
    want = torch.zeros(33, 8, dtype=torch.float64)
    for query in range(64):
        for key in range(64):
            want[min(max(key - query, -16), 16) + 16] += grad[query, key].double()
    symbols.table(table.requires_grad_(), 64).backward(grad)
    # One rounding to bfloat16 at the end.
    torch.testing.assert_close(table.grad.double(), want, rtol=2**-8, atol=0)
