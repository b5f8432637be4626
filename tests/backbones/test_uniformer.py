"""UniFormer against what its authors measured and recorded, and what each variant has of its own."""

import copy

import pytest
import timm
import torch
from timm.models import reparameterize_model
from torch import nn

import zoo  # noqa: F401  (registers the models)
from zoo.attention import SoftmaxAttention, list_attentions
from zoo.backbones.uniformer import UniFormer, checkpoint_filter_fn
from zoo.backbones.uniformer_light import ShrinkingUniFormer
from zoo.catalogue import count_macs
from zoo.errors import UsageError
from zoo.layers.conv_norm import ResidualConv

_S, _PLUS, _B, _DIMS = (3, 4, 8, 3), (3, 5, 9, 3), (5, 8, 20, 7), (64, 128, 320, 512)
# Channels, blocks, channels of a head, parameters in millions, multiply-adds in billions at 224 pixels, and what its
# file has besides: LayerScale in the global or all stages, the head of token labelling, overlapping convolutions.
MEASURED = {
    "zoo_uniformer_small": (_DIMS, _S, 64, 21.545, 3.632, ""),
    "zoo_uniformer_small_plus": (_DIMS, _PLUS, 32, 24.033, 4.201, "conv"),
    "zoo_uniformer_small_plus_dim64": (_DIMS, _PLUS, 64, 24.033, 4.201, "conv"),
    "zoo_uniformer_base": (_DIMS, _B, 64, 49.777, 8.249, ""),
    "zoo_uniformer_base_ls": (_DIMS, _B, 64, 49.797, 8.249, "ls"),
    "zoo_uniformer_large_ls": ((128, 192, 448, 640), (5, 10, 24, 7), 64, 100.104, 19.71, "ls_everywhere aux"),
    "zoo_uniformer_small_tl": (_DIMS, _S, 32, 22.058, 3.657, "aux"),
    "zoo_uniformer_small_dim64_tl": (_DIMS, _S, 64, 22.058, 3.657, "aux"),
    "zoo_uniformer_small_plus_tl": (_DIMS, _PLUS, 32, 24.033 + 0.513, None, "conv aux"),
    "zoo_uniformer_small_plus_dim64_tl": (_DIMS, _PLUS, 64, 24.033 + 0.513, None, "conv aux"),
    "zoo_uniformer_base_tl": (_DIMS, _B, 32, 49.777 + 0.513, None, "aux"),
    "zoo_uniformer_base_dim64_tl": (_DIMS, _B, 64, 49.777 + 0.513, None, "aux"),
    "zoo_uniformer_xxs": ((56, 112, 224, 448), (2, 5, 8, 2), 28, 10.215, 1.299, "light"),
    "zoo_uniformer_xs": ((64, 128, 256, 512), (3, 5, 9, 3), 32, 16.509, 1.932, "light"),
}
each = pytest.mark.parametrize("name", MEASURED)
GOLDENS = "uniformer"
_NARROW = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 2), "head_dim": 8, "num_classes": 5}
# One of each kind.
KINDS = ("zoo_uniformer_small", "zoo_uniformer_small_plus_tl", "zoo_uniformer_large_ls", "zoo_uniformer_xxs")
kinds = pytest.mark.parametrize("name", KINDS)
# Two paths over the same float32 numbers; only the order of sums differs.
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def make(name="zoo_uniformer_small", **options):
    torch.manual_seed(1)
    return timm.create_model(name, **{**_NARROW, **options}).eval()


def empty(name):
    with torch.device("meta"):
        return timm.create_model(name).eval()


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
            value.copy_(0.1 * noise + key.endswith(("weight", "gamma")))
    return model


@each
def test_parameters_and_multiply_adds_are_the_measured_ones(name):
    model, (*_, params, gmacs, _) = empty(name), MEASURED[name]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == pytest.approx(params, abs=1e-6)
    if gmacs is not None:
        # The specification's digits were rounded from four of them.
        digits = len(str(gmacs).partition(".")[2])
        assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(gmacs, abs=0.5 * 10**-digits + 0.5e-4)


@each
def test_heads_have_the_width_of_the_name(name):
    """It cannot be read from a file: files of 32 and of 64 have the same shapes."""
    model = empty(name)
    attentions = [module for module in model.modules() if isinstance(module, SoftmaxAttention)]
    assert {attention.head_dim for attention in attentions} == {MEASURED[name][2]}
    assert len(attentions) == sum(MEASURED[name][1][2:])


