"""PVT, PVTv2, Swin and CSWin beyond what test_conformance.py asks of all: attention by name, files, memory."""

import copy
import math

import pytest
import timm
import torch

import zoo  # noqa: F401  (registers the models)
from zoo.attention import list_attentions
from zoo.errors import UsageError

_PVT = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_heads": (2, 2, 4, 4), "mlp_ratios": (2, 2, 2, 2)}
_SWIN = {"embed_dim": 8, "depths": (1, 2, 2, 1), "num_heads": (2, 2, 4, 8), "mlp_ratio": 2.0}
_CSWIN = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 4, 8), "mlp_ratio": 2.0}
SMALL = {
    "zoo_pvt_tiny": _PVT,
    "zoo_pvt_v2_b0": _PVT,
    "zoo_swin_tiny_patch4_window7_224": {**_SWIN, "window_size": 3},
    "zoo_cswin_tiny": {**_CSWIN, "stripe_widths": (1, 2, 3, None)},
    "zoo_flatten_pvt_tiny": _PVT,
    "zoo_flatten_pvt_v2_b0": _PVT,
    "zoo_flatten_swin_tiny": {**_SWIN, "window_size": 3},
    "zoo_flatten_cswin_tiny": {**_CSWIN, "stripe_widths": (1, 2, 3, None)},
}


def make(name, **options):
    """A small network of the kind `name`, for images of 64 pixels and 5 classes unless told otherwise."""
    torch.manual_seed(1)
    return timm.create_model(name, **{"img_size": 64, "num_classes": 5, **SMALL[name], **options}).eval()


def images(height=64, width=64, batch=2, channels=3, seed=2):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomise(model, seed=3):
    """Fills every parameter, those that start at zero or one too, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            value.copy_(noise / max(1, value[0].numel()) ** 0.5)
        else:
            value.copy_(0.1 * noise + (1.0 if key.endswith("weight") else 0.0))
    return model


each = pytest.mark.parametrize("name", SMALL)
# Two paths over the same float32 numbers; only the order of sums differs.
NEAR = {"rtol": 1e-4, "atol": 1e-5}


@each
@torch.no_grad()
def test_maps_have_exact_sizes_at_any_size(name):
    """Reduction r gives ceil(side / r), where the side does not divide too; so do tables made for another grid."""
    model = make(name, features_only=True)
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    whole = make(name)
    for height, width in ((64, 64), (50, 71), (97, 33), (1, 1)):
        maps = model(images(height, width))
        sizes = [(math.ceil(height / r), math.ceil(width / r)) for r in model.feature_info.reduction()]
        assert [tuple(map_.shape[2:]) for map_ in maps] == sizes
        assert [map_.shape[1] for map_ in maps] == model.feature_info.channels()
        assert all(map_.isfinite().all() for map_ in maps)
        assert whole(images(height, width)).shape == (2, 5)


@each
@torch.no_grad()
def test_sides_that_do_not_divide_are_padded_with_zeros(name):
    """What pads an image to whole patches is black: the patches of an image padded by hand are the same."""
    model = randomise(make(name))
    x = images(62, 61)
    padded = torch.nn.functional.pad(x, (0, 3, 0, 2))
    torch.testing.assert_close(model.patch_embed(x), model.patch_embed(padded), **NEAR)


@each
@torch.no_grad()
def test_intermediates_are_the_maps(name):
    model = randomise(make(name))
    x = images(50, 71)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    getter = make(name, features_only=True, out_indices=(1, 3))
    getter.model.load_state_dict(model.state_dict(), strict=False)
    for got, want in zip(getter(x), (maps[1], maps[3]), strict=True):
        torch.testing.assert_close(got, want)
    nhwc = model.forward_intermediates(x, indices=[0], output_fmt="NHWC", intermediates_only=True, stop_early=True)
    torch.testing.assert_close(nhwc[0].permute(0, 3, 1, 2), maps[0])
    normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(normed[0], final)
    with pytest.raises(UsageError, match="NLC"):
        model.forward_intermediates(x, output_fmt="NLC")


@each
@torch.no_grad()
def test_pruning_keeps_the_maps(name):
    model = randomise(make(name))
    x = images()
    want = model.forward_intermediates(x, intermediates_only=True)
    cut = copy.deepcopy(model)
    assert cut.prune_intermediate_layers([0, 2]) == [0, 2]
    assert cut.num_features == want[2].shape[1]
    got = cut.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    for a, b in zip(got, (want[0], want[2]), strict=True):
        torch.testing.assert_close(a, b)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())
    assert cut(x).shape == want[2].shape


@each
@torch.no_grad()
def test_memory_stays_channels_last(name):
    """A map that fell back to channels first would cost a copy at every stage and four times the depthwise time."""
    model = make(name)
    for map_ in model.forward_intermediates(images(), intermediates_only=True):
        assert map_.is_contiguous(memory_format=torch.channels_last)


@each
def test_drop_path_rises_linearly_over_all_blocks(name):
    model = make(name, drop_path_rate=0.3)
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    want = [0.3 * index / (len(rates) - 1) for index in range(len(rates))]
    assert rates == pytest.approx(want)


@each
@pytest.mark.parametrize("attn", list_attentions())
def test_any_mechanism_in_any_stage(name, attn):
    model = make(name, attn=attn)
    x = images(50, 71).requires_grad_()
    model(x).sum().backward()
    assert x.grad.isfinite().all()


def test_attention_a_stage_with_options():
    own = make("zoo_flatten_swin_tiny", attn=[None, "uniform", None, None])
    inner = [type(stage.blocks[0].attn).__name__ for stage in own.stages]
    assert inner == ["FocusedLinearAttention", "UniformAttention", "WindowAttention", "WindowAttention"]
    model = make("zoo_pvt_tiny", attn="focused_linear", attn_options=[{"kernel_size": 3}, None, None, {"num_heads": 8}])
    assert model.stages[0].blocks[0].attn.dwc.weight.shape[-1] == 3
    assert model.stages[1].blocks[0].attn.dwc.weight.shape[-1] == 5
    assert model.stages[3].blocks[0].attn.num_heads == 8
    with pytest.raises(UsageError, match="attn has 3 entries, but there are 4 stages"):
        make("zoo_pvt_tiny", attn=["softmax"] * 3)
    with pytest.raises(UsageError, match="Did you mean 'focused_linear'"):
        make("zoo_pvt_tiny", attn="focussed_linear")
    with pytest.raises(UsageError, match="Did you mean 'kernel_size'"):
        make("zoo_flatten_pvt_tiny", attn_options={"kernel_sise": 3})


def test_windows_over_another_mechanism_shift_in_every_second_block():
    options = {"inner": "focused_linear", "inner_options": {"kernel_size": 3}}
    model = make("zoo_swin_tiny_patch4_window7_224", attn="shifted_window", attn_options=options)
    first, second = (block.attn for block in model.stages[1].blocks)
    assert (first.shift_size, second.shift_size) == ((0, 0), (1, 1))
    assert first.inner.dwc.weight.shape[-1] == 3
    assert first.relative_position_bias_table is None


@pytest.mark.parametrize("host", ["pvt_tiny", "pvt_v2_b0", "swin_tiny", "cswin_tiny"])
@torch.no_grad()
def test_a_flatten_network_with_softmax_is_its_host(host):
    plain = {"swin_tiny": "zoo_swin_tiny_patch4_window7_224"}.get(host, f"zoo_{host}")
    ours, theirs = make(f"zoo_flatten_{host}", attn="softmax"), make(plain)
    theirs.load_state_dict(randomise(ours).state_dict(), strict=True)
    assert torch.equal(ours(images()), theirs(images()))


@torch.no_grad()
def awake(name):
    """A network of which every branch matters."""
    return randomise(make(name))


@each
def test_trains_in_any_memory_format_and_precision(name, step_losses):
    """bf16 keeps 8 bits: a step in it, channels last too, is finite and its loss within 2 % of float32's."""
    losses = step_losses(lambda: awake(name), images(), torch.tensor([1, 3]), tolerance=0.02)
    assert losses == pytest.approx([losses[0]] * 4, rel=0.02)


