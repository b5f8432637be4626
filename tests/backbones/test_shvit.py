"""SHViT against what its authors measured and recorded, and against timm's network."""

import copy

import pytest
import timm
import torch
from torch import nn

import zoo  # noqa: F401  (registers the models)
from zoo.attention import list_attentions
from zoo.backbones.shvit import checkpoint_filter_fn
from zoo.catalogue import count_macs
from zoo.errors import UsageError

# Channels, blocks, channels that attend, parameters in millions and multiply-adds in billions at the native size.
MEASURED = {
    "zoo_shvit_s1": ((128, 224, 320), (2, 4, 5), (32, 48, 68), 6.331, 0.2413),
    "zoo_shvit_s2": ((128, 308, 448), (2, 4, 5), (32, 66, 96), 11.483, 0.3654),
    "zoo_shvit_s3": ((192, 352, 448), (3, 5, 5), (48, 75, 96), 14.245, 0.6006),
    "zoo_shvit_s4": ((224, 336, 448), (4, 7, 6), (48, 72, 96), 16.589, 0.9862),
}
each = pytest.mark.parametrize("name", MEASURED)
GOLDENS = "shvit"
SMALL = {"embed_dims": (16, 24, 32), "depths": (1, 2, 2), "partial_dims": (4, 6, 7), "qk_dim": 4, "num_classes": 5}
# Two paths over the same float32 numbers; only the order of sums differs.
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def make(**options):
    torch.manual_seed(1)
    return timm.create_model("zoo_shvit_s1", **{**SMALL, **options}).eval()


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
            value.copy_(0.1 * noise + key.endswith("weight"))
    return model


@each
def test_parameters_and_multiply_adds_are_the_measured_ones(name):
    model, (*_, params, gmacs) = empty(name), MEASURED[name]
    # The specification's three digits were rounded from four: 16,588,484 parameters of S4 are its 16.589 M.
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, abs=0.5e-3 + 0.5e-4)
    assert round(count_macs(model, model.default_cfg["input_size"]) / 1e9, 4) == gmacs


def batch_norm(key, dim):
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{key}.{name}": (dim,) for name in names} | {f"{key}.num_batches_tracked": ()}


def conv(key, out, into, size=1):
    return {f"{key}.c.weight": (out, into, size, size)} | batch_norm(f"{key}.bn", out)


def residuals(first, second, dim):
    """A depthwise convolution and a feed-forward layer, under the names that the authors give them."""
    shapes = conv(f"{first}.m", dim, 1, 3)
    return shapes | conv(f"{second}.m.pw1", 2 * dim, dim) | conv(f"{second}.m.pw2", dim, 2 * dim)


