"""Lambda layers against timm's layer, the recorded answers of lucidrains' one, and the paper's equations in loops."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.layers.lambda_layer import LambdaLayer

from zoo import create_attention
from zoo.errors import UsageError

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"


def recorded(name):
    spec = importlib.util.spec_from_file_location("golden_check", GOLDEN / "check.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    return check, json.loads((GOLDEN / f"{name}.json").read_text())


def from_lucidrains(theirs):
    """Their names to ours."""
    ours = {key: value for key, value in theirs.items() if key.startswith("norm_")}
    ours["qkv.weight"] = torch.cat([theirs[f"to_{part}.weight"] for part in "qkv"])
    if "pos_conv.weight" in theirs:
        ours["pos_emb"] = theirs["pos_conv.weight"][:, :, 0].permute(2, 3, 0, 1)
        ours["pos_bias"] = theirs["pos_conv.bias"]
    else:
        ours["pos_emb"] = theirs["rel_pos_emb"]
    return ours


def goldens():
    paths = sorted(GOLDEN.glob("lambda_layer_*.json")) if GOLDEN.is_dir() else []
    absent = pytest.mark.skip(
        reason="the authors' recorded answers lie beside the project, in ../shared/golden, and are absent here"
    )
    return [path.stem for path in paths] or [pytest.param(None, marks=absent)]


@pytest.mark.parametrize("name", goldens())
def test_equals_the_recorded_layer(name):
    check, golden = recorded(name)
    theirs = check.state_dict(golden)
    kernel = theirs["pos_conv.weight"].shape[-1] if "pos_conv.weight" in theirs else None
    depth = theirs["to_k.weight"].shape[0] // 16
    attention = create_attention(
        "lambda",
        32,
        layout="map",
        grid_size=(16, 16),
        num_heads=4,
        dim_key=16,
        intra_depth=depth,
        kernel_size=kernel,
        proj=False,
    )
    attention.load_state_dict(from_lucidrains(theirs), strict=True)
    with torch.no_grad():
        answer = attention.eval()(check.image(golden["input"]["seed"], golden["input"]["shape"]))
    # float32 noise of sums over 256 places is about 1e-6
    assert check.error(answer, golden["outputs"]["logits"]) <= 2e-5
    assert check.error(answer, golden["outputs"]["logits_sub"]) <= 2e-5


@pytest.mark.parametrize("options", [{}, {"num_heads": 2}, {"stride": 2}, {"qkv_bias": True}, {"r": None}])
@pytest.mark.parametrize("training", [False, True])
def test_equals_timms_layer_in_value_and_gradient(options, training):
    torch.manual_seed(0)
    theirs = LambdaLayer(32, feat_size=(8, 12), **{"r": 5} | options)
    kernel = options.get("r", 5)
    given = {key: value for key, value in options.items() if key != "r"} | {"kernel_size": kernel, "proj": False}
    ours = create_attention("lambda", 32, layout="map", grid_size=(8, 12), **given)
    state = theirs.state_dict()
    if kernel is not None:
        state["pos_emb"] = state.pop("conv_lambda.weight")[:, 0, :, :, 0].permute(1, 2, 0).unsqueeze(-1)
        state["pos_bias"] = state.pop("conv_lambda.bias")
    else:
        state["pos_emb"] = torch.randn(15, 23, 16)
        theirs.load_state_dict({"pos_emb": state["pos_emb"]}, strict=False)
        state["pos_emb"] = state["pos_emb"].unsqueeze(-1)
    ours.load_state_dict(state, strict=True)
    x = torch.randn(2, 32, 8, 12)
    answers, gradients = [], []
    for layer in (theirs, ours):
        layer.train(training)
        image = x.clone().requires_grad_()
        answers.append(layer(image))
        answers[-1].square().mean().backward()
        gradients.append([image.grad, *(getattr(layer, n).weight.grad for n in ("qkv", "norm_q", "norm_v"))])
    # float32 sums in another order
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-5, atol=1e-5 * answers[0].abs().max().item())
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * a.abs().max().item())


@pytest.mark.parametrize("kernel", [3, None])
def test_intra_depth_equals_the_equations(kernel):
    """|u| = 2: Lc = sum over m, u of softmax(K) V; Lp_n = sum over m, u of E V; y = (Lc + Lp_n)^T q, each n."""
    torch.manual_seed(0)
    heads, depth, dim_key, height, width = 2, 2, 4, 3, 5
    options = {"num_heads": heads, "dim_key": dim_key, "intra_depth": depth, "kernel_size": kernel, "proj": False}
    attention = create_attention("lambda", 8, layout="map", grid_size=(height, width), **options).double().eval()
    for buffer in (attention.norm_q.running_mean, attention.norm_v.running_mean):
        torch.nn.init.normal_(buffer)
    if attention.pos_bias is not None:
        torch.nn.init.normal_(attention.pos_bias)
    x = torch.randn(1, 8, height, width, dtype=torch.float64)
    got = attention(x)[0]
    parts = attention.qkv(x).split([heads * dim_key, depth * dim_key, depth * 4], dim=1)
    q = attention.norm_q(parts[0])[0].reshape(heads, dim_key, -1)
    k = parts[1][0].reshape(depth, dim_key, -1).softmax(-1)
    v = attention.norm_v(parts[2])[0].reshape(depth, 4, -1)
    reach = (attention.pos_emb.shape[0] // 2, attention.pos_emb.shape[1] // 2)
    for n in range(height * width):
        matrix = torch.zeros(dim_key, 4, dtype=torch.float64)
        for m in range(height * width):
            down, right = m // width - n // width, m % width - n % width
            for u in range(depth):
                row = k[u, :, m]
                if abs(down) <= reach[0] and abs(right) <= reach[1]:
                    row = row + attention.pos_emb[down + reach[0], right + reach[1], :, u]
                matrix += torch.outer(row, v[u, :, m])
        if attention.pos_bias is not None:
            matrix = matrix + attention.pos_bias[:, None]
        want = torch.cat([matrix.T @ q[h, :, n] for h in range(heads)])
        torch.testing.assert_close(got[:, n // width, n % width], want, rtol=1e-10, atol=1e-10)


def test_global_positions_serve_other_sizes():
    """As a layer made for that size does with the table resized as timm resizes tables of positions."""
    options = {"layout": "map", "kernel_size": None, "intra_depth": 2}
    attention = create_attention("lambda", 16, grid_size=(4, 4), **options).eval()
    torch.nn.init.normal_(attention.pos_emb)
    for height, width in ((4, 4), (1, 1), (3, 9), (10, 2)):
        other = create_attention("lambda", 16, grid_size=(height, width), **options).eval()
        table = attention.pos_emb.detach().permute(2, 3, 0, 1)
        size = (2 * height - 1, 2 * width - 1)
        table = table if size == (7, 7) else F.interpolate(table, size, mode="bicubic", antialias=True)
        other.load_state_dict(attention.state_dict() | {"pos_emb": table.permute(2, 3, 0, 1)})
        x = torch.randn(2, 16, height, width)
        # float32 rounding: the interpolation may sum in another order
        torch.testing.assert_close(attention(x), other(x), rtol=1e-5, atol=1e-5)


def test_a_stride_averages_inside_the_map():
    torch.manual_seed(0)
    strided = create_attention("lambda", 16, layout="map", kernel_size=3, stride=2, proj=False).double().eval()
    whole = create_attention("lambda", 16, layout="map", kernel_size=3, proj=False).double().eval()
    whole.load_state_dict(strided.state_dict())
    x = torch.randn(2, 16, 7, 9, dtype=torch.float64)
    got, every = strided(x), whole(x)
    assert got.shape[2:] == strided.out_grid((7, 9)) == (4, 5)
    for i in range(4):
        for j in range(5):
            wanted = every[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3))
            torch.testing.assert_close(got[:, :, i, j], wanted)


def test_a_channels_last_map_stays_channels_last():
    attention = create_attention("lambda", 32, layout="map", kernel_size=3)
    x = torch.randn(2, 32, 8, 12).contiguous(memory_format=torch.channels_last)
    assert attention(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kernel_size": 4}, "an odd number"),
        ({"num_heads": 5}, "num_heads=5 does not divide 32 channels; valid: .1, 2"),
        ({"dim_out": 0}, "0 channels"),
        ({"dim_key": 0}, "dim_key=0.*at least 1"),
        ({"intra_depth": 0}, "intra_depth=0.*at least 1"),
        ({"stride": 0}, "stride=0.*at least 1"),
    ],
)
def test_wrong_options_are_named(options, named):
    with pytest.raises(UsageError, match=named):
        create_attention("lambda", 32, **options)
