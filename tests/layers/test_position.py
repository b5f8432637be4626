"""The resized table equals timm's, and what is kept of it is never stale."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import nn

from zoo.layers.position import TableResize

GRIDS = [(7, 5), (3, 3), (2, 9), (1, 1)]


class Host(nn.Module):
    """A table and what resizes it, as a backbone holds them."""

    def __init__(self, prefix=1):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, prefix + 12, 8))
        self.resize = TableResize((4, 3), prefix)
        self.eval()

    def forward(self, grid):
        return self.resize(self.table, grid)


def oracle(host, grid):
    return resample_abs_pos_embed(
        host.table.detach(), list(grid), [4, 3], num_prefix_tokens=host.resize.num_prefix_tokens
    )


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("grad", [True, False])
def test_equals_timm(prefix, grid, grad):
    host = Host(prefix)
    with torch.set_grad_enabled(grad):
        out = host(grid)
    assert out.shape == (1, prefix + grid[0] * grid[1], 8)
    # The same operations in the same order: nothing to tolerate.
    assert torch.equal(out, oracle(host, grid))
    assert torch.equal(out[:, :prefix], host.table[:, :prefix]), "prefix rows have no place and stay"


def test_own_grid_is_the_table_itself():
    host = Host()
    assert host((4, 3)) is host.table
    # As many tokens, but another shape: it has to be resized.
    assert not torch.equal(host((3, 4)), host.table)


@torch.no_grad()
def test_repeated_calls_return_the_same_object():
    host = Host()
    first, other = host((7, 5)), host((3, 3))
    assert host((7, 5)) is first
    assert host((3, 3)) is other


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda host: host.table.mul_(2), id="in place"),
        pytest.param(lambda host: host.table[:, 0].zero_(), id="through a view"),
        pytest.param(lambda host: host.load_state_dict({"table": torch.randn(1, 13, 8)}), id="load_state_dict"),
        pytest.param(
            lambda host: host.load_state_dict({"table": torch.randn(1, 13, 8)}, assign=True), id="load assigned"
        ),
        pytest.param(lambda host: setattr(host, "table", nn.Parameter(torch.randn(1, 13, 8))), id="another parameter"),
        pytest.param(lambda host: host.double(), id="double"),
        pytest.param(lambda host: host.bfloat16(), id="bfloat16"),
        pytest.param(lambda host: host.bfloat16().float(), id="there and back"),
    ],
)
def test_never_stale(change):
    host = Host()
    before = host((7, 5))
    change(host)
    after = host((7, 5))
    assert after.dtype == host.table.dtype
    assert torch.equal(after, oracle(host, (7, 5)))
    assert not torch.equal(after.double(), before.double()) or torch.equal(oracle(host, (7, 5)).double(), before)


@torch.no_grad()
@pytest.mark.parametrize("way", ["there and back", "another parameter"])
def test_never_stale_where_memory_is_used_again(way):
    host = Host()
    for _ in range(30):
        host((7, 5))
        if way == "another parameter":
            host.table = None
            host.table = nn.Parameter(torch.randn(1, 13, 8))
        else:
            host.table.mul_(1.01)
            host((7, 5))
            host.bfloat16().float()
        assert torch.equal(host((7, 5)), oracle(host, (7, 5)))


def test_made_and_run_in_inference_mode():
    with torch.inference_mode():
        host = Host()
        assert torch.equal(host((7, 5)), oracle(host, (7, 5)))
        host.table.mul_(2)
        assert torch.equal(host((7, 5)), oracle(host, (7, 5)))


# Fused optimizers write without counting up the version of what they write.
@pytest.mark.parametrize("kind", [{"foreach": True}, {"fused": True}, {}])
def test_never_stale_after_a_step_of_an_optimizer(kind):
    host = Host()
    optimizer = torch.optim.AdamW(host.parameters(), lr=0.1, **kind)
    with torch.no_grad():
        before = host((7, 5))
    host.train()
    host((7, 5)).square().sum().backward()
    with torch.no_grad():
        host((7, 5))
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(host((7, 5)), oracle(host, (7, 5))), "in training mode"
    host.eval()
    with torch.no_grad():
        after = host((7, 5))
    assert not torch.equal(before, after)
    assert torch.equal(after, oracle(host, (7, 5)))


@torch.no_grad()
def test_eval_forgets():
    host = Host()
    host((7, 5))
    host.table.data.mul_(2)
    host.eval()
    assert torch.equal(host((7, 5)), oracle(host, (7, 5)))


@torch.no_grad()
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda host: pickle.loads(pickle.dumps(host))], ids=["deepcopy", "pickle"]
)
def test_copies_have_their_own_cache(copied):
    host = Host()
    first = host((7, 5))
    twin = copied(host)
    assert twin.resize._cache == {}
    assert torch.equal(twin((7, 5)), first)
    twin.table.add_(1)
    assert torch.equal(twin((7, 5)), oracle(twin, (7, 5)))
    assert host((7, 5)) is first, "the copy disturbs the original"


def test_state_dict_has_the_table_alone():
    host = Host()
    with torch.no_grad():
        host((7, 5))
    assert list(host.state_dict()) == ["table"]
    assert list(host.buffers()) == []


def test_gradients_flow_after_a_kept_result():
    host = Host()
    with torch.no_grad():
        host((7, 5))
    host((7, 5)).sum().backward()
    assert host.table.grad is not None
    # Rows of a resize sum to one each way, so 35 ones reach the 12 rows of the grid: float32 rounding of 35 x 8 sums.
    torch.testing.assert_close(host.table.grad[:, 1:].sum(), torch.tensor(35.0 * 8), rtol=1e-5, atol=0)
    with torch.inference_mode():
        host((3, 3))
    host((3, 3)).sum().backward()


def filter_of(old, new):
    """(new, old): the bicubic filter along one axis, seen on rows that nothing else changes."""
    return F.interpolate(torch.eye(old)[None, None], size=(new, old), mode="bicubic", antialias=True)[0, 0]


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid", [(7, 1), (2, 1), (1, 7)])
def test_one_column_is_right_too(prefix, grid):
    """timm's own answer is not, on the CPU: torch's resize to one column is wrong there in some layouts."""
    host = Host(prefix)
    table = host.table.detach()
    rows, columns = filter_of(4, grid[0]), filter_of(3, grid[1])
    want = torch.einsum("yh,xw,hwc->yxc", rows, columns, table[0, prefix:].unflatten(0, (4, 3))).flatten(0, 1)
    with torch.no_grad():
        got = host(grid)
    assert torch.equal(got[:, :prefix], table[:, :prefix])
    torch.testing.assert_close(got[0, prefix:], want, atol=1e-6, rtol=1e-6)  # float32 sums of four values
