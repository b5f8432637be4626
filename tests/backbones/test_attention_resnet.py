"""The ResNet with named mixing, against timm's ResNets: mixed by convolutions it is one of them."""

import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers import SqueezeExcite
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

import zoo  # noqa: F401  (registers the models)
from zoo.attention import list_attentions
from zoo.backbones.attention_resnet import checkpoint_filter_fn
from zoo.catalogue import attentions_in, count_macs
from zoo.errors import UsageError

SMALL = {
    "stem_dims": (8,),
    "widths": (8, 8, 16, 16),
    "depths": (1, 2, 2, 1),
    "expansion": 2.0,
    "num_heads": (2, 2, 2, 2),
    "num_classes": 5,
}
# Two paths over the same float32 numbers; only the order of sums differs.
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def make(**options):
    torch.manual_seed(1)
    return timm.create_model("zoo_attention_resnet50", **{**SMALL, **options}).eval()


def images(height=64, width=64, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def randomise(model):
    """Fills every parameter and statistic, so that each of them matters."""
    generator = torch.Generator().manual_seed(3)
    for key, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if key.endswith("running_var"):
            value.copy_(0.75 + 0.5 * torch.rand(value.shape, generator=generator))
        elif value.ndim > 1:
            value.copy_(noise / value[0].numel() ** 0.5)
        elif value.ndim == 1:
            value.copy_(0.1 * noise + key.endswith("weight"))
    return model


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (97, 131)])
def test_mixed_by_convolutions_it_is_timms_resnet50(size):
    theirs = randomise(timm.create_model("resnet50", num_classes=5)).eval()
    ours = timm.create_model("zoo_attention_resnet50", attn="conv", num_classes=5).eval()
    ours.load_state_dict(checkpoint_filter_fn({"state_dict": theirs.state_dict()}, ours))
    x = images(*size, batch=1)
    # The same operations in the same order, but for the fused addition that timm makes in place.
    torch.testing.assert_close(ours(x), theirs(x), **NEAR)
    for one, two in zip(ours.forward_intermediates(x)[1], theirs.forward_intermediates(x)[1][1:], strict=True):
        torch.testing.assert_close(one, two, **NEAR)


def resnet_d(key):
    """The name in our network of an entry of timm's ResNet-D of the same shape."""
    stem = {"conv1.0": "0.conv", "conv1.1": "0.bn", "conv1.3": "2.conv", "conv1.4": "2.bn", "conv1.6": "4.conv"}
    part, _, leaf = key.rpartition(".")
    if not part.startswith("layer"):
        return f"patch_embed.{ {**stem, 'bn1': '4.bn'}[part] }.{leaf}" if part != "fc" else f"head.{leaf}"
    stage, block, layer = part.removeprefix("layer").split(".", 2)
    inner = {"conv1": "conv1.conv", "bn1": "conv1.bn", "conv2": "mixer.conv", "bn2": "mixer.bn"}
    inner |= {"conv3": "conv3.conv", "bn3": "conv3.bn"}
    inner |= {"downsample.1": "shortcut.1.conv", "downsample.2": "shortcut.1.bn"}
    # Where nothing is averaged, in the first stage, ours is the convolution alone and theirs has an Identity.
    name = inner.get(layer, layer)
    return f"stages.{int(stage) - 1}.blocks.{block}.{name.replace('.1.', '.') if stage == '1' else name}.{leaf}"


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (97, 131)])
def test_stem_averages_and_excitation_are_those_of_timms_resnet_d(size):
    excite = partial(SqueezeExcite, rd_ratio=0.25)
    blocks = {"block": Bottleneck, "layers": (1, 2, 2, 1), "block_args": {"attn_layer": excite}, "num_classes": 5}
    theirs = randomise(ResNet(**blocks, stem_width=32, stem_type="deep", avg_down=True)).eval()
    wide = {"widths": (64, 128, 256, 512), "expansion": 4.0}
    ours = make(attn="conv", stem_dims=(32, 32, 64), avg_down=True, se=True, **wide)
    ours.load_state_dict({resnet_d(key): value for key, value in theirs.state_dict().items()})
    x = images(*size)
    torch.testing.assert_close(ours(x), theirs(x), **NEAR)