@each
def test_norms_have_the_epsilons_of_the_authors(name):
    """A wrong one would hide in the noise of recorded answers."""
    for key, module in empty(name).named_modules():
        if isinstance(module, nn.LayerNorm):
            outer = "downsample" in key or "patch_embed" in key or key == "norm_cls"
            assert module.eps == (1e-5 if outer else 1e-6), key


def norm(key, dim, batch=False):
    shapes = {f"{key}.weight": (dim,), f"{key}.bias": (dim,)}
    if batch:
        shapes |= {f"{key}.running_mean": (dim,), f"{key}.running_var": (dim,), f"{key}.num_batches_tracked": ()}
    return shapes


def layer(key, *shape):
    return {f"{key}.weight": shape, f"{key}.bias": shape[:1]}


def embedding(number, dim, before, parts):
    key = f"patch_embed{number}"
    if number == 1 and ("conv" in parts or "light" in parts):
        half = dim // 2
        shapes = layer(f"{key}.proj.0", half, before, 3, 3) | norm(f"{key}.proj.1", half, batch=True)
        return shapes | layer(f"{key}.proj.3", dim, half, 3, 3) | norm(f"{key}.proj.4", dim, batch=True)
    if "conv" in parts:
        return layer(f"{key}.proj.0", dim, before, 3, 3) | norm(f"{key}.proj.1", dim, batch=True)
    side = 4 if number == 1 else 2
    return layer(f"{key}.proj", dim, before, side, side) | norm(f"{key}.norm", dim)


def authors_file(name):
    """Section 3 of the specification."""
    dims, depths, _, _, _, parts = MEASURED[name]
    parts = parts.split()
    shapes, before, ratio = {}, 3, 3 if "light" in parts else 4
    for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        shapes |= embedding(stage + 1, dim, before, parts)
        local, one = stage < 2, (1, 1) if stage < 2 else ()
        for index in range(depth):
            block = f"blocks{stage + 1}.{index}"
            shapes |= layer(f"{block}.pos_embed", dim, 1, 3, 3)
            shapes |= norm(f"{block}.norm1", dim, batch=local) | norm(f"{block}.norm2", dim, batch=local)
            if local:
                shapes |= layer(f"{block}.conv1", dim, dim, 1, 1) | layer(f"{block}.conv2", dim, dim, 1, 1)
                shapes |= layer(f"{block}.attn", dim, 1, 5, 5)
            else:
                shapes |= layer(f"{block}.attn.qkv", 3 * dim, dim) | layer(f"{block}.attn.proj", dim, dim)
            shapes |= layer(f"{block}.mlp.fc1", ratio * dim, dim, *one)
            shapes |= layer(f"{block}.mlp.fc2", dim, ratio * dim, *one)
            if "ls_everywhere" in parts or ("ls" in parts and not local):
                gamma = (1, dim, 1, 1) if local else (dim,)
                shapes |= {f"{block}.gamma_1": gamma, f"{block}.gamma_2": gamma}
        before = dim
    shapes |= norm("norm", before, batch=True) | layer("head", 1000, before)
    if "aux" in parts:
        shapes |= layer("aux_head", 1000, before)
    if "light" in parts:
        shapes |= {"cls_token": (1, 1, dims[2])} | layer("cls_upsample", before, dims[2])
        shapes |= norm("norm_cls", before) | layer("head_cls", 1000, before)
    return shapes


@each
def test_every_entry_of_the_authors_file_finds_its_place(name):
    """Not one entry is left over or missing, and each shape fits, for all variants: read without their weights."""
    shapes = authors_file(name)
    counts = {"zoo_uniformer_small": 331, "zoo_uniformer_base_ls": 741, "zoo_uniformer_large_ls": 881}
    counts["zoo_uniformer_xxs"] = 334
    assert len(shapes) == counts.get(name, len(shapes))
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    model = empty(name)
    for wrapped in (state, {"model": state}, {"state_dict_ema": state}):
        loaded = checkpoint_filter_fn(wrapped, model)
        assert {key: value.shape for key, value in loaded.items()} == {
            key: value.shape for key, value in model.state_dict().items()
        }


def test_answers_are_the_authors(golden, tmp_path):
    """Logits and the map of every stage, from a checkpoint in the authors' format."""
    assert authors_file(golden.name) == golden.shapes
    errors = golden.errors(golden.load(tmp_path))
    assert {"logits", "stage4"} <= errors.keys()
    assert max(errors.values()) <= 2e-5, errors  # float32 noise is about 1e-6


