"""zoo.accelerate on timm's networks and on modules at large."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.layers.lambda_layer import LambdaLayer
from timm.models import create_feature_extractor
from torch import nn

import zoo
from zoo.layers.timm_attention import FastBottleneckAttn, FastHaloAttn, FastLambdaLayer

FAST = (FastHaloAttn, FastLambdaLayer, FastBottleneckAttn)

# Name -> an image that timm's blocks divide at every stage, and that leaves some pixels to the norms of the last.
MODELS = {
    "halonet26t": 256,
    "halonet50ts": 256,
    "sehalonet33ts": 256,
    "eca_halonext26ts": 256,
    "haloregnetz_b": 224,
    "lambda_resnet26t": 64,
    "lambda_resnet50ts": 128,
    "lambda_resnet26rpt_256": 64,
    "halo2botnet50ts_256": 256,
    "lamhalobotnet50ts_256": 256,
    "botnet26t_256": 64,
    "eca_botnext26ts_256": 64,
}

ALL_THREE = "lamhalobotnet50ts_256"
# Their layers are those of the others, and take longest.
LARGE = ("halonet50ts", "sehalonet33ts", "eca_halonext26ts", "haloregnetz_b", "halo2botnet50ts_256", ALL_THREE)
SHARED = [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in MODELS]

LAYERS = {
    "halo": lambda: HaloAttn(16, num_heads=2, block_size=4, halo_size=1),
    "lambda": lambda: LambdaLayer(16, r=3, dim_head=4),
    "lambda_global": lambda: LambdaLayer(16, r=None, feat_size=(12, 24), dim_head=4),
    "bottleneck": lambda: BottleneckAttn(16, feat_size=(12, 24)),
}


def layer(name: str) -> nn.Module:
    return LAYERS[name]()


def worst(answer: torch.Tensor, expected: torch.Tensor) -> float:
    return ((answer - expected).abs().max() / expected.abs().max()).item()


def gradients(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The answer, and the gradients of a fixed random sum of it with respect to the input and every parameter."""
    x = x.clone().requires_grad_()
    out = module(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    tensors = {"input": x, **dict(module.named_parameters())}
    return out.detach(), dict(zip(tensors, torch.autograd.grad((out * weights).sum(), tensors.values()), strict=True))


def network(name: str, images: torch.Tensor) -> nn.Module:
    """A timm network in which every layer has a say in the logits.

    SiLU networks lose the signal on fresh weights, so theirs are enlarged; the last norm of a block starts at zero,
    which hides the attention; and statistics of these images keep the activations in range.
    """
    size = {"img_size": images.shape[-1]} if name.endswith("_256") else {}
    model = timm.create_model(name, num_classes=7, **size)
    gain = (1.19 if name.startswith("lambda") else 1.25) if "ts" in name else 1.0
    norms = [child for child in model.modules() if isinstance(child, nn.BatchNorm2d)]
    with torch.no_grad():
        for child in model.modules():
            if isinstance(child, (nn.Conv2d, nn.Linear)):
                child.weight.mul_(gain)
        for norm in norms:
            norm.momentum = 1.0
            if not norm.weight.any():
                norm.weight.fill_(0.1)
        model.train()(images)
    return model.eval()


@pytest.mark.parametrize("name", SHARED)
def test_networks_are_timms(name):
    images = torch.randn(2, 3, MODELS[name], MODELS[name])
    slow = network(name, images)
    quick = zoo.accelerate(copy.deepcopy(slow))
    assert sum(type(child) in FAST for child in quick.modules()) >= 2
    assert list(quick.state_dict()) == list(slow.state_dict())
    expected, expected_grads = gradients(slow, images)
    answer, grads = gradients(quick, images)
    assert worst(answer[:1], answer[1:]) > 0.05, "two images must not give one answer, or nothing is compared"
    hooks = [
        child.register_forward_hook(lambda _m, _i, out: 0 * out) for child in quick.modules() if type(child) in FAST
    ]
    with torch.no_grad():
        assert worst(quick(images), answer) > 0.01, "the attention must have a say, or nothing is compared"
        for hook in hooks:
            hook.remove()
        twin = pickle.loads(pickle.dumps(copy.deepcopy(quick)))
        assert torch.equal(twin(images), quick(images))
    # Measured 4e-7 to 2e-6; timm's float32 is as far from timm's float64.
    assert worst(answer, expected) < 2e-5
    # Of gradients the length: a ReLU whose input rounding moves across zero changes single entries at will. Measured
    # 1e-6 to 4e-5 at depth 50; the layers' own tests compare every entry in float64.
    for key in ("input", *(key for key in grads if "self_attn" in key)):
        distance = (grads[key] - expected_grads[key]).norm() / expected_grads[key].norm()
        assert distance < 1e-4, key


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("halonet26t", (256, 320)),
        ("halonet26t", (269, 269)),
        ("haloregnetz_b", (65, 97)),
        ("lambda_resnet26t", (65, 97)),
        ("lambda_resnet26rpt_256", (96, 64)),
        (ALL_THREE, (96, 64)),
        (ALL_THREE, (65, 97)),
        ("botnet26t_256", (97, 65)),
    ],
)
def test_networks_take_any_size(name, size):
    model = timm.create_model(name, num_classes=3).eval()
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        with pytest.raises((AssertionError, RuntimeError)):  # RuntimeError: odd maps beside a shortcut, lambda
            model(images)
        assert zoo.accelerate(model)(images).isfinite().all()


