"""Inverse distance weighting against the equations of arXiv 2310.18805, as loops in float64."""

import math

import pytest
import torch

from zoo.attention import create_attention
from zoo.errors import UsageError

from .loops import DIM, EXACT, HEADS, close, gather, heads, image, make, project

SEEN = torch.tensor([[True, False, True, True, False, True, True]])


def parts(attention, x):
    return [heads(part) for part in project(attention.qkv, x, DIM, DIM, DIM)]


def weights_loop(q, k, power, eps, seen=None, bias=None):
    out = torch.zeros(len(q), len(k), dtype=torch.float64)
    for i in range(len(q)):
        for j in range(len(k)):
            if seen is None or seen[j]:
                distance = math.sqrt(sum((a - b) ** 2 for a, b in zip(q[i].tolist(), k[j].tolist(), strict=True)))
                out[i, j] = (1 if bias is None else math.exp(bias[i, j])) / (eps + distance**power)
        out[i] /= out[i].sum()
    return out


@pytest.mark.parametrize("mask", [None, SEEN])
@pytest.mark.parametrize(("power", "eps", "learn"), [(2.0, 1e-3, False), (1.0, 0.5, False), (10.0, 1.0, True)])
def test_equals_the_loop(power, eps, learn, mask):
    attention, x = make("inverse_distance", power=power, eps=eps, learn_power=learn), image()
    if learn:
        power = math.log1p(math.exp(attention.raw_power.item()))
    bias, seen = image(7, 7, batch=HEADS), None if mask is None else mask[0]
    out = [
        gather(weights_loop(q, k, power, eps, seen, bias[a]), v)
        for a, (q, k, v) in enumerate(zip(*parts(attention, x[0]), strict=True))
    ]
    want = close(attention, torch.cat(out, dim=1))
    torch.testing.assert_close(attention(x, key_mask=mask, bias=bias[None])[0], want, **EXACT)


def points(count=6, seed=5):
    return image(count, 4, seed=seed).unsqueeze(1).expand(-1, HEADS, -1, -1)


def weigh(q, k, **options):
    return make("inverse_distance", **options).weigh(q, k, None, None, None)


def test_a_power_near_zero_is_the_mean():
    weights = weigh(points(), points(seed=6), power=1e-12)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 6), **EXACT)


def test_a_power_without_end_is_the_nearest_neighbour():
    q, k = points(), points(seed=6)
    # Distances to the power of 20,000 are no float64 any more; their logarithms are.
    nearest = torch.nn.functional.one_hot(torch.cdist(q, k).argmin(dim=-1), 6).double()
    torch.testing.assert_close(weigh(3 * q, 3 * k, power=20_000.0), nearest, **EXACT)


def test_without_eps_only_the_shape_of_the_points_counts():
    """Moved and stretched together; 1e-30 beside distances of order 1 is nothing."""
    q, k = points(), points(seed=6)
    plain = weigh(q, k, eps=1e-30)
    torch.testing.assert_close(weigh(5 * q + 3, 5 * k + 3, eps=1e-30), plain, **EXACT)
    assert not torch.allclose(weigh(5 * q, 5 * k, eps=1.0), weigh(q, k, eps=1.0), atol=1e-3)


def test_a_query_on_a_key_takes_its_value():
    """As far as a squared distance of zero is told from 1e-12: with power 4 a weight of 1e24 against order 1."""
    keys = points(seed=6)
    weights = weigh(keys, keys, eps=1e-30, power=4.0)
    torch.testing.assert_close(weights, torch.eye(6, dtype=torch.float64).expand_as(weights), rtol=0, atol=1e-15)


def test_with_eps_of_one_it_is_the_kernel_of_student_t():
    q, k = points(), points(seed=6)
    kernel = 1 / (1 + torch.cdist(q, k) ** 2)
    torch.testing.assert_close(weigh(q, k, eps=1.0), kernel / kernel.sum(-1, keepdim=True), **EXACT)


def test_answers_stay_between_the_values():
    attention, x = make("inverse_distance", proj=False), image()
    (*_, v) = parts(attention, x[0])
    v, out = torch.cat(v, dim=1), attention(x)[0]
    assert (out <= v.amax(dim=0)).all()
    assert (out >= v.amin(dim=0)).all()
    weights = attention.attention_map(x)
    assert weights.min() > 0  # with rows of sum 1, by the conformance test: a convex combination


def test_gradients_where_queries_are_keys():
    for power in (1.0, 2.0, 3.0):
        keys = points(seed=6).clone().requires_grad_()
        weigh(keys, keys, power=power).square().sum().backward()
        assert keys.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"power": 0.0}, {"eps": 0.0}])
def test_numbers_must_be_above_zero(options):
    with pytest.raises(UsageError, match="above 0"):
        create_attention("inverse_distance", DIM, num_heads=HEADS, **options)