@torch.no_grad()
def test_token_labelling_adds_half_of_the_largest_place():
    """Class by class, written out: head(mean of places) + 0.5 * max over places of aux_head(place)."""
    model = randomise(make("zoo_uniformer_small_tl"))
    x = images(64, 96)
    map_ = model.forward_features(x)
    pooled = torch.zeros(2, 5)
    for image in range(2):
        mean = sum(map_[image, :, row, column] for row in range(2) for column in range(3)) / 6
        for label in range(5):
            scores = [
                float(model.aux_head.weight[label] @ map_[image, :, row, column] + model.aux_head.bias[label])
                for row in range(2)
                for column in range(3)
            ]
            own = float(model.head.weight[label] @ mean + model.head.bias[label])
            pooled[image, label] = own + 0.5 * max(scores)
    torch.testing.assert_close(model(x), pooled, **NEAR)
    logits, places = model.forward_auxiliary(x)
    assert places.shape == (2, 6, 5)
    torch.testing.assert_close(logits + 0.5 * places.max(1)[0], pooled, **NEAR)
    want = model.aux_head.weight @ map_[1, :, 1, 0] + model.aux_head.bias
    torch.testing.assert_close(places[1, 3], want, **NEAR)


@pytest.mark.parametrize("name", ["zoo_uniformer_small_tl", "zoo_uniformer_xxs"])
def test_a_second_classifier_follows_the_first(name):
    model = make(name).double()
    model.reset_classifier(7)
    heads = model.get_classifier()
    assert [head.out_features for head in heads] == [7, 7]
    assert heads[1].weight.dtype == torch.float64
    model.train()
    out = model(images().double())
    assert out.shape == (2, 7)
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(images().double()).shape == (2, 32)
    with pytest.raises(UsageError, match="this network has no"):
        model.forward_auxiliary(images().double())
    with pytest.raises(UsageError, match="auxiliary head"):
        make().forward_auxiliary(images())


def test_attention_by_stage():
    def names(model):
        return [type(stage.blocks[0].attn).__name__ for stage in model.stages]

    own = ["LocalRelationAttention", "LocalRelationAttention", "SoftmaxAttention", "SoftmaxAttention"]
    assert names(make()) == names(make("zoo_uniformer_xxs")) == own
    assert names(make(attn=[None, "softmax", "uniform", None])) == [own[0], "MapAdapter", "UniformAttention", own[3]]
    assert names(make(attn="local_relation")) == [*own[:2], "TokensAdapter", "TokensAdapter"]
    model = make(attn_options=[{"kernel_size": 7}, None, {"num_heads": 6, "qk_norm": True}, None])
    assert model.stages[0].blocks[0].attn.affinity.kernel_size == (7, 7)
    assert model.stages[2].blocks[0].attn.num_heads == 6
    with pytest.raises(UsageError, match="attn has 3 entries, but there are 4 stages"):
        make(attn=["softmax"] * 3)
    with pytest.raises(UsageError, match="Did you mean 'kernel_size'"):
        make(attn_options=[{"kernel_sise": 3}, None, None, None])
    with pytest.raises(UsageError, match="head_dim=5 does not divide the 24 channels"):
        make(head_dim=5)


@pytest.mark.parametrize("attn", list_attentions())
@pytest.mark.parametrize("name", ["zoo_uniformer_small", "zoo_uniformer_xxs"])
def test_any_mechanism_in_any_stage(name, attn):
    # Cross-shaped windows need an even number of heads.
    model = make(name, attn=attn, head_dim=4)
    x = images(50, 71).requires_grad_()
    model(x).square().sum().backward()
    assert x.grad.isfinite().all()


@kinds
def test_drop_path_rises_linearly_over_all_blocks(name):
    model = make(name, drop_path_rate=0.5)
    blocks = [block for stage in model.stages for block in stage.blocks]
    for part in ("drop_path1", "drop_path2"):
        rates = [getattr(getattr(block, part), "drop_prob", 0.0) for block in blocks]
        assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


@kinds
@torch.no_grad()
def test_memory_stays_channels_last(name):
    model = make(name).to(memory_format=torch.channels_last)
    seen = []
    for key, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) or type(module).__name__.endswith(("Block", "Stage")):
            module.register_forward_hook(lambda m, i, out, key=key: seen.append((key, out)))
    model(images(96, 96).contiguous(memory_format=torch.channels_last))
    maps = [(key, out[0] if isinstance(out, tuple) else out) for key, out in seen]
    assert len(maps) > 30
    assert [key for key, out in maps if not out.is_contiguous(memory_format=torch.channels_last)] == []


@torch.no_grad()
def awake(name):
    """A network of which every branch matters."""
    return randomise(make(name))


