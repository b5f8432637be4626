"""What every `zoo_*` network promises and timm's own tests do not look at.

By default small forms of one ViT of each kind; `-m slow` runs every registered name at its own width, with few layers.
"""

import copy
import fnmatch
import inspect
import io
import math
import pickle

import pytest
import timm
import torch
from timm.models import group_parameters

import zoo  # noqa: F401  (registers the networks)

QUICK = (
    "zoo_vit_tiny_patch16_224",
    "zoo_vit_tiny_cb_patch16_224",
    "zoo_vit_tiny_cbs_patch16_224",
    "zoo_shvit_s1",
    "zoo_uniformer_small_tl",
    "zoo_uniformer_xxs",
    "zoo_attention_resnet50",
    "zoo_halonet_h0",
    "zoo_lambda_resnet50",
)
# Shallow, so that the whole registry fits in minutes; the first pattern that matches counts.
SHALLOW = {
    "zoo_vit_*": {"depth": 2},
    "zoo_shvit_*": {"depths": (1, 1, 1)},
    "zoo_uniformer_x*": {"depths": (1, 1, 2, 1)},
    "*": {"depths": (1, 1, 1, 1)},
}
NARROW_RESNET = {"stem_dims": (8,), "widths": (8, 8, 16, 16), "expansion": 2.0, "num_heads": (2, 2, 2, 2)}
NARROW = {
    "zoo_vit_*": {"patch_size": 8, "embed_dim": 24, "num_heads": 2, "mlp_ratio": 2.0},
    "zoo_shvit_*": {"embed_dims": (16, 24, 32), "partial_dims": (4, 6, 7)},
    "zoo_uniformer_*": {"embed_dims": (8, 16, 24, 32), "head_dim": 8},
    "zoo_attention_*": NARROW_RESNET,
    "zoo_halonet_*": {**NARROW_RESNET, "mixer_options": {"halo": {"block_size": 4, "halo_size": 2}}},
    "zoo_lambda_*": {**NARROW_RESNET, "mixer_options": {"lambda": {"kernel_size": 7}}},
}
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in timm.list_models("zoo_*")]
each = pytest.mark.parametrize("name", NAMES)
# Tracing takes seconds: by default only the kind with the most operations of its own.
traced = pytest.mark.parametrize(
    "name",
    [name if name == QUICK[2] else pytest.param(name, marks=pytest.mark.slow) for name in timm.list_models("zoo_*")],
)
SIZES = [(64, 64), (32, 64), (50, 71), (97, 33)]
# Two orders of the same float32 sums, over features of size 1 and a few layers.
NEAR = {"rtol": 1e-4, "atol": 1e-5}
RATES = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
# Another value for every argument of every constructor; a dict where the comparison needs more than the one argument.
OTHER = {
    "img_size": 96,
    "patch_size": {"vit": 4, "pyramid": 2},
    "in_chans": 4,
    "num_classes": 7,
    "global_pool": "max",
    "embed_dim": 48,
    "embed_dims": {
        "zoo_shvit_*": (64, 96, 128),
        "zoo_uniformer_*": (64, 128, 448, 448),
        "pyramid": (48, 96, 240, 384),
    },
    "depth": 3,
    "depths": {"zoo_shvit_*": (1, 2, 1), "pyramid": (1, 2, 1, 1)},
    "num_heads": {"zoo_*cswin*": (2, 2, 2, 2), "vit": 4, "pyramid": (1, 1, 1, 1)},
    "mlp_ratio": 2.5,
    "mlp_ratios": (1, 2, 3, 1),
    "sr_ratios": (4, 4, 2, 1),
    "window_size": 5,
    "stripe_widths": (2, 4, 2, None),
    "qkv_bias": False,
    "qk_norm": True,
    "init_values": {"zoo_uniformer_large_ls": (None, None, 0.1, 0.1), "*": 0.1},
    "head_dim": 4,
    "conv_stem": {"zoo_uniformer_*plus*": False, "zoo_uniformer_x*": False, "*": True},
    "conv_down": {"zoo_uniformer_*plus*": False, "*": True},
    "aux_head": {"*_tl": False, "zoo_uniformer_large_ls": False, "*": True},
    "stem_dims": (16,),
    "widths": (16, 32, 48, 64),
    "expansion": 0.75,
    "value_ratio": 0.5,
    "mixers": ("conv", "conv", "conv", "conv"),
    "mixer_options": {
        "zoo_halonet*": {"halo": {"halo_size": 1}},
        "zoo_lambda_*": {"lambda": {"kernel_size": 5}},
        "*": {"softmax": {"qkv_bias": False}},
    },
    "avg_down": {"zoo_lambda_resnet26t": True, "zoo_lambda_*": False, "*": True},
    "se": {f"zoo_lambda_resnet{layers}": False for layers in (101, 152, 200)} | {"*": True},
    "final_dim": 40,
    "partial_dims": (4, 8, 8),
    "qk_dim": 8,
    "class_token": False,
    "attn": "uniform",
    "attn_share": ((0, 1),),
    "attn_options": {
        "zoo_shvit_*": {"qk_dim": 8},
        "zoo_halonet*": {"halo_size": 1},
        "zoo_lambda_*": {"dim_key": 8},
        "*": {"qkv_bias": False},
    },
    "cb": {"zoo_vit_*_cb_*": "cbs", "vit": "cb"},
    "norm_layer": torch.nn.Identity,
    "act_layer": torch.nn.ReLU,
    **dict.fromkeys(RATES, 0.6),
}
# Arguments without effect until another attention is chosen: one with a table over the whole grid, or softmax.
IDLE = {
    "img_size": (
        *("zoo_pvt_v2_*", "zoo_swin_*", "zoo_cswin_*", "zoo_flatten_*", "zoo_shvit_*", "zoo_uniformer_*"),
        *("zoo_attention_*", "zoo_halonet*", "zoo_lambda_*"),
    ),
    # There is no block that mixes with a convolution.
    "se": ("zoo_halonet_*", "zoo_lambda_resnet50"),
    "attn_drop_rate": ("zoo_flatten_pvt_*",),
    "sr_ratios": ("zoo_flatten_pvt_*",),
    # Refused by networks that shrink their tokens.
    "init_values": ("zoo_uniformer_x*",),
    "aux_head": ("zoo_uniformer_x*",),
}


