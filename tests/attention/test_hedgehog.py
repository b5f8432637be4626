"""Hedgehog attention against the equations of arXiv 2402.04347, as loops in float64."""

import math

import pytest
import torch

from zoo.attention import create_attention

from .loops import (
    DIM,
    EXACT,
    HEADS,
    SCALE,
    WIDTH,
    close,
    gather,
    heads,
    image,
    make,
    multi_head,
    products,
    project,
    softmax_rows,
)

SEEN = torch.tensor([[True, False, True, True, False, True, True]])


def weights_loop(attention, x, seen=None):
    """2 * sum over channels of cosh(a + b), which is what the product of both features is, over its sum."""
    q, k, _ = (heads(part) for part in project(attention.qkv, x, DIM, DIM, DIM))
    found = []
    for h in range(HEADS):
        a = [attention.q_map[h] @ row + attention.q_offset[h, 0] for row in q[h]]
        b = [attention.k_map[h] @ row + attention.k_offset[h, 0] for row in k[h]]
        out = torch.zeros(len(x), len(x), dtype=torch.float64)
        for i in range(len(x)):
            for j in range(len(x)):
                if seen is None or seen[j]:
                    out[i, j] = 2 * sum(math.cosh(t) for t in (a[i] + b[j]).tolist())
            out[i] /= out[i].sum()
        found.append(out)
    return found


def values(attention, x):
    return heads(project(attention.qkv, x, DIM, DIM, DIM)[2])


@pytest.mark.parametrize("mask", [None, SEEN])
def test_equals_the_quadratic_form(mask):
    attention, x = make("hedgehog"), image()
    weights = weights_loop(attention, x[0], None if mask is None else mask[0])
    want = torch.cat([gather(w, v) for w, v in zip(weights, values(attention, x[0]), strict=True)], dim=1)
    torch.testing.assert_close(attention(x, key_mask=mask)[0], close(attention, want), **EXACT)
    torch.testing.assert_close(attention.attention_map(x, key_mask=mask)[0], torch.stack(weights), **EXACT)


def test_maps_of_zero_are_the_mean():
    attention, x = make("hedgehog"), image()
    with torch.no_grad():
        for value in attention.maps():
            value.zero_()
    mean = torch.cat([v.mean(dim=0, keepdim=True) for v in values(attention, x[0])], dim=1)
    torch.testing.assert_close(attention(x)[0], close(attention, mean).expand(7, -1), **EXACT)


def test_one_token_answers_its_value():
    attention, x = make("hedgehog"), image(1)
    torch.testing.assert_close(attention(x)[0], close(attention, torch.cat(values(attention, x[0]), dim=1)), **EXACT)


def test_no_exponential_is_too_large():
    """Exponents of a thousand: each row becomes that of the largest |a + b|, as cosh says."""
    attention, x = make("hedgehog", num_heads=1), 1e3 * image()
    q, k, _ = project(attention.qkv, x[0], DIM, DIM, DIM)
    a = q @ attention.q_map[0].T + attention.q_offset[0]
    b = k @ attention.k_map[0].T + attention.k_offset[0]
    nearest = (a[:, None] + b[None]).abs().amax(dim=2).argmax(dim=1)
    want = torch.nn.functional.one_hot(nearest, 7).double()
    # One coordinate lies so far ahead that nothing of the others is left.
    torch.testing.assert_close(attention.attention_map(x)[0, 0], want, **EXACT)
    low = attention.float()(x.float())
    assert low.isfinite().all()


def test_it_starts_as_the_identity_map():
    attention = create_attention("hedgehog", DIM, num_heads=HEADS)
    for table in (attention.q_map, attention.k_map):
        assert torch.equal(table, torch.eye(WIDTH).expand(HEADS, -1, -1))


@pytest.mark.parametrize("mask", [None, SEEN])
def test_distillation_loss_is_the_cross_entropy_of_rows(mask):
    attention, x = make("hedgehog"), image(batch=2)
    answer, loss = attention.distil(x, mask)
    total = 0.0
    for one in x:
        seen = None if mask is None else mask[0]
        q, k, v = (heads(part) for part in project(attention.qkv, one, DIM, DIM, DIM))
        for a, ours in enumerate(weights_loop(attention, one, seen)):
            teacher = softmax_rows(products(q[a], k[a], SCALE), seen)
            for i in range(7):
                total -= sum((teacher[i, j] * ours[i, j].log()).item() for j in range(7) if seen is None or seen[j])
    assert loss.item() == pytest.approx(total / (2 * HEADS * 7), rel=1e-9)
    q, k, v = (heads(part) for part in project(attention.qkv, x[0], DIM, DIM, DIM))
    want = multi_head(attention, q, k, v, None if mask is None else mask[0])
    torch.testing.assert_close(answer[0], want, **EXACT)


def test_distillation_trains_the_maps_alone_and_comes_nearer():
    attention, x = make("hedgehog"), image(16, batch=4)
    q, k, _ = attention.qkv(x).unflatten(2, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
    teacher = (q @ k.transpose(-2, -1) * SCALE).softmax(-1)
    entropy = -(teacher * teacher.log()).sum(-1).mean().item()
    optimizer, losses = torch.optim.Adam(attention.maps(), lr=1e-2), []
    for _ in range(100):
        attention.zero_grad()
        _, loss = attention.distil(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item() - entropy)
    assert all(p.grad is None for p in (*attention.qkv.parameters(), *attention.proj.parameters()))
    # The divergence from the teacher: never below zero, and a half of it is soon gone.
    assert 0 <= losses[-1] < losses[0] / 2


def test_a_state_of_softmax_attention_loads():
    softmax, x = make("softmax", qk_norm=True), image()
    attention = make("hedgehog", qk_norm=True)
    maps = [value.clone() for value in attention.maps()]
    attention.load_state_dict(softmax.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(attention.maps(), maps, strict=True))
    torch.testing.assert_close(attention.distil(x)[0], softmax(x), **EXACT)
    # A file that has some of the maps is no file of softmax attention.
    state = attention.state_dict()
    del state["q_map"]
    with pytest.raises(RuntimeError, match="q_map"):
        attention.load_state_dict(state)