@kinds
def test_trains_in_any_memory_format_and_precision(name, step_losses):
    """bf16 keeps 8 bits: a step in it, channels last too, is finite and its loss within 2 % of float32's."""
    losses = step_losses(lambda: awake(name), images(batch=8), torch.arange(8) % 5, tolerance=0.02)
    assert losses == pytest.approx([losses[0]] * 4, rel=0.02)


@kinds
@torch.no_grad()
def test_pruned_and_headless_networks(name):
    model = randomise(make(name))
    want = model.forward_intermediates(images(50, 71), intermediates_only=True)
    for last in (1, 2):
        cut = copy.deepcopy(model)
        assert cut.prune_intermediate_layers([0, last]) == [0, last]
        assert cut.num_features == (16, 24)[last - 1]
        torch.testing.assert_close(cut(images(50, 71)), want[last])
        assert not [key for key, _ in cut.named_parameters() if "norm_cls" in key or "head" in key]
    headless = make(name, num_classes=0, global_pool="")
    headless.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(headless(images(50, 71)), model.norm(want[3]))


@kinds
@torch.no_grad()
def test_own_files_load(name, tmp_path):
    model = randomise(make(name))
    path = tmp_path / "own.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    overlay = {"file": str(path), "num_classes": 5}
    other = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **_NARROW).eval()
    assert torch.equal(other(images()), model(images()))
    fewer = {**_NARROW, "num_classes": 3}
    assert timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **fewer)(images()).shape == (2, 3)


def test_layer_scale_is_where_its_name_says():
    scales = {name: [key for key, _ in empty(name).named_parameters() if key.endswith("gamma")] for name in MEASURED}
    assert len(scales["zoo_uniformer_base_ls"]) == 2 * (20 + 7)
    assert not [key for key in scales["zoo_uniformer_base_ls"] if key.startswith(("stages.0", "stages.1"))]
    assert len(scales["zoo_uniformer_large_ls"]) == 2 * (5 + 10 + 24 + 7)
    assert [name for name, keys in scales.items() if keys] == ["zoo_uniformer_base_ls", "zoo_uniformer_large_ls"]
    model = timm.create_model("zoo_uniformer_large_ls", **_NARROW)
    assert all((p == 1e-6).all() for key, p in model.named_parameters() if key.endswith("gamma"))


def test_light_networks_with_another_global_attention_shrink_nothing():
    assert type(make("zoo_uniformer_xxs", attn=["softmax", None, "softmax", None])) is ShrinkingUniFormer
    model = make("zoo_uniformer_xxs", attn=[None, None, "uniform", None])
    assert type(model) is UniFormer
    assert not [key for key, _ in model.named_parameters() if "cls" in key]
    assert model.stages[0].blocks[0].mlp.fc1.out_channels == 24
    assert isinstance(model.patch_embed, nn.Sequential)
    with pytest.raises(UsageError, match="sr_ratio=1"):
        make("zoo_uniformer_xxs", attn_options=[None, None, {"sr_ratio": 2}, None])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zoo_uniformer_small_tl", "zoo_uniformer_xxs"])
def test_inductor_compiles_it(name):
    torch._dynamo.reset()
    model = randomise(make(name))
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(images()), model(images()), **NEAR)


@pytest.mark.parametrize(
    "options",
    [{}, {"conv_stem": True, "conv_down": True, "init_values": 0.5}, {"attn": "softmax"}, {"qkv_bias": False}],
    ids=str,
)
@torch.no_grad()
def test_fused_network_answers_the_same(options):
    torch.manual_seed(0)
    model = UniFormer(num_classes=7, embed_dims=(8, 16, 24, 32), depths=(2, 1, 1, 1), head_dim=8, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    fused = copy.deepcopy(model.train()).fuse()
    model.eval()
    assert not fused.training
    for size in ((64, 64), (50, 71)):
        x = torch.randn(2, 3, *size)
        # float32 products of folded weights against a norm's own scale and shift.
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
    block = fused.stages[0].blocks[0]
    assert isinstance(block.pos_embed, nn.Conv2d)
    assert not isinstance(block.pos_embed, ResidualConv)
    assert isinstance(block.norm2, nn.Identity)
    assert isinstance(block.norm1, nn.Identity) == ("attn" not in options)
    assert torch.equal(copy.deepcopy(fused).fuse()(x), fused(x))
    # As timm's own tool does it, block by block.
    torch.testing.assert_close(reparameterize_model(model)(x), model(x), rtol=1e-4, atol=1e-4)