def authors_file(name):
    """Section 3 of the specification."""
    dims, depths, parts, *_ = MEASURED[name]
    shapes, before = {}, 3
    for index, part in enumerate((8, 4, 2, 1)):
        shapes |= conv(f"patch_embed.{2 * index}", dims[0] // part, before, 3)
        before = dims[0] // part
    for stage, (dim, depth, part) in enumerate(zip(dims, depths, parts, strict=True)):
        blocks, first = f"blocks{stage + 1}", 0
        if stage:
            wide, first = 4 * before, 3
            squeezed = -(-wide // 32) * 8 if wide % 32 > 15 else wide // 32 * 8
            shapes |= residuals(f"{blocks}.0.0", f"{blocks}.0.1", before)
            shapes |= conv(f"{blocks}.1.conv1", wide, before) | conv(f"{blocks}.1.conv2", wide, 1, 3)
            shapes |= {f"{blocks}.1.se.fc1.weight": (squeezed, wide, 1, 1), f"{blocks}.1.se.fc1.bias": (squeezed,)}
            shapes |= {f"{blocks}.1.se.fc2.weight": (wide, squeezed, 1, 1), f"{blocks}.1.se.fc2.bias": (wide,)}
            shapes |= conv(f"{blocks}.1.conv3", dim, wide)
            shapes |= residuals(f"{blocks}.2.0", f"{blocks}.2.1", dim)
        for index in range(first, first + depth):
            block = f"{blocks}.{index}"
            shapes |= residuals(f"{block}.conv", f"{block}.ffn", dim)
            if stage:
                shapes |= {f"{block}.mixer.m.pre_norm.weight": (part,), f"{block}.mixer.m.pre_norm.bias": (part,)}
                shapes |= conv(f"{block}.mixer.m.qkv", 32 + part, part) | conv(f"{block}.mixer.m.proj.1", dim, dim)
        before = dim
    return shapes | batch_norm("head.bn", before) | {"head.l.weight": (1000, before), "head.l.bias": (1000,)}


@each
def test_every_entry_of_the_authors_file_finds_its_place(name):
    """Not one entry is left over or missing, and each shape fits, for all variants: read without their weights."""
    state = {key: torch.empty(shape, device="meta") for key, shape in authors_file(name).items()}
    model = empty(name)
    loaded = checkpoint_filter_fn({"model": state}, model)
    assert {key: value.shape for key, value in loaded.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


@torch.no_grad()
def test_matrices_load_as_convolutions():
    model = randomise(make())
    state = {
        key: value[:, :, 0, 0] if value.ndim == 4 and value.shape[2:] == (1, 1) and ".se." not in key else value
        for key, value in model.state_dict().items()
    }
    assert any(value.ndim == 2 for key, value in state.items() if key != "head.fc.weight")
    other = make()
    other.load_state_dict(checkpoint_filter_fn(state, other), strict=True)
    assert torch.equal(other(images()), model(images()))


def test_answers_are_the_authors(golden, tmp_path):
    """Logits and the map of every stage, from a checkpoint in the authors' format; the logits fused too."""
    assert authors_file(golden.name) == golden.shapes
    model = golden.load(tmp_path)
    errors = golden.errors(model)
    assert {"logits", "stage3"} <= errors.keys()
    errors["fused"] = golden.errors(model.fuse())["logits"]
    assert max(errors.values()) <= 2e-5, errors  # float32 noise is about 1e-6


@pytest.mark.parametrize(
    "name", [name if name == "zoo_shvit_s1" else pytest.param(name, marks=pytest.mark.slow) for name in MEASURED]
)
@torch.inference_mode()
def test_timms_weights_make_timms_network(name):
    theirs = randomise(timm.create_model(name.removeprefix("zoo_")).eval())
    model = timm.create_model(name).eval()
    model.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), model), strict=True)
    x = images(120, 97)
    want = theirs(x)
    # float32 noise: both take the same products.
    assert (model(x) - want).abs().max() <= 5e-6 * want.abs().max()


