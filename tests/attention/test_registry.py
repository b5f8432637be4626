"""The registry: names, options and facts of mechanisms, and the adapters that carry one into the other layout."""

import pytest
import torch

from zoo.attention import _heads, attention_spec, create_attention, list_attentions, register_attention, with_defaults
from zoo.attention.adapters import MapAdapter, TokensAdapter
from zoo.attention.base import Attention
from zoo.errors import UsageError

DIM = 32


def build(name, **framework):
    torch.manual_seed(1)
    return create_attention(name, DIM, **framework).eval()


def tokens(grid, batch=2):
    return torch.randn(batch, grid[0] * grid[1], DIM, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", list_attentions())
def test_fixed_grid_is_what_the_parameters_say(name):
    """A wrapper is as the mechanism inside it."""
    shapes = [[p.shape for p in build(name, grid_size=size).parameters()] for size in ((7, 7), (7, 13))]
    assert (shapes[0] != shapes[1]) == attention_spec(name).fixed_grid


@pytest.mark.parametrize("name", list_attentions())
def test_a_map_of_all_pairs_is_declared_and_bounded(name, monkeypatch):
    """Declared if and only if a bound of 2 images stops 3, by an error that says how many fit."""
    attention, grid = build(name), (5, 6)
    x = tokens(grid, batch=3)
    attention(x, grid)
    heads = getattr(attention, "num_heads", 1)
    monkeypatch.setattr(_heads, "MAX_MAP_NUMBERS", 2 * heads * 30 * 30 * getattr(attention, "map_width", 1))
    if attention_spec(name).forms_map:
        with pytest.raises(ValueError, match=r"3 images.*At most 2 of these"):
            attention(x, grid)
        attention(x[:2], grid)
    else:
        attention(x, grid)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_bound_on_maps_by_hand(compiled):
    """3 heads x 4,096 x 4,096 are 50.3 million numbers an image: 42 images are below 2**31, 43 above."""
    torch._dynamo.reset()
    with torch.device("meta"):
        attention = create_attention("rela", 192, num_heads=3)
        call = torch.compile(attention, backend="eager") if compiled else attention
        assert call(torch.empty(42, 4096, 192)).shape == (42, 4096, 192)
        with pytest.raises(ValueError, match=r"43 images x 3 heads x 4096 queries.*At most 42 of these"):
            call(torch.empty(43, 4096, 192))


def test_unknown_names_and_options_help():
    with pytest.raises(UsageError, match="Did you mean 'softmax'"):
        create_attention("sofmax", DIM)
    with pytest.raises(UsageError, match=r"'num_head'.*Did you mean 'num_heads'"):
        create_attention("softmax", DIM, num_head=4)
    with pytest.raises(UsageError, match=r"num_heads.*Valid: "):
        create_attention("uniform", DIM, num_heads=4)
    with pytest.raises(UsageError, match="layout"):
        create_attention("softmax", DIM, layout="nchw")
    with pytest.raises(UsageError, match="prefix"):
        create_attention("softmax", DIM, layout="map", num_prefix_tokens=1)
    with pytest.raises(UsageError, match="unknown attention 'sofmax'"):
        create_attention("window", DIM, inner="sofmax")
    with pytest.raises(ValueError, match=r"num_heads=5.*valid: "):
        create_attention("softmax", DIM, num_heads=5)
    with pytest.raises(UsageError, match="window_size"):
        create_attention("window", DIM, window_size=0)
    with pytest.raises(UsageError, match="window_size"):
        create_attention("window", DIM, window_size=2.5)
    with pytest.raises(UsageError, match="stripe_width"):
        create_attention("cross_window", DIM, stripe_width=(3, 5))
    with pytest.raises(UsageError, match="smaller than the window"):
        create_attention("shifted_window", DIM, window_size=4, shift_size=4)
    with pytest.raises(ValueError, match=r"do not fill a grid"):
        create_attention("window", DIM)(tokens((7, 13)), (7, 12))


def test_registering_checks_the_facts():
    class Plain(Attention):
        def __init__(self, dim, *, width=3, grid_size=(14, 14), num_prefix_tokens=0):
            super().__init__(dim)

    class Swallows(Attention):
        def __init__(self, dim, **options):
            super().__init__(dim)

    facts = {"paper": "none", "cost": "0"}
    with pytest.raises(ValueError, match="registered already"):
        register_attention("softmax", prefix="mix", supports=("prefix",), **facts)(Plain)
    with pytest.raises(ValueError, match=r"\*\*kwargs"):
        register_attention("swallows", prefix="refuse", **facts)(Swallows)
    with pytest.raises(ValueError, match="does not agree"):
        register_attention("mixed", prefix="mix", **facts)(Plain)
    assert "mixed" not in list_attentions()


def test_defaults_of_a_host_reach_the_mechanism_inside():
    defaults = {"num_heads": 4, "qkv_bias": False, "unheard_of": 1}
    assert with_defaults("softmax", {"qkv_bias": True}, defaults) == {"num_heads": 4, "qkv_bias": True}
    merged = with_defaults("window", {"window_size": 3}, defaults)
    assert merged == {"window_size": 3, "inner_options": {"num_heads": 4, "qkv_bias": False}}
    with pytest.raises(UsageError, match="num_head"):
        create_attention("window", DIM, **with_defaults("window", {"inner_options": {"num_head": 2}}, defaults))


class _Doubles(Attention):
    """A mechanism that lives in maps and refuses masks, to test the adapters alone."""

    layout = "map"

    def forward(self, x, grid=None, key_mask=None, bias=None):
        return 2 * x


class _Shows(Attention):
    """Returns its input, so that a test sees which memory the adapters hand on."""

    def forward(self, x, grid=None, key_mask=None, bias=None):
        return x


def test_channels_last_maps_and_tokens_are_views():
    x = torch.randn(2, DIM, 5, 6).contiguous(memory_format=torch.channels_last)
    out = MapAdapter(_Shows(DIM))(x)
    assert out.data_ptr() == x.data_ptr()
    assert out.is_contiguous(memory_format=torch.channels_last)
    shows = _Shows(DIM)
    shows.layout = "map"
    t = torch.randn(2, 30, DIM)
    out = TokensAdapter(shows)(t, (5, 6))
    assert out.data_ptr() == t.data_ptr()
    assert out.is_contiguous()


def test_prefix_tokens_pass_a_native_map_unchanged():
    x = torch.randn(2, 1 + 30, DIM)
    out = TokensAdapter(_Doubles(DIM), num_prefix_tokens=1)(x, (5, 6))
    assert torch.equal(out[:, :1], x[:, :1])
    assert torch.equal(out[:, 1:], 2 * x[:, 1:])