def test_sizes_of_resnet50():
    """torchvision's table: 25,557,032 parameters and 4.09 G multiply-adds."""
    with torch.device("meta"):
        model = timm.create_model("zoo_attention_resnet50", attn="conv").eval()
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    assert round(count_macs(model, (3, 224, 224)) / 1e9, 2) == 4.09


def mixing(model):
    return ["+".join("/".join(attentions_in(b)) or "conv" for b in stage.blocks) for stage in model.stages]


def test_mixing_by_stage_and_by_block():
    assert mixing(make()) == ["conv", "conv+conv", "softmax+softmax", "softmax"]
    assert mixing(make(attn="uniform")) == ["conv", "conv+conv", "uniform+uniform", "uniform"]
    assert mixing(make(attn="conv")) == ["conv", "conv+conv", "conv+conv", "conv"]
    assert mixing(make(attn=["uniform", None, ("conv", "uniform"), None])) == [
        "uniform",
        "conv+conv",
        "conv+uniform",
        "softmax",
    ]
    alternating = {"depths": (1, 1, 5, 1), "mixers": ("conv", "conv", ("conv", "softmax"), "softmax")}
    assert mixing(make(**alternating))[2] == "conv+softmax+conv+softmax+conv"
    assert mixing(make(**alternating, attn="uniform"))[2] == "conv+uniform+conv+uniform+conv"
    assert mixing(make(**alternating, attn=[None, None, (None, "uniform", "uniform"), None]))[2] == (
        "conv+uniform+uniform+softmax+uniform"
    )


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="attn has 2 entries, but there are 4 stages"):
        make(attn=["softmax"] * 2)
    with pytest.raises(UsageError, match="Did you mean 'softmax'"):
        make(attn="softmx")
    with pytest.raises(UsageError, match="Did you mean 'qkv_bias'"):
        make(attn_options={"qkv_bia": False})
    with pytest.raises(UsageError, match=r"not \(\); the 3x3"):
        make(attn=[None, None, (), None])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attn": 5}, "a sequence of names, not 5"),
        ({"attn_options": 5}, "a mapping of options"),
        ({"num_heads": (2, 2)}, "num_heads has 2 entries, but there are 4 stages"),
        ({"widths": (8, 8)}, "widths has 2 entries, but there are 4 stages"),
        ({"num_heads": (2, 2, 2, 0)}, "all at least 1"),
        ({"depths": (1, 0, 1, 1)}, "all at least 1"),
        ({"stem_dims": ()}, r"stem_dims=\(\).*all at least 1"),
        ({"mixer_options": {"sofmax": {}}}, "Did you mean 'softmax'"),
        ({"mixer_options": {"softmax": {"qkv_bia": False}}}, "Did you mean 'qkv_bias'"),
    ],
    ids=str,
)
def test_every_argument_that_cannot_be_is_named(options, said):
    with pytest.raises(UsageError, match=said):
        make(**options)


def test_options_of_the_networks_own_mechanisms_go_last():
    own = {"mixer_options": {"softmax": {"qkv_bias": False, "num_heads": 4}}}
    blocks = [stage.blocks[0].mixer.attn.attn for stage in make(**own).stages[2:]]
    assert [(attn.num_heads, attn.qkv.bias) for attn in blocks] == [(4, None)] * 2
    asked = make(**own, attn_options=[None, None, {"num_heads": 8}, None])
    assert [stage.blocks[0].mixer.attn.attn.num_heads for stage in asked.stages[2:]] == [8, 4]
    other = make(**own, attn="focused_linear")
    assert other.stages[2].blocks[0].mixer.attn.attn.num_heads == 2