def options(name):
    few, narrow = (
        next(value for pattern, value in table.items() if fnmatch.fnmatch(name, pattern))
        for table in (SHALLOW, NARROW if name in QUICK else {"*": {}})
    )
    return {"img_size": 64, "num_classes": 5, **few, **narrow}


def stage_count(name):
    """How many maps there are to ask for: blocks of a ViT, stages of a pyramid."""
    return 2 if "depth" in options(name) else len(options(name)["depths"])


def create(name, **kwargs):
    torch.manual_seed(1)
    return timm.create_model(name, **{**options(name), **kwargs}).eval()


@torch.no_grad()
def shaken(model):
    """Moves every parameter off its start, where biases, scales and class tokens would hide mistakes."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def images(height=64, width=64, batch=2, channels=3):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(3))


def levels(name):
    return {"out_indices": tuple(range(stage_count(name))), "features_only": True}


@each
@torch.no_grad()
def test_maps_have_the_promised_sizes(name):
    model = create(name, **levels(name))
    promised = list(zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True))
    for height, width in SIZES:
        maps = model(images(height, width))
        expected = [(2, dim, math.ceil(height / by), math.ceil(width / by)) for dim, by in promised]
        assert [tuple(item.shape) for item in maps] == expected, (height, width)
        assert all(item.isfinite().all() for item in maps)


@each
def test_every_row_and_column_of_any_size_counts(name):
    model = shaken(create(name))
    for height, width in SIZES:
        x = images(height, width).requires_grad_()
        out = model(x)
        assert out.shape == (2, 5)
        out.square().sum().backward()
        reached = x.grad.abs().amax((0, 1)) > 0
        assert reached.any(1).all(), f"rows of {height} x {width} were dropped"
        assert reached.any(0).all(), f"columns of {height} x {width} were dropped"


@each
@pytest.mark.parametrize("channels", [1, 4])
def test_in_chans(name, channels):
    x = images(channels=channels).requires_grad_()
    shaken(create(name, in_chans=channels))(x).square().sum().backward()
    assert (x.grad.abs().amax((0, 2, 3)) > 0).all(), "a channel is ignored"
    with pytest.raises((RuntimeError, AssertionError, ValueError)):
        create(name, in_chans=channels)(images(channels=3))


def arguments(name):
    """Those of the constructor, and of the one that it hands the others to."""
    found = []
    for cls in type(create(name)).__mro__:
        parameters = inspect.signature(cls).parameters.values()
        found += [one.name for one in parameters if one.kind is not one.VAR_KEYWORD]
        if len(parameters) and all(one.kind is not one.VAR_KEYWORD for one in parameters):
            break
    return found


@each
def test_dropout(name):
    x = images(batch=4)
    still = shaken(create(name))
    expected = still(x)
    state = copy.deepcopy(still.state_dict())  # training moves the statistics of BatchNorm
    still.train()
    # Two runs of the same operations.
    assert torch.equal(still(x), still(x)), "there is noise without any dropout"
    for rate in set(RATES) & set(arguments(name)):
        if idle(name, rate):
            continue
        model = create(name, **{rate: 0.6})
        model.load_state_dict(state)
        assert torch.equal(model(x), expected), f"{rate} acts in evaluation"
        model.train()
        assert not torch.allclose(model(x), model(x)), f"{rate} is ignored"


def idle(name, argument):
    return any(fnmatch.fnmatch(name, pattern) for pattern in IDLE.get(argument, ()))


def other(name, argument):
    value = OTHER[argument]
    if not isinstance(value, dict):
        return value
    kind = "vit" if name.startswith("zoo_vit_") else "pyramid"
    return next(found for pattern, found in value.items() if pattern == kind or fnmatch.fnmatch(name, pattern))


def differ(one, two):
    """Whether two networks differ in their parameters' shapes or, with the same parameters, in what they answer."""
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (one, two)]
    if shapes[0] != shapes[1]:
        return True
    two.load_state_dict(one.state_dict())
    outputs = []
    for model in (one.train(), two.train()):
        torch.manual_seed(5)
        # Two places at least in the last map, for poolings to differ.
        outputs.append(model(images(64, 96, batch=4)))
    return outputs[0].shape != outputs[1].shape or not torch.allclose(*outputs, **NEAR)