def test_everything_but_the_class_stays():
    model = timm.create_model(ALL_THREE, num_classes=3, img_size=64)
    model.stages[1].eval()
    model.stem.requires_grad_(False)
    before = {name: (id(child), child.training) for name, child in model.named_modules()}
    tensors = {name: (id(tensor), tensor.requires_grad) for name, tensor in model.named_parameters()}
    buffers = {name: id(tensor) for name, tensor in model.named_buffers()}
    assert zoo.accelerate(model) is model
    after = {name: (id(child), child.training) for name, child in model.named_modules()}
    assert {name: after[name] for name in before} == before
    assert {name: (id(tensor), tensor.requires_grad) for name, tensor in model.named_parameters()} == tensors
    assert {name: id(tensor) for name, tensor in model.named_buffers()} == buffers
    assert {type(child) for child in model.modules() if "Fast" in type(child).__name__} == set(FAST)
    # What is new, for resizing tables, follows the layer's mode.
    for name in after.keys() - before.keys():
        assert after[name][1] == after[name.rpartition(".resize")[0]][1]


def test_twice_is_once():
    model = nn.Sequential(layer("halo"), layer("lambda_global"), layer("bottleneck"))
    zoo.accelerate(model)
    children = list(model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert zoo.accelerate(model) is model
    assert list(map(id, model.modules())) == list(map(id, children))


def test_a_shared_layer_and_a_layer_by_itself():
    shared = layer("halo")
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    zoo.accelerate(model)
    assert model["a"] is model["b"][0] is shared
    assert type(shared) is FastHaloAttn
    alone = layer("bottleneck")
    assert zoo.accelerate(alone) is alone
    assert type(alone) is FastBottleneckAttn


def test_an_optimizer_made_before_trains_it():
    model = layer("halo")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    zoo.accelerate(model)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(1, 16, 12, 24)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(before[key], value) for key, value in model.state_dict().items())


class Different(HaloAttn):
    def forward(self, x):
        return -super().forward(x)


def test_a_subclass_is_left_alone_and_named():
    model = nn.Sequential(Different(16, num_heads=2, block_size=4, halo_size=1), layer("bottleneck"))
    with pytest.warns(UserWarning, match=r"0 \(Different is a subclass"):
        zoo.accelerate(model)
    assert type(model[0]) is Different
    assert type(model[1]) is FastBottleneckAttn


@pytest.mark.parametrize(
    "changed",
    [{"padding": (2, 2, 0), "padding_mode": "circular"}, {"padding": (4, 4, 0), "dilation": (2, 2, 1)}],
    ids=str,
)
def test_another_convolution_is_left_alone_and_named(changed):
    model = LambdaLayer(16, r=5, dim_head=4).eval()
    model.conv_lambda = nn.Conv3d(1, 4, (5, 5, 1), **changed)
    x = torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        expected = model(x)
        with pytest.warns(UserWarning, match="the model itself \\(its conv_lambda is another convolution"):
            zoo.accelerate(model)
        assert torch.equal(model(x), expected)