@pytest.mark.parametrize(
    "name",
    # Seconds each: by default the one with the most operations of its own.
    [name if name == "zoo_flatten_swin_tiny" else pytest.param(name, marks=pytest.mark.slow) for name in SMALL],
)
def test_compiles_as_one_graph(name):
    torch._dynamo.reset()
    model = randomise(make(name))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(images(50, 71)), model(images(50, 71)), **NEAR)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SMALL if "flatten" in name])
def test_inductor_agrees(name):
    """A training step of compiled kernels, once a family."""
    torch._dynamo.reset()
    grads = []
    for compiled in (False, True):
        model = randomise(make(name)).train()
        run = torch.compile(model, fullgraph=True) if compiled else model
        run(images()).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    # Fused kernels sum float32 in another order, over gradients that reach hundreds here.
    assert (grads[1] - grads[0]).norm() <= 1e-4 * grads[0].norm()


@each
@torch.no_grad()
def test_pooling_can_be_left_out(name):
    model = make(name)
    model.reset_classifier(0, "")
    assert torch.equal(model(images()), model.forward_features(images()))
    assert model.no_weight_decay() == {
        key for key, _ in model.named_parameters() if key.endswith("relative_position_bias_table")
    }


@each
@torch.no_grad()
def test_own_files_load(name, tmp_path):
    model = randomise(make(name))
    path = tmp_path / "own.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    options = {"img_size": 64, "num_classes": 5, **SMALL[name]}
    other = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 5}, **options
    ).eval()
    assert torch.equal(other(images()), model(images()))


@each
@torch.no_grad()
def test_tables_resized_on_loading_or_in_forward_are_the_same(name, tmp_path):
    model = randomise(make(name))
    path = tmp_path / "own.pth"
    torch.save(model.state_dict(), path)
    options = {**SMALL[name], "img_size": (96, 80), "num_classes": 5}
    other = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 5}, **options
    ).eval()
    x = images(96, 80)
    torch.testing.assert_close(other(x), model(x), **NEAR)


@each
@torch.no_grad()
def test_other_channels_load(name, tmp_path):
    """timm sums the weights of the first convolution over its channels for a single one."""
    model = randomise(make(name))
    path = tmp_path / "own.pth"
    torch.save(model.state_dict(), path)
    options = {**SMALL[name], "img_size": 64, "num_classes": 5, "in_chans": 1}
    other = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 5}, **options
    ).eval()
    x = images(channels=1)
    torch.testing.assert_close(other(x), model(x.expand(-1, 3, -1, -1)), **NEAR)
