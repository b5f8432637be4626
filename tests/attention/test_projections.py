"""Attention with shared or fewer projections: grouped_query, head_embedding, optimised, efficient_params, super."""

import pytest
import torch

from zoo.attention import create_attention
from zoo.attention.grouped_query import group_heads
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
    multi_head,
    products,
    project,
    same_weights,
    softmax_rows,
)

SEEN = [True, False, True, True, False, True, True]
MASKS = [None, torch.tensor([SEEN])]


def grouped_loop(attention, x, h, g, mask=None):
    (q,) = project(attention.q, x, DIM)
    k, v = project(attention.kv, x, g * DIM // h, g * DIM // h)
    q, k, v = heads(q, h), heads(k, g), heads(v, g)
    out = []
    for a in range(h):
        r = a * g // h
        weights = softmax_rows(products(q[a], k[r], (DIM / h) ** -0.5), None if mask is None else mask[0])
        out.append(gather(weights, v[r]))
    return close(attention, torch.cat(out, dim=1))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("h", "g"), [(6, 1), (6, 2), (6, 3), (6, 6), (1, 1), (4, 2)])
def test_grouped_query(h, g, mask):
    attention = make("grouped_query", num_heads=h, kv_heads=g)
    x = image()
    torch.testing.assert_close(attention(x, key_mask=mask)[0], grouped_loop(attention, x[0], h, g, mask), **EXACT)


@pytest.mark.parametrize("rows", [1, 6])
def test_grouped_query_keeps_the_bias_of_every_head(rows):
    """Against the map: a bias of each head, and one for all heads, is added to the logits of that head."""
    attention = make("grouped_query", num_heads=6, kv_heads=2)
    x, bias = image(), image(7, 7, batch=rows).unsqueeze(0)
    logits = attention.attention_map(x).log() + bias
    want = torch.softmax(logits, dim=-1)
    torch.testing.assert_close(attention.attention_map(x, bias=bias), want, **EXACT)
    v = attention.kv(x).chunk(2, dim=-1)[1].unflatten(2, (2, 2)).transpose(1, 2).repeat_interleave(3, dim=1)
    answer = attention.proj((want @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, bias=bias), answer, **EXACT)


