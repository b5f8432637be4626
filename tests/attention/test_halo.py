"""Halo attention against timm's layer and the recorded answers of lucidrains' one."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from timm.layers.halo_attn import HaloAttn

from zoo import create_attention
from zoo.errors import UsageError

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(),
    reason="the authors' recorded answers lie beside the project, in ../shared/golden, and are absent here",
)


def recorded(name):
    spec = importlib.util.spec_from_file_location("golden_check", GOLDEN / "check.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    return check, json.loads((GOLDEN / f"{name}.json").read_text())


@needs_golden
@pytest.mark.parametrize(("name", "mask"), [("halo_attention", True), ("halo_attention_nomask", False)])
def test_equals_the_recorded_layer(name, mask):
    check, golden = recorded(name)
    theirs = check.state_dict(golden)
    attention = create_attention(
        "halo",
        64,
        layout="map",
        preset="lucidrains",
        mask=mask,
        num_heads=4,
        dim_head=16,
        block_size=8,
        halo_size=4,
    )
    ours = {
        "q.weight": theirs["to_q.weight"][..., None, None],
        "kv.weight": theirs["to_kv.weight"][..., None, None],
        "pos_embed.height_rel": theirs["rel_pos_emb.rel_height"],
        "pos_embed.width_rel": theirs["rel_pos_emb.rel_width"],
        "proj.weight": theirs["to_out.weight"][..., None, None],
        "proj.bias": theirs["to_out.bias"],
    }
    attention.load_state_dict(ours, strict=True)
    with torch.no_grad():
        answer = attention.eval()(check.image(golden["input"]["seed"], golden["input"]["shape"]))
    # float32 noise of a softmax over 256 keys is about 1e-6
    assert check.error(answer, golden["outputs"]["logits"]) <= 2e-5
    assert check.error(answer, golden["outputs"]["logits_sub"]) <= 2e-5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_heads": 4, "dim_head": 6},
        {"dim_out": 48, "qk_ratio": 0.33},
        {"stride": 2},
        {"stride": 2, "block_size": 5},
        {"qkv_bias": True},
        {"scale_rel": True},
    ],
)
def test_equals_timms_layer_in_value_and_gradient(options):
    torch.manual_seed(0)
    side = options.get("block_size", 4)
    given = {"num_heads": 8, "block_size": side, "halo_size": 2} | options
    theirs = HaloAttn(32, **{"scale_pos_embed" if key == "scale_rel" else key: value for key, value in given.items()})
    ours = create_attention("halo", 32, layout="map", preset="timm", proj=False, **given)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 32, 2 * side, 4 * side)
    answers, gradients = [], []
    for layer in (theirs, ours):
        image = x.clone().requires_grad_()
        answers.append(layer(image))
        answers[-1].square().mean().backward()
        gradients.append([image.grad, *(p.grad for _, p in sorted(layer.named_parameters()))])
    # float32 sums in another order
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_padding_to_whole_blocks_is_never_seen():
    """A map of 8 x 8 in blocks of 4, and the same map in blocks that reach beyond it, where windows hold all of it."""
    torch.manual_seed(0)
    whole = create_attention("halo", 16, layout="map", num_heads=2, block_size=8, halo_size=0, proj=False).eval()
    beyond = create_attention("halo", 16, layout="map", num_heads=2, block_size=11, halo_size=0, proj=False).eval()
    for key in ("q.weight", "kv.weight"):
        beyond.state_dict()[key].copy_(whole.state_dict()[key])
    for name in ("height_rel", "width_rel"):
        # The same offsets lie three rows further in the larger table.
        getattr(beyond.pos_embed, name).data[3:-3] = getattr(whole.pos_embed, name).data
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(beyond(x), whole(x), rtol=1e-5, atol=1e-6)


def test_a_stride_that_does_not_divide_the_block_averages_inside_the_map():
    torch.manual_seed(0)
    options = {"num_heads": 2, "block_size": 5, "halo_size": 1, "proj": False}
    strided = create_attention("halo", 16, layout="map", stride=2, **options).double()
    whole = create_attention("halo", 16, layout="map", **options).double()
    whole.load_state_dict(strided.state_dict())
    x = torch.randn(2, 16, 7, 9, dtype=torch.float64)
    got, every = strided(x), whole(x)
    assert got.shape[2:] == strided.out_grid((7, 9)) == (4, 5)
    for i in range(4):
        for j in range(5):
            wanted = every[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3))
            torch.testing.assert_close(got[:, :, i, j], wanted)


def test_a_channels_last_map_stays_channels_last():
    attention = create_attention("halo", 32, layout="map", num_heads=4, block_size=4, halo_size=1)
    x = torch.randn(2, 32, 8, 12).contiguous(memory_format=torch.channels_last)
    assert attention(x).is_contiguous(memory_format=torch.channels_last)
    _, k, v = attention.project(x)
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()  # views of one projection


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"preset": "tim"}, "Did you mean 'timm'"),
        ({"num_heads": 5}, "num_heads=5 does not divide 32 channels; valid: .1, 2"),
        ({"dim_out": 0}, "0 channels"),
        ({"block_size": 0}, "block_size=0.*at least 1"),
        ({"halo_size": -1}, "halo_size=-1.*at least 0"),
        ({"stride": 0}, "stride=0.*at least 1"),
        ({"dim_head": 0}, "no channel"),
        ({"qk_ratio": 0.0}, "no channel"),
    ],
)
def test_wrong_options_are_named(options, named):
    with pytest.raises(UsageError, match=named):
        create_attention("halo", 32, **options)