@each
def test_every_argument_changes_something(name):
    for argument in arguments(name):
        assert argument in OTHER, f"{argument} is new; give another value of it in OTHER"
        if idle(name, argument):
            continue
        rest = {"global_pool": "avg"} if argument == "class_token" else {}
        changed = create(name, **rest, **{argument: other(name, argument)})
        assert differ(shaken(create(name, **rest)), changed), f"{argument} changes nothing"


@each
@torch.no_grad()
def test_images_do_not_see_each_other(name):
    model = shaken(create(name))
    x = images(batch=3)
    together = model(x)
    for index in range(3):
        torch.testing.assert_close(model(x[index : index + 1]), together[index : index + 1], **NEAR)
    x[0] = float("nan")
    assert model(x)[1:].isfinite().all()


@traced
def test_compiles_as_one_graph(name):
    torch._dynamo.reset()
    model = shaken(create(name))
    # dynamic=False: torch cannot trace the gradient of an antialiased resize to a size that is not known.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(images()), model(images()), **NEAR)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(48, 80)), model(images(48, 80)), **NEAR)


@traced
@torch.no_grad()
def test_exports_with_a_dynamic_batch(name):
    model = shaken(create(name))
    dynamic = {"x": {0: torch.export.Dim("batch", max=64)}}
    program = torch.export.export(model, (images(48, 80),), dynamic_shapes=dynamic, strict=False)
    x = images(48, 80, batch=5)
    torch.testing.assert_close(program.module()(x), model(x), **NEAR)


