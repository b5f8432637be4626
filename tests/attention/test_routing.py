"""Routing attention against loops over clusters, its centroids, and what it becomes at its limits."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.attention import attention_spec, create_attention
from zoo.errors import UsageError

from .pair_loops import EXACT, answer, as_softmax, attend, cells, image, make, projected, softmax_row


def normal(rows):
    out = []
    for row in rows:
        centred = row - row.mean()
        out.append(centred / torch.sqrt((centred**2).mean() + 1e-5))
    return torch.stack(out)


def routed(q, k, v, centroids, normalized, prefix=0):
    """One head: each centroid takes w queries and keys; means over the clusters of a token."""
    nq, nk = normal(q), normal(k)
    a, b = (nq, nk) if normalized else (q, k)
    count = len(q) - prefix
    size = -(-count // len(centroids))
    total, times = torch.zeros(count, v.shape[1], dtype=torch.float64), [0] * count
    for mu in centroids:
        fit_q, fit_k = (nq[prefix:] @ mu).tolist(), (nk[prefix:] @ mu).tolist()
        mine = sorted(range(count), key=lambda n: -fit_q[n])[:size]
        theirs = sorted(range(count), key=lambda n: -fit_k[n])[:size]
        keys = list(range(prefix)) + [prefix + m for m in theirs]
        for n in mine:
            logits = [(a[prefix + n] @ b[m]).item() * q.shape[1] ** -0.5 for m in keys]
            total[n] += softmax_row(logits, [v[m] for m in keys])
            times[n] += 1
    every = attend(q, k, v, lambda n, m: True)[:prefix]
    return torch.cat([every, torch.stack([row / max(n, 1) for row, n in zip(total, times, strict=True)])])


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("normalized", [True, False])
def test_half_of_the_heads_route_and_half_see_windows(normalized, prefix):
    grid = (4, 5)
    attention = make("routing", clusters=3, window_size=2, normalized=normalized, num_prefix_tokens=prefix)
    x = image(prefix + 20)
    q, k, v = projected(attention, x[0])
    window = [(row // 2, column // 2) for row, column in cells(grid)]
    heads = [
        attend(q[a], k[a], v[a], lambda n, m: n < prefix or m < prefix or window[n - prefix] == window[m - prefix])
        for a in range(2)
    ]
    heads += [routed(q[a], k[a], v[a], attention.centroids[a - 2], normalized, prefix) for a in (2, 3)]
    torch.testing.assert_close(attention(x, grid)[0], answer(attention, heads), **EXACT)


@pytest.mark.parametrize("normalized", [True, False])
def test_one_cluster_of_all_tokens_is_full_attention(normalized):
    attention = make("routing", clusters=1, local_heads=0, normalized=normalized)
    x = image(20)
    if not normalized:
        torch.testing.assert_close(attention(x, (4, 5)), as_softmax(attention)(x), **EXACT)
        return
    q, k, v = projected(attention, x[0])
    heads = [attend(normal(q[a]), normal(k[a]), v[a], lambda n, m: True) for a in range(4)]
    torch.testing.assert_close(attention(x, (4, 5))[0], answer(attention, heads), **EXACT)


def test_equal_centroids_make_one_cluster_of_the_best():
    """Every cluster is the same: the mean over clusters is the answer of one; all other tokens get 0."""
    attention = make("routing", clusters=4, local_heads=0)
    attention.centroids.copy_(attention.centroids[:, :1].expand_as(attention.centroids))
    x = image(20)
    q, k, v = projected(attention, x[0])
    heads = []
    for a in range(4):
        nq, nk, mu = normal(q[a]), normal(k[a]), attention.centroids[a, 0]
        mine, theirs = (nq @ mu).topk(5).indices.tolist(), (nk @ mu).topk(5).indices.tolist()
        own = attend(nq, nk, v[a], lambda n, m, mine=mine, theirs=theirs: n in mine and m in theirs)
        assert int((own.abs().sum(dim=1) == 0).sum()) == 15
        heads.append(own)
    torch.testing.assert_close(attention(x, (4, 5))[0], answer(attention, heads), **EXACT)


def test_centroids_move_in_training_towards_what_is_nearest():
    attention = make("routing", clusters=3, local_heads=3)
    attention.decay = 0.75
    before = attention.centroids[0].clone()
    x = image(20)
    want = copy.deepcopy(attention)(x, (4, 5))
    q, k, _ = projected(attention, x[0])
    points = torch.cat([normal(q[3]), normal(k[3])])
    moved = []
    nearest = [max(range(3), key=lambda c: (point @ before[c]).item()) for point in points]
    for c in range(3):
        mine = [point for point, near in zip(points, nearest, strict=True) if near == c]
        centroid = 0.75 * before[c] + 0.25 * sum(mine) / len(mine) if mine else before[c]
        moved.append(centroid / centroid.norm() if mine else centroid)
    # What a step answers is by the centroids before it.
    torch.testing.assert_close(attention.train()(x, (4, 5)), want, **EXACT)
    torch.testing.assert_close(attention.centroids[0], torch.stack(moved), **EXACT)


def test_a_centroid_that_nothing_is_near_to_stays():
    attention = make("routing", clusters=2, local_heads=3).train()
    # Opposite to all points in one channel that the norm keeps: nothing is nearest to the second.
    attention.centroids.zero_()
    attention.centroids[0, 1, 0] = -1e6
    attention.centroids[0, 0, 0] = 1e6
    attention.qkv.weight.data.mul_(1e-3)
    attention.qkv.bias.data.view(3, 4, 4)[:2, 3] = torch.tensor([9.0, 0.0, 0.0, 0.0]).double()
    attention(image(6), (2, 3))
    assert attention.centroids[0, 1].tolist() == [-1e6, 0, 0, 0]
    assert attention.centroids[0, 0].norm() == pytest.approx(1)


def test_evaluation_and_maps_leave_centroids_alone_and_files_keep_them():
    attention = make("routing")
    before = attention.centroids.clone()
    attention(image(20), (4, 5))
    attention.train().attention_map(image(20), (4, 5))
    assert torch.equal(attention.centroids, before)
    other = create_attention("routing", 16, num_heads=4).double()
    assert not torch.equal(other.centroids, before)
    other.load_state_dict(attention.state_dict(), strict=True)
    assert torch.equal(other.centroids, before)


def test_map_rebuilds_the_answer():
    attention = make("routing", clusters=3, window_size=2, normalized=False, num_prefix_tokens=1)
    x = image(21)
    weights = attention.attention_map(x, (4, 5))[0].double()
    values = torch.stack(projected(attention, x[0])[2])
    # The map is float32 by contract.
    want = answer(attention, list(weights @ values))
    torch.testing.assert_close(attention(x, (4, 5))[0], want, rtol=1e-5, atol=1e-6)


def test_declared_cost_is_what_is_computed():
    attention = create_attention("routing", 32).eval()
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        attention(torch.randn(1, 14 * 28, 32, requires_grad=True), (14, 28))
    assert counter.get_total_flops() / 2 == eval(attention_spec("routing").cost, {"N": 14 * 28, "C": 32})


@pytest.mark.parametrize("options", [{"clusters": 0}, {"window_size": 0}, {"local_heads": 9}])
def test_wrong_options_are_named(options):
    with pytest.raises(UsageError, match=r"local_heads 0 to 8"):
        create_attention("routing", 32, **options)
