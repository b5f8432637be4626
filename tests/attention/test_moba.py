"""Mixture of block attention against loops over blocks, and what it becomes at its limits."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.attention import attention_spec, create_attention
from zoo.errors import UsageError

from .pair_loops import EXACT, answer, as_softmax, attend, cells, image, make, projected


def chosen(q, k, place, block, top, open_=None):
    """For every query the blocks it sees: its own, and the best others by q . mean of their open keys."""
    tile = [(y // block, x // block) for y, x in place]
    members = {t: [m for m in range(len(place)) if tile[m] == t and (open_ is None or open_[m])] for t in set(tile)}
    found = []
    for n in range(len(place)):
        others = [t for t in members if t != tile[n] and members[t]]
        fit = {t: (q[n] @ (sum(k[m] for m in members[t]) / len(members[t]))).item() for t in others}
        best = sorted(others, key=lambda t: -fit[t])[: top - 1]
        found.append({tile[n], *best})
    return [[tile[m] in found[n] and (open_ is None or open_[m]) for m in range(len(place))] for n in range(len(place))]


@pytest.mark.parametrize(("grid", "block", "top"), [((4, 6), 2, 3), ((5, 7), 2, 4), ((5, 7), 3, 2)])
def test_sees_the_best_blocks_and_its_own(grid, block, top):
    attention = make("moba", block_size=block, top_blocks=top)
    x = image(grid[0] * grid[1])
    q, k, v = projected(attention, x[0])
    heads = []
    for a in range(4):
        sees = chosen(q[a], k[a], cells(grid), block, top)
        heads.append(attend(q[a], k[a], v[a], lambda n, m, sees=sees: sees[n][m]))
    torch.testing.assert_close(attention(x, grid)[0], answer(attention, heads), **EXACT)


def test_prefix_tokens_are_in_no_block():
    grid, attention = (4, 6), make("moba", block_size=2, top_blocks=2, num_prefix_tokens=2)
    x = image(26)
    q, k, v = projected(attention, x[0])
    heads = []
    for a in range(4):
        sees = chosen(q[a][2:], k[a][2:], cells(grid), 2, 2)
        heads.append(attend(q[a], k[a], v[a], lambda n, m, sees=sees: n < 2 or m < 2 or sees[n - 2][m - 2]))
    torch.testing.assert_close(attention(x, grid)[0], answer(attention, heads), **EXACT)


def test_masked_keys_are_in_no_mean():
    """One block is masked wholly, one in part."""
    grid, attention = (4, 6), make("moba", block_size=2, top_blocks=3)
    mask = torch.ones(1, 24, dtype=torch.bool)
    mask[:, [0, 1, 6, 7, 2]] = False
    x = image(24)
    q, k, v = projected(attention, x[0])
    heads = []
    for a in range(4):
        sees = chosen(q[a], k[a], cells(grid), 2, 3, mask[0].tolist())
        heads.append(attend(q[a], k[a], v[a], lambda n, m, sees=sees: sees[n][m]))
    torch.testing.assert_close(attention(x, grid, key_mask=mask)[0], answer(attention, heads), **EXACT)


@pytest.mark.parametrize("top", [6, 99])
def test_all_blocks_are_full_attention(top):
    attention = make("moba", block_size=2, top_blocks=top)
    torch.testing.assert_close(attention(image(24), (4, 6)), as_softmax(attention)(image(24)), **EXACT)


def test_one_block_is_attention_in_windows():
    attention = make("moba", block_size=3, top_blocks=1)
    windows = create_attention("window", 16, window_size=3, inner_options={"num_heads": 4}).double().eval()
    windows.inner.load_state_dict(attention.state_dict())
    torch.testing.assert_close(attention(image(35), (5, 7)), windows(image(35), (5, 7)), **EXACT)


def test_blocks_of_one_key_are_the_best_keys():
    attention = make("moba", block_size=1, top_blocks=4)
    x = image(12)
    q, k, v = projected(attention, x[0])
    heads = []
    for a in range(4):
        logits = q[a] @ k[a].T
        logits.fill_diagonal_(float("inf"))
        best = [row.argsort(descending=True)[:4].tolist() for row in logits]
        heads.append(attend(q[a], k[a], v[a], lambda n, m, best=best: m in best[n]))
    torch.testing.assert_close(attention(x, (3, 4))[0], answer(attention, heads), **EXACT)


def test_equal_blocks_never_exceed_the_count():
    """A gate of ties alone: still `top_blocks` blocks of 4 keys."""
    attention = make("moba", block_size=2, top_blocks=2)
    weights = attention.attention_map(torch.ones(1, 24, 16, dtype=torch.float64), (4, 6))
    assert ((weights > 0).sum(-1) == 8).all()


def test_of_equal_blocks_the_first_are_seen():
    """In a flat image, on every machine and in an exported network; their gates differ by rounding alone."""
    attention = make("moba", block_size=2, top_blocks=3).float()
    grid = (10, 12)
    tile = [row // 2 * 6 + column // 2 for row, column in cells(grid)]
    seen = attention.attention_map(torch.full((1, 120, 16), 0.3), grid)[0] > 0
    want = [[tile[m] in [tile[n], *[t for t in range(3) if t != tile[n]][:2]] for m in range(120)] for n in range(120)]
    assert torch.equal(seen, torch.tensor(want).expand_as(seen))


def test_declared_cost_is_what_is_computed():
    attention = create_attention("moba", 32)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        attention(torch.randn(1, 64, 32, requires_grad=True), (8, 8))
    assert counter.get_total_flops() / 2 == eval(attention_spec("moba").cost, {"N": 64, "C": 32})


@pytest.mark.parametrize("options", [{"block_size": 0}, {"top_blocks": 0}])
def test_wrong_options_are_named(options):
    with pytest.raises(UsageError, match=r"=0.*at least 1"):
        create_attention("moba", 32, **options)