def test_as_many_groups_as_heads_is_multi_head_attention_to_the_bit():
    softmax, x = make("softmax"), image()
    q, k, v = softmax.qkv.weight.chunk(3)
    of_q, of_k, of_v = softmax.qkv.bias.chunk(3)
    grouped = same_weights(
        make("grouped_query", kv_heads=HEADS),
        softmax,
        **{"q.weight": q, "q.bias": of_q, "kv.weight": torch.cat([k, v]), "kv.bias": torch.cat([of_k, of_v])},
    )
    q, k, v = grouped.project(x, None, None)
    theirs = softmax.qkv(x).reshape(1, 7, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    # Projections of another shape may sum in another order; from there on the same numbers go the same way.
    torch.testing.assert_close(torch.stack([q, k, v]), theirs, **EXACT)
    torch.testing.assert_close(grouped(x), softmax(x), **EXACT)
    with torch.no_grad():
        grouped.project = lambda *_: tuple(theirs)
        assert torch.equal(grouped(x), softmax(x))


def test_tied_heads_convert_without_a_change():
    softmax, x = make("softmax", num_heads=6), image()
    with torch.no_grad():
        for part in (softmax.qkv.weight, softmax.qkv.bias):
            for one in part.chunk(3)[1:]:
                by_head = one.unflatten(0, (2, 3, -1))
                by_head.copy_(by_head[:, :1].clone().expand_as(by_head))
    grouped = create_attention("grouped_query", DIM, num_heads=6, kv_heads=2).double().eval()
    grouped.load_state_dict(group_heads(softmax.state_dict(), 6, 2), strict=True)
    torch.testing.assert_close(grouped(x), softmax(x), **EXACT)


def test_conversion_takes_means_over_the_heads_of_a_group():
    softmax = make("softmax", num_heads=6)
    state = group_heads(softmax.state_dict(), 6, 2)
    width = DIM // 6
    for part, (half, row) in (("k", (0, 1)), ("v", (1, 2))):
        for group in range(2):
            member = [softmax.qkv.weight[row * DIM :][(3 * group + m) * width :][:width] for m in range(3)]
            have = state["kv.weight"][half * 2 * width :][group * width :][:width]
            torch.testing.assert_close(have, sum(member) / 3, **EXACT, msg=part)
    assert torch.equal(state["q.weight"], softmax.qkv.weight[:DIM])
    assert torch.equal(state["proj.weight"], softmax.proj.weight)


def test_one_head_of_queries_and_keys_is_a_single_head():
    attention, x = make("grouped_query", num_heads=1, kv_heads=1), image()
    (q,), (k, v) = project(attention.q, x[0], DIM), project(attention.kv, x[0], DIM, DIM)
    want = close(attention, gather(softmax_rows(products(q, k, DIM**-0.5)), v))
    torch.testing.assert_close(attention(x)[0], want, **EXACT)


@pytest.mark.parametrize(("num_heads", "groups"), [(1, 1), (2, 1), (3, 1), (4, 2), (6, 3), (12, 6)])
def test_groups_unless_given(num_heads, groups):
    assert create_attention("grouped_query", DIM, num_heads=num_heads).kv_heads == groups


def test_groups_must_divide_the_heads():
    with pytest.raises(UsageError, match=r"kv_heads=4 does not divide 6 .*\[1, 2, 3, 6\]"):
        create_attention("grouped_query", DIM, num_heads=6, kv_heads=4)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("combine", ["mul", "add"])
def test_head_embedding(combine, mask):
    attention, x = make("head_embedding", combine=combine), image()
    q, k, v = project(attention.qkv, x[0], WIDTH, WIDTH, WIDTH)
    if combine == "mul":
        parts = [
            [one * (1 + table[a, 0]) for a in range(HEADS)]
            for one, table in ((q, attention.q_embed), (k, attention.k_embed), (v, attention.v_embed))
        ]
    else:
        parts = [
            [q + attention.q_embed[a, 0] for a in range(HEADS)],
            [k] * HEADS,
            [v + attention.v_embed[a, 0] for a in range(HEADS)],
        ]
    want = multi_head(attention, *parts, seen=None if mask is None else mask[0])
    torch.testing.assert_close(attention(x, key_mask=mask)[0], want, **EXACT)


@pytest.mark.parametrize("combine", ["mul", "add"])
def test_without_embeddings_all_heads_are_one(combine):
    attention, x = make("head_embedding", combine=combine), image()
    with torch.no_grad():
        for table in (attention.q_embed, attention.k_embed, attention.v_embed):
            if table is not None:
                table.zero_()
    q, k, v = project(attention.qkv, x[0], WIDTH, WIDTH, WIDTH)
    summed = sum(attention.proj.weight[:, a * WIDTH : (a + 1) * WIDTH] for a in range(HEADS))
    want = gather(softmax_rows(products(q, k)), v) @ summed.T + attention.proj.bias
    torch.testing.assert_close(attention(x)[0], want, **EXACT)


@pytest.mark.parametrize("combine", ["mul", "add"])
def test_one_head_without_embedding_is_single_head_attention(combine):
    attention, x = make("head_embedding", num_heads=1, combine=combine), image()
    softmax = make("softmax", num_heads=1)
    zeros = {key: torch.zeros_like(value) for key, value in attention.state_dict().items() if key.endswith("_embed")}
    attention = same_weights(attention, softmax, **zeros)
    torch.testing.assert_close(attention(x), softmax(x), **EXACT)


def test_only_the_product_of_query_and_key_embeddings_counts():
    attention, x = make("head_embedding"), image()
    want = attention(x)
    with torch.no_grad():
        attention.q_embed.copy_((1 + attention.q_embed) * (1 + attention.k_embed) - 1)
        attention.k_embed.zero_()
    torch.testing.assert_close(attention(x), want, **EXACT)
    # The embeddings of values are factors of the output projection's inputs.
    with torch.no_grad():
        attention.proj.weight *= 1 + attention.v_embed.flatten()
        attention.v_embed.zero_()
    torch.testing.assert_close(attention(x), want, **EXACT)


def test_added_embeddings_of_keys_and_values_are_no_more_than_an_offset():
    attention, x = make("head_embedding", combine="add"), image()
    want = attention(x)
    q, k, v = attention.project(x, None, None)
    shift = image(WIDTH, 1, batch=HEADS).transpose(1, 2)
    moved = torch.nn.functional.scaled_dot_product_attention(q, k + shift, v)
    torch.testing.assert_close(attention.finish(moved), want, **EXACT)
    with torch.no_grad():
        attention.proj.bias += attention.proj.weight @ attention.v_embed.flatten()
        attention.v_embed.zero_()
    torch.testing.assert_close(attention(x), want, **EXACT)


def test_head_embedding_refuses_another_way_to_combine():
    with pytest.raises(UsageError, match="combine"):
        create_attention("head_embedding", DIM, num_heads=HEADS, combine="concat")


def fewer_loop(attention, name, x, mask=None):
    own = heads(x)
    if name == "optimised":
        q, k = (heads(part) for part in project(attention.qk, x, DIM, DIM))
    else:
        q, k = heads(project(attention.qk, x, DIM)[0]), own
    if name == "super":
        seen = x if mask is None else x * mask[0][:, None]
        own = heads(x if mask is None else seen)
        mixed = torch.eye(len(x), dtype=torch.float64) + attention.mix
        own = [gather(mixed, one) for one in own]
    return multi_head(attention, q, k, own, None if mask is None else mask[0])


@pytest.mark.parametrize("mask", [None, torch.tensor([[*SEEN, True, False]])])
@pytest.mark.parametrize("name", ["optimised", "efficient_params", "super"])
def test_fewer_projections(name, mask):
    attention, x = make(name, grid_size=(3, 3)), image(9)
    want = fewer_loop(attention, name, x[0], mask)
    torch.testing.assert_close(attention(x, (3, 3), key_mask=mask)[0], want, **EXACT)


def identities(softmax, *parts):
    """`softmax` with the projection to k, v or both the identity."""
    with torch.no_grad():
        for index in parts:
            softmax.qkv.weight.chunk(3)[index].copy_(torch.eye(DIM))
            softmax.qkv.bias.chunk(3)[index].zero_()
    return softmax


@pytest.mark.parametrize(("name", "parts", "kept"), [("optimised", (2,), 2), ("efficient_params", (1, 2), 1)])
def test_multi_head_attention_with_identities(name, parts, kept):
    softmax, x = identities(make("softmax"), *parts), image()
    weights = {f"qk.{p}": getattr(softmax.qkv, p)[: kept * DIM] for p in ("weight", "bias")}
    torch.testing.assert_close(same_weights(make(name), softmax, **weights)(x), softmax(x), **EXACT)


def test_super_attention_with_the_identity_is_efficient():
    efficient, x = make("efficient_params"), image(9)
    mixing = same_weights(make("super", grid_size=(3, 3)), efficient, mix=torch.zeros(9, 9))
    torch.testing.assert_close(mixing(x, (3, 3)), efficient(x), **EXACT)


def test_super_attention_with_equal_numbers_answers_the_mean_token():
    attention, x = make("super", grid_size=(3, 3)), image(9)
    with torch.no_grad():
        attention.mix.copy_(torch.full((9, 9), 1 / 9, dtype=torch.float64) - torch.eye(9))
    want = close(attention, x[0].mean(dim=0, keepdim=True)).expand(9, -1)
    torch.testing.assert_close(attention(x, (3, 3))[0], want, **EXACT)


def test_super_attention_on_another_grid():
    """Numbers that are alike stay so, divided among more places; what is of prefix tokens alone stays as it is."""
    attention = make("super", grid_size=(3, 4), num_prefix_tokens=2)
    own = attention.mix[:2, :2].clone()
    with torch.no_grad():
        attention.mix[2:, 2:] = 0.25
        attention.mix[:2, 2:] = torch.tensor([[1.0], [-2.0]])
        attention.mix[2:, :2] = torch.tensor([3.0, 5.0])
    mix = attention.resized((6, 8))
    assert mix.shape == (50, 50)
    assert torch.equal(mix[:2, :2], own)
    torch.testing.assert_close(mix[2:, 2:], torch.full_like(mix[2:, 2:], 0.25 / 4), **EXACT)
    torch.testing.assert_close(mix[:2, 2:].sum(1), torch.tensor([12.0, -24.0], dtype=torch.float64), **EXACT)
    torch.testing.assert_close(mix[2:, :2], torch.tensor([[3.0, 5.0]], dtype=torch.float64).expand(48, 2), **EXACT)
