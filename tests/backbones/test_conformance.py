"""What every `zoo_*` network promises and timm's own tests do not look at."""

import copy
import io
import math
import pickle

import pytest
import torch
from timm.models import group_parameters

from .networks import NEAR, create, each, images, shaken, stage_count, traced

SIZES = [(64, 64), (32, 64), (50, 71), (97, 33)]


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
    # The float64 network against the float32 features, whose noise is that of the largest: 19 in one network.
    largest = max(1.0, features.abs().max().item())
    torch.testing.assert_close(model(x.double()).float(), features, rtol=NEAR["rtol"], atol=NEAR["atol"] * largest)
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