@traced
@torch.no_grad()
def test_onnx_with_a_dynamic_batch(name):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = shaken(create(name))
    dynamic = {"x": {0: torch.export.Dim("batch", max=64)}}
    program = torch.onnx.export(model, (images(),), dynamic_shapes=dynamic, dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        x = images(batch=batch)
        (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        # Another library's float32: its own exp and erf, and fused normalisations.
        torch.testing.assert_close(torch.from_numpy(answer), model(x), rtol=1e-3, atol=1e-4)


@each
@torch.no_grad()
def test_bfloat16(name):
    model = shaken(create(name))
    expected = model(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(images())
    low = model.bfloat16()(images().bfloat16())
    assert low.dtype == torch.bfloat16
    for answer in (mixed, low):
        # 8 bits of mantissa are 0.4 % a rounding; a few dozen roundings in a row stay under 10 % of the norm.
        assert (answer.float() - expected).norm() < 0.1 * expected.norm()


@each
def test_channels_last(name):
    model = shaken(create(name))
    x = images(50, 71)
    expected = model(x)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    out = last(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(out, expected, **NEAR)
    last.train()(x.to(memory_format=torch.channels_last)).sum().backward()
    assert all(parameter.grad is not None for parameter in last.parameters())


@each
def test_meta_device(name):
    with torch.device("meta"):
        model = create(name)
        assert all(value.is_meta for value in model.state_dict().values())
        assert model(torch.empty(2, 3, 50, 71)).shape == (2, 5)
    real = create(name)
    model.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(model(images()), real(images())), "something beside the state was lost on the meta device"


@each
@pytest.mark.parametrize("coarse", [False, True])
def test_groups_cover_every_parameter_in_order(name, coarse):
    model = create(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    grouped = [key for group in groups.values() for key in group]
    assert sorted(grouped) == sorted(key for key, _ in model.named_parameters())
    place = {key: index for index, group in groups.items() for key in group}
    first, last = model.default_cfg["first_conv"], model.default_cfg["classifier"]
    assert place[f"{first}.weight"] == min(groups)
    for key in last if isinstance(last, tuple) else (last,):
        assert place[f"{key}.weight"] == max(groups)
    # The stem, at least one group a layer or stage, and the head.
    assert len(groups) >= 2 + stage_count(name) - int(coarse)
    layers = [place[key] for key, _ in model.named_parameters() if ".attn." in key]
    assert layers == sorted(layers), "later layers are in earlier groups"
    assert min(groups) < min(layers)
    assert max(layers) < max(groups)


@each
@torch.no_grad()
def test_state_round_trip(name):
    model = shaken(create(name))
    model(images(50, 71))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = create(name)
    again.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert set(model.state_dict()) >= {key for key, _ in model.named_parameters()}
    assert torch.equal(again(images()), model(images()))


@each
@torch.no_grad()
def test_classifier(name):
    model = shaken(create(name))
    x = images()
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert features.shape == (2, model.head_hidden_size)
    # Two classifiers are put together by rules of their own, which their networks' tests know.
    if not isinstance(model.get_classifier(), tuple):
        torch.testing.assert_close(model.get_classifier()(features), model(x), **NEAR)
    bare = create(name, num_classes=0)
    bare.load_state_dict({key: value for key, value in model.state_dict().items() if key in bare.state_dict()})
    assert torch.equal(bare(x), features)
    model.double().reset_classifier(7)
    assert model.num_classes == 7
    assert model(x.double()).shape == (2, 7)
    model.reset_classifier(0)
    # The float64 network against the float32 features.
    torch.testing.assert_close(model(x.double()).float(), features, **NEAR)
    model.reset_classifier(3)
    assert model(x.double()).shape == (2, 3)


@each
@torch.no_grad()
def test_intermediates_are_the_maps(name):
    model = shaken(create(name))
    maps = create(name, **levels(name))
    # timm wraps the network; what it has dropped of it (norm, head) is no part of the maps.
    missing, _ = maps.model.load_state_dict(model.state_dict(), strict=False)
    assert missing == []
    for height, width in SIZES:
        x = images(height, width)
        wanted = list(levels(name)["out_indices"])
        final, taken = model.forward_intermediates(x, indices=wanted)
        for one, two in zip(taken, maps(x), strict=True):
            assert torch.equal(one, two)
        assert torch.equal(final, model.forward_features(x))
        only = model.forward_intermediates(x, indices=wanted[:1], intermediates_only=True, stop_early=True)
        assert len(only) == 1
        assert torch.equal(only[0], taken[0])


@each
def test_checkpointing_changes_no_gradient(name):
    plain = shaken(create(name)).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        model(images()).square().sum().backward()
    for (key, one), two in zip(plain.named_parameters(), saving.parameters(), strict=True):
        # The same operations run twice.
        assert torch.equal(one.grad, two.grad), key


@each
@torch.no_grad()
def test_copies(name):
    model = shaken(create(name))
    x = images(50, 71)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        assert not torch.equal(twin(x), expected)
        assert torch.equal(model(x), expected), "the copy shares something with the original"