@pytest.mark.parametrize("options", [{}, {"attn": "softmax"}, {"num_classes": 0}], ids=str)
@torch.no_grad()
def test_fused_network_answers_the_same_with_fewer_layers(options):
    model = randomise(make(**options)).train()
    fused = copy.deepcopy(model).fuse()
    model.eval()
    assert not fused.training
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fused.modules())
    # One convolution for each that there was, and not one addition round a depthwise one.
    was, now = ([m for m in one.modules() if isinstance(m, nn.Conv2d)] for one in (model, fused))
    assert [m.weight.shape for m in now[4:]] == [m.weight.shape for m in was[4:]]
    # Four in the stem, with channels between them filled up to eights.
    assert [m.in_channels for m in now[:4]] == [3, *(-(-m.in_channels // 8) * 8 for m in was[1:4])]
    assert [m.weight.shape[:2] for m in now[:4]] == [(m.out_channels, m.in_channels) for m in now[:4]]
    assert now[3].out_channels == was[3].out_channels
    assert isinstance(fused.stages[0].blocks[0].conv, nn.Conv2d)
    assert isinstance(fused.stages[1].downsample[0], nn.Conv2d)
    for size in ((64, 64), (50, 71)):
        x = images(*size)
        torch.testing.assert_close(fused(x), model(x), **NEAR)
        for one, two in zip(fused.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True):
            torch.testing.assert_close(one, two, **NEAR)
    again = copy.deepcopy(fused).fuse()
    assert torch.equal(again(images()), fused(images()))
    frozen = model.requires_grad_(False).fuse()
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.slow
def test_export_writes_the_fused_network(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("lightning")
    import zoo.export
    import zoo.tasks

    task = zoo.tasks.Classification(
        backbone="zoo_shvit_s1", class_names=list("abcde"), img_size=64, backbone_options={"depths": (1, 1, 1)}
    )
    randomise(task.backbone)
    before = {key: value.clone() for key, value in task.state_dict().items()}
    zoo.export.to_onnx(task, tmp_path / "model.onnx", preprocess={"crop_pct": 1.0})
    assert all(torch.equal(value, before[key]) for key, value in task.state_dict().items())
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert "BatchNormalization" not in kinds
    assert kinds.count("Conv") == sum(isinstance(m, nn.Conv2d) for m in task.backbone.modules())


def test_attention_by_stage():
    def kinds(model):
        return [type(stage.blocks[0].attn).__name__ for stage in model.stages]

    assert kinds(make()) == ["NoneType", "SingleHeadAttention", "SingleHeadAttention"]
    assert kinds(make(attn="local_relation")) == ["NoneType", "LocalRelationAttention", "LocalRelationAttention"]
    assert kinds(make(attn=["local_relation", None, "softmax"])) == [
        "LocalRelationAttention",
        "SingleHeadAttention",
        "MapAdapter",
    ]
    model = make(attn_options=[None, {"qk_dim": 3}, None])
    assert [stage.blocks[0].attn.qk_dim for stage in model.stages[1:]] == [3, 4]
    with pytest.raises(UsageError, match="attn has 2 entries, but there are 3 stages"):
        make(attn=["softmax"] * 2)
    with pytest.raises(UsageError, match="Did you mean 'qk_dim'"):
        make(attn_options={"qk_dims": 3})


@pytest.mark.parametrize("attn", list_attentions())
def test_any_mechanism_in_any_stage(attn):
    x = images(97, 65).requires_grad_()
    make(attn=[attn] * 3)(x).square().sum().backward()
    assert x.grad.isfinite().all()


@each
def test_any_width_has_heads_for_other_mechanisms(name):
    """308 channels are no multiple of 8 heads, and cross-shaped windows need an even number of heads."""
    for attn in ("softmax", "cross_window"):
        with torch.device("meta"):
            timm.create_model(name, attn=attn)


@torch.no_grad()
def test_fresh_blocks_hand_their_map_on():
    """Every branch starts at zero: BatchNorm weights of 0."""
    model = make().train()
    x = torch.randn(2, 24, 4, 4)
    assert torch.equal(model.stages[1].blocks[0](x), x)
    assert not torch.equal(model.stages[1].downsample[0](x[:, :16]), x[:, :16])


def test_drop_path_rises_linearly_over_all_blocks():
    model = make(drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    for stage in model.stages:
        for block in stage.blocks:
            parts = (block.drop_path, block.conv.drop_path, block.ffn.drop_path)
            assert len({getattr(part, "drop_prob", 0.0) for part in parts}) == 1


@torch.no_grad()
def test_memory_stays_channels_last():
    model = make().to(memory_format=torch.channels_last)
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda m, i, out: seen.append((type(m).__name__, out)))
    model(images().contiguous(memory_format=torch.channels_last))
    maps = [(name, out) for name, out in seen if isinstance(out, torch.Tensor) and out.ndim == 4]
    assert len(maps) > 50
    # Maps of one row and column are in both orders at once.
    assert [name for name, out in maps if not out.is_contiguous(memory_format=torch.channels_last)] == []


def test_trains_in_any_memory_format_and_precision(step_losses):
    """bf16 keeps 8 bits: a step in it, channels last too, is finite and its loss within 2 % of float32's."""
    losses = step_losses(lambda: randomise(make()), images(batch=8), torch.arange(8) % 5, tolerance=0.02)
    assert losses == pytest.approx([losses[0]] * 4, rel=0.02)


@torch.no_grad()
def test_pruned_and_headless_networks():
    model = randomise(make())
    want = model.forward_intermediates(images(50, 71), intermediates_only=True)
    cut = copy.deepcopy(model)
    assert cut.prune_intermediate_layers([0, 1]) == [0, 1]
    assert cut.num_features == 24
    torch.testing.assert_close(cut(images(50, 71)), want[1])
    headless = make(num_classes=0, global_pool="")
    headless.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(headless(images(50, 71)), want[2])
    with pytest.raises(UsageError, match="num_classes=0"):
        make(global_pool="")
    with pytest.raises(UsageError, match="Did you mean 'avgmax'"):
        make(global_pool="catavgmax")
    with pytest.raises(UsageError, match="NLC"):
        model.forward_intermediates(images(), output_fmt="NLC")


@pytest.mark.slow
def test_inductor_compiles_it():
    torch._dynamo.reset()
    model = randomise(make())
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(images()), model(images()), **NEAR)