def test_replaced_forwards_and_hooked_tables_are_left_alone_and_named():
    patched, hooked, foreign = layer("halo"), layer("bottleneck"), layer("lambda")
    patched.forward = patched.forward
    hooked.pos_embed.register_forward_hook(lambda *_: None)
    foreign.conv_lambda = nn.Sequential(foreign.conv_lambda)
    with pytest.warns(UserWarning, match=r"0 \(its forward.*1 \(hooks on its pos_embed.*2 \(its conv_lambda is not"):
        zoo.accelerate(nn.Sequential(patched, hooked, foreign))
    assert (type(patched), type(hooked), type(foreign)) == (HaloAttn, BottleneckAttn, LambdaLayer)


@pytest.mark.parametrize("name", ["resnet10t", "zoo_vit_tiny_patch16_224"])
def test_a_model_without_such_layers(name):
    model = timm.create_model(name, num_classes=2)
    types = [type(child) for child in model.modules()]
    with pytest.warns(UserWarning, match=r"nothing to do.*has none of timm's layers HaloAttn, LambdaLayer, Bottle"):
        assert zoo.accelerate(model) is model
    assert [type(child) for child in model.modules()] == types


@pytest.mark.parametrize("wrong", ["halonet26t", HaloAttn, None, torch.zeros(1)], ids=str)
def test_what_is_no_module(wrong):
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module.*not (the string|the class|a )"):
        zoo.accelerate(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_networks_compile_and_export(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    images = torch.randn(2, 3, MODELS[name], MODELS[name])
    model = zoo.accelerate(network(name, images))
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        # Here and below: other summation orders in float32
        assert worst(compiled(images), expected) < 2e-5
        assert worst(torch.export.export(model, (images,)).module()(images), expected) < 2e-5
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    answer = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    # Another library's float32, all the way
    assert worst(torch.from_numpy(answer), expected) < 1e-4
    torch._dynamo.reset()
    torch.compile(model.train(), fullgraph=True, backend="aot_eager")(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_tracing_and_feature_extraction():
    images = torch.randn(2, 3, 128, 128)
    model, images = zoo.accelerate(network(ALL_THREE, images)), images[..., :64, :64]  # other tables than 128 needs
    nodes = ["stages.1.3.self_attn.qkv", "stages.2.1.self_attn.pool", "stages.3"]
    seen = {}
    hooks = [
        model.get_submodule(node).register_forward_hook(lambda _m, _i, out, node=node: seen.__setitem__(node, out))
        for node in nodes
    ]
    with torch.no_grad():
        expected = model(images)
        for hook in hooks:
            hook.remove()
        features = create_feature_extractor(model, nodes)(images)
        for node in nodes:
            assert torch.equal(features[node], seen[node])
        assert torch.equal(torch.fx.symbolic_trace(model)(images), expected)
        assert torch.equal(torch.jit.trace(model, images)(images), expected)
        assert torch.equal(model.forward_intermediates(images, intermediates_only=True)[-1], seen["stages.3"])


ORDERS = [
    "import zoo",
    "import zoo.accelerate; from zoo.accelerate import accelerate; import zoo",
    "import zoo.layers.timm_attention; import zoo",
    "import importlib; importlib.import_module('zoo.accelerate'); import zoo",
]


def test_the_name_is_the_function_in_every_import_order():
    program = f"""
import os, warnings
import timm, torch

for order in {ORDERS}:
    child = os.fork()
    if child == 0:
        warnings.simplefilter("ignore")
        exec(order)
        assert zoo.accelerate(torch.nn.ReLU()), order
        import zoo.accelerate
        from zoo import accelerate
        assert zoo.accelerate(torch.nn.ReLU()) and accelerate(torch.nn.ReLU()), order
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, order
"""
    subprocess.run([sys.executable, "-c", program], check=True)
