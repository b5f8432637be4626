"""A window sees what lies in it and nothing else, whichever way it is shifted and whatever the inner mechanism does."""

import pytest
import torch

from zoo.attention import attention_spec, create_attention, list_attentions
from zoo.errors import UsageError

SIDE, WINDOW, DIM = 8, 4, 16
BIASED = [name for name in list_attentions() if "bias" in attention_spec(name).supports]
INNER = [*((name, {}) for name in BIASED), ("softmax", {"lepe": 3}), ("softmax", {"sr_ratio": 2}), ("uniform", {})]


def shifted(inner, options, prefix=0, **more):
    torch.manual_seed(0)
    given = {"inner_options": options, "window_size": WINDOW, "num_prefix_tokens": prefix, **more}
    attention = create_attention("shifted_window", DIM, inner=inner, **given).double().eval()
    for parameter in attention.parameters():  # what starts at zero would hide what goes through it
        parameter.data += 0.3 * torch.randn_like(parameter)
    return attention


def window_of(cell):
    return (cell // SIDE + WINDOW // 2) // WINDOW, (cell % SIDE + WINDOW // 2) // WINDOW


def hidden_rows():
    """The last two rows, which are all of the windows at the lower border."""
    mask = torch.ones(1, SIDE * SIDE, dtype=torch.bool)
    mask[:, 6 * SIDE :] = False
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("inner", "options"), INNER, ids=str)
def test_answers_depend_on_their_own_window_alone(inner, options, masked):
    attention, mask = shifted(inner, options), hidden_rows() if masked else None
    x = torch.randn(1, SIDE * SIDE, DIM, dtype=torch.float64)
    # A middle cell, corners, and masked ones: in a rolled grid all four corners share a window.
    for cell in (0, 7, 3 * SIDE + 3, 7 * SIDE, SIDE * SIDE - 1):
        moved = x.clone()
        moved[:, cell] += 1 + torch.arange(DIM)
        change = (attention(moved, (SIDE, SIDE), key_mask=mask) - attention(x, (SIDE, SIDE), key_mask=mask))[0]
        change = change.abs().amax(1)
        others = [place for place in range(SIDE * SIDE) if window_of(place) != window_of(cell)]
        assert change[others].max() < 1e-12  # float64: another batch of windows may be summed in another order
        seen = mask is None or bool(mask[0, cell])
        # A choice of keys may leave this one to itself, but to itself it counts.
        assert not seen or change[cell] > 1e-6


@pytest.mark.parametrize("inner", ["softmax", "uniform", "rela"])
def test_without_keys_of_its_own_window_the_answer_is_zero(inner):
    attention = shifted(inner, {})
    attention.inner.proj = torch.nn.Identity()
    x = torch.randn(1, SIDE * SIDE, DIM, dtype=torch.float64)
    out = attention(x, (SIDE, SIDE), key_mask=hidden_rows())[0]
    assert not out[6 * SIDE :].any()
    assert out[: 6 * SIDE].any(1).all()


@pytest.mark.parametrize("inner", ["softmax", "uniform"])
def test_prefix_tokens_see_the_same_windows_with_and_without_a_mask(inner):
    attention = shifted(inner, {}, prefix=2)
    x = torch.randn(1, 2 + SIDE * SIDE, DIM, dtype=torch.float64)
    mask = torch.ones(1, 2 + SIDE * SIDE, dtype=torch.bool)
    torch.testing.assert_close(attention(x, (SIDE, SIDE)), attention(x, (SIDE, SIDE), key_mask=mask))


def test_a_shift_is_rolled_where_a_bias_keeps_all_apart():
    """Which is faster: fewer windows."""
    assert shifted("softmax", {}).cut((SIDE, SIDE)).padded == (SIDE, SIDE)
    assert shifted("super", {}).cut((SIDE, SIDE)).padded == (SIDE + WINDOW, SIDE + WINDOW)


def test_relative_positions_need_a_key_for_every_cell():
    with pytest.raises(UsageError, match="sr_ratio=2 of 'softmax' makes fewer"):
        shifted("softmax", {"sr_ratio": 2}, rel_pos_bias=True)
