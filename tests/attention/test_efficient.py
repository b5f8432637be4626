"""Efficient attention against the recorded answers of the authors' module, and the equations of arXiv 1812.01243."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from zoo import create_attention
from zoo.errors import UsageError

from .loops import DIM, EXACT, HEADS, close, gather, heads, image, make, project, softmax_rows

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
FOUND = sorted(path.stem for path in GOLDEN.glob("efficient_attention*.json"))
SEEN = torch.tensor([[True, False, True, True, False, True, True]])


def recorded(name):
    spec = importlib.util.spec_from_file_location("golden_check", GOLDEN / "check.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    return check, json.loads((GOLDEN / f"{name}.json").read_text())


def sizes(name, state):
    """The options that the name of a golden and its shapes speak of."""
    marks = {part[0]: int(part[1:]) for part in name.removeprefix("efficient_attention").split("_") if part}
    return {
        "num_heads": marks.get("h", 4),
        "key_dim": state["keys.weight"].shape[0],
        "value_dim": state["values.weight"].shape[0],
    }


@pytest.mark.skipif(
    not FOUND, reason="the authors' recorded answers lie beside the project, in ../shared/golden, and are absent here"
)
@pytest.mark.parametrize("name", FOUND)
def test_equals_the_recorded_module(name):
    check, golden = recorded(name)
    theirs = check.state_dict(golden)
    attention = create_attention("efficient", golden["input"]["shape"][1], layout="map", **sizes(name, theirs)).eval()
    state = {f"attn.proj.{part}": theirs[f"reprojection.{part}"] for part in ("weight", "bias")}
    for part in ("weight", "bias"):
        state[f"attn.qkv.{part}"] = torch.cat([theirs[f"{which}.{part}"] for which in ("queries", "keys", "values")])
    attention.load_state_dict({key: value.flatten(1) if value.ndim == 4 else value for key, value in state.items()})
    x = check.image(golden["input"]["seed"], golden["input"]["shape"])
    with torch.no_grad():
        branch = attention(x)
    # float32 noise of sums over 196 places is about 1e-6; their module adds its input.
    answers = {"logits": x + branch, "branch": branch}
    for key, want in golden["outputs"].items():
        which = want.get("of", key)
        if which in answers:
            assert check.error(answers[which], want) <= 2e-5, key
    assert "logits" in golden["outputs"]


def parts(attention, x):
    q, k, v = project(attention.qkv, x, attention.key_dim, attention.key_dim, attention.value_dim)
    return heads(q), heads(k), heads(v)


@pytest.mark.parametrize("mask", [None, SEEN])
@pytest.mark.parametrize("sizes", [{}, {"key_dim": 6, "value_dim": 15, "dim_out": 9}])
def test_softmax_of_each_side(sizes, mask):
    attention, x = make("efficient", **sizes), image()
    seen = None if mask is None else mask[0]
    out = []
    for q, k, v in zip(*parts(attention, x[0]), strict=True):
        context = gather(softmax_rows(k.T, seen), v)  # a row for each channel of the keys
        out.append(gather(softmax_rows(q), context))
    want = close(attention, torch.cat(out, dim=1))
    torch.testing.assert_close(attention(x, key_mask=mask)[0], want, **EXACT)


@pytest.mark.parametrize("mask", [None, SEEN])
def test_scaling_is_dot_product_attention_without_softmax(mask):
    """(q k^T / n) v for n keys, exactly."""
    attention, x = make("efficient", normalisation="scaling"), image()
    allowed = [j for j in range(7) if mask is None or mask[0, j]]
    out = []
    for q, k, v in zip(*parts(attention, x[0]), strict=True):
        rows = torch.zeros(7, v.shape[1], dtype=torch.float64)
        for i in range(7):
            for j in allowed:
                rows[i] += (q[i] @ k[j]) / len(allowed) * v[j]
        out.append(rows)
    want = close(attention, torch.cat(out, dim=1))
    torch.testing.assert_close(attention(x, key_mask=mask)[0], want, **EXACT)


def test_the_map_is_what_forward_implies():
    for normalisation in ("softmax", "scaling"):
        attention, x = make("efficient", normalisation=normalisation), image()
        (*_, v) = parts(attention, x[0])
        weights = attention.attention_map(x)[0]
        want = close(attention, torch.cat([weights[a] @ v[a] for a in range(HEADS)], dim=1))
        torch.testing.assert_close(attention(x)[0], want, **EXACT)


def test_mistakes_say_what_is_valid():
    with pytest.raises(UsageError, match="Valid: scaling, softmax"):
        create_attention("efficient", DIM, num_heads=HEADS, normalisation="sofmax1")
    with pytest.raises(UsageError, match="does not divide 8 channels"):
        create_attention("efficient", DIM, num_heads=HEADS, key_dim=8)
    with pytest.raises(UsageError, match="without proj"):
        create_attention("efficient", DIM, num_heads=HEADS, value_dim=6, proj=False)