@torch.no_grad()
def test_a_mechanism_without_stride_is_averaged_inside_the_map():
    """3x3 means at every second place, of the places that exist: of a map of ones they are ones."""
    block = make().stages[3].blocks[0]
    x = torch.randn(2, 16, 5, 7)
    wanted = torch.empty(2, 16, 3, 4)
    attended = block.mixer.attn(x)
    for i in range(3):
        for j in range(4):
            rows, columns = slice(max(2 * i - 1, 0), 2 * i + 2), slice(max(2 * j - 1, 0), 2 * j + 2)
            wanted[:, :, i, j] = attended[:, :, rows, columns].mean((2, 3))
    torch.testing.assert_close(block.mixer(x), block.mixer.bn(wanted), **NEAR)


@pytest.mark.parametrize("attn", list_attentions())
def test_any_mechanism_in_any_stage(attn):
    # The branches of fresh blocks are multiplied by zero.
    model = randomise(make(attn=[attn] * 4))
    assert attn in mixing(model)[0]  # inside of a wrapper there is another one
    x = images(97, 65).requires_grad_()
    model(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_fresh_blocks_are_their_shortcuts():
    model = make().train()
    x = torch.randn(2, 32, 4, 4).relu()
    assert torch.equal(model.stages[2].blocks[1](x), x)


def test_convolutions_start_normal_by_their_fan_out():
    """He et al. 2015: variance 2 / (outputs * places of the kernel)."""
    model = make(widths=(64, 64, 64, 64), stem_dims=(64,))
    for key, value in model.named_parameters():
        if key.endswith("conv.weight"):
            wanted = (2 / (value.shape[0] * value[0, 0].numel())) ** 0.5
            # The standard deviation of n normal numbers is off by 1 / sqrt(2 n): five of these.
            assert value.std().item() == pytest.approx(wanted, rel=5 / (2 * value.numel()) ** 0.5), key


def test_drop_path_rises_linearly_over_all_blocks():
    model = make(drop_path_rate=0.5)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("options", [{}, {"attn": "conv", "avg_down": True, "se": True, "final_dim": 24}], ids=str)
@torch.no_grad()
def test_fused_network_answers_the_same(options):
    model = randomise(make(**options)).train()
    fused = copy.deepcopy(model).fuse()
    model.eval()
    assert not fused.training
    left = [name for name, module in fused.named_modules() if isinstance(module, nn.BatchNorm2d)]
    # Only what follows attention is left: there is no convolution to fold it into.
    assert all(name.endswith("mixer.bn") for name in left)
    assert len(left) == (0 if options else 3)
    x = images(50, 71)
    torch.testing.assert_close(fused(x), model(x), **NEAR)


@torch.no_grad()
def test_memory_stays_channels_last():
    model = make(avg_down=True, se=True, final_dim=24).to(memory_format=torch.channels_last)
    seen = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, out, name=name: seen.append((name, out)))
    model(images(50, 71).contiguous(memory_format=torch.channels_last))
    # Queries and keys of heads are no maps.
    seen = [(name, out) for name, out in seen if not name.endswith(("q_norm", "k_norm"))]
    maps = [(name, out) for name, out in seen if isinstance(out, torch.Tensor) and out.ndim == 4]
    assert len(maps) > 50
    assert [name for name, out in maps if not out.is_contiguous(memory_format=torch.channels_last)] == []


@torch.no_grad()
def test_pruned_networks_and_the_final_convolution():
    model = randomise(make(final_dim=24))
    x = images(50, 71)
    final, maps = model.forward_intermediates(x)
    assert final.shape[1] == model.num_features == 24
    assert maps[-1].shape[1] == model.feature_info[-1]["num_chs"] == 32
    assert torch.equal(model.forward_features(x), final)
    cut = copy.deepcopy(model)
    assert cut.prune_intermediate_layers([1, 2]) == [1, 2]
    assert cut.num_features == cut.head_hidden_size == 32
    assert torch.equal(cut(x), maps[2])
    # A classifier of 24 features cannot stay when what makes them goes.
    bare = copy.deepcopy(model)
    bare.prune_intermediate_layers([3], prune_norm=True, prune_head=False)
    assert torch.equal(bare(x), maps[3])
    bare.reset_classifier(3, "avg")
    assert bare(x).shape == (2, 3)


@pytest.mark.slow
def test_inductor_compiles_it():
    torch._dynamo.reset()
    model = randomise(make())
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(images()), model(images()), **NEAR)
