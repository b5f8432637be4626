"""Token shrinking against the rule of the paper, token by token in float64."""

import math

import pytest
import timm
import torch

import zoo  # noqa: F401  (registers the models)
from zoo.attention import SoftmaxAttention
from zoo.backbones.uniformer_light import ShrinkingBlock, pool_scores
from zoo.errors import UsageError

DIM, HEADS = 12, 3
# Both sides are computed in float64; only the order of sums differs.
EXACT = {"rtol": 1e-9, "atol": 1e-9}
_SMALL = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 3, 2), "head_dim": 8, "num_classes": 5}


def block(whole=False, **options):
    torch.manual_seed(1)
    made = ShrinkingBlock(DIM, SoftmaxAttention(DIM, num_heads=HEADS), mlp_ratio=3.0, whole=whole, **options)
    generator = torch.Generator().manual_seed(2)
    for value in made.parameters():
        value.data = torch.randn(value.shape, generator=generator) * (0.4 if value.ndim > 1 else 0.2) + (value.ndim < 2)
    return made.double().eval()


def inputs(height, width, batch=1):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(batch, DIM, height, width, dtype=torch.float64, generator=generator)
    cls = torch.randn(batch, 1, DIM, dtype=torch.float64, generator=generator)
    return x, cls, torch.rand(batch, height * width, dtype=torch.float64, generator=generator)


def layer_norm(row, layer):
    mean = row.mean()
    return (row - mean) / ((row - mean).square().mean() + 1e-6).sqrt() * layer.weight + layer.bias


def attend(rows, attn):
    """Answers of tokens rows (N, DIM), and the first one's weights over all, the mean over heads."""
    width, count = DIM // HEADS, len(rows)
    qkv = rows @ attn.qkv.weight.T + attn.qkv.bias
    out, first = torch.zeros(count, DIM, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for head in range(HEADS):
        q, k, v = (qkv[:, start + head * width :][:, :width] for start in (0, DIM, 2 * DIM))
        for n in range(count):
            raised = [math.exp(float(q[n] @ k[m]) / math.sqrt(width)) for m in range(count)]
            weights = [value / sum(raised) for value in raised]
            out[n, head * width :][:width] = sum(w * v[m] for m, w in enumerate(weights))
            if n == 0:
                first += torch.tensor(weights, dtype=torch.float64) / HEADS
    return out @ attn.proj.weight.T + attn.proj.bias, first


def feed(rows, mlp):
    hidden = rows @ mlp.fc1.weight.T + mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ mlp.fc2.weight.T + mlp.fc2.bias


def positions(x, conv):
    """x (DIM, H, W) and its depthwise 3x3 convolution, as tokens row by row."""
    _, height, width = x.shape
    out = []
    for row in range(height):
        for column in range(width):
            total = x[:, row, column] + conv.bias
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    if 0 <= row + down < height and 0 <= column + right < width:
                        total = total + conv.weight[:, 0, down + 1, right + 1] * x[:, row + down, column + right]
            out.append(total)
    return out


def expected(made, x, cls, score):
    """One image: x (DIM, H, W), cls (1, DIM), score (H*W,)."""
    tokens = positions(x, made.pos_embed)
    if made.whole:
        info, drop = list(range(len(tokens))), []
    else:
        order = sorted(range(len(tokens)), key=lambda n: -float(score[n]))
        info, drop = order[: int(0.5 * len(tokens))], order[int(0.5 * len(tokens)) :]
    rows = [cls[0], *(tokens[n] for n in info)]
    if drop:
        total = sum(float(score[n]) for n in drop)
        rows.append(sum(float(score[n]) / total * tokens[n] for n in drop))
    u = torch.stack(rows)
    a, first = attend(torch.stack([layer_norm(row, made.norm1) for row in u]), made.attn)
    u = u + a
    f = feed(torch.stack([layer_norm(row, made.norm2) for row in u]), made.mlp)
    u = u + f
    score = score.clone()
    for place, n in enumerate(info):
        weight = first[1 + place]
        score[n] = weight if made.whole else 0.5 * score[n] + 0.5 * weight
        tokens[n] = u[1 + place]
    for n in drop:
        tokens[n] = tokens[n] + a[-1] + f[-1]
    return torch.stack(tokens), u[0], score


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 2), (1, 1)])
@torch.no_grad()
def test_a_block_follows_the_rule(grid, whole):
    made = block(whole)
    x, cls, score = inputs(*grid, batch=2)
    map_, token, scores = made(x, cls, score)
    for image in range(2):
        tokens, first, row = expected(made, x[image], cls[image], score[image])
        torch.testing.assert_close(map_[image].flatten(1).T, tokens, **EXACT)
        torch.testing.assert_close(token[image, 0], first, **EXACT)
        torch.testing.assert_close(scores[image], row, **EXACT)


@torch.no_grad()
def test_drop_path_leaves_the_gain_of_those_left_out():
    """In training a dropped branch changes the tokens that took part, but those left out gain what it would add."""
    made = block(drop_path=0.999)
    x, cls, score = inputs(4, 4)
    tokens, _, _ = expected(made, x[0], cls[0], score[0])
    made.train()
    torch.manual_seed(0)
    map_, token, _ = made(x, cls, score)
    assert torch.equal(token, cls), "the branch was not dropped"
    order = score[0].argsort(descending=True)
    plain = torch.stack(positions(x[0], made.pos_embed))
    got = map_[0].flatten(1).T
    torch.testing.assert_close(got[order[:8]], plain[order[:8]], **EXACT)
    assert not torch.allclose(got[order[8:]], plain[order[8:]], atol=1e-3)
    # Only the MLP's part differs from evaluation: it sees the stand-in without its attention.
    gains = got[order[8:]] - plain[order[8:]]
    torch.testing.assert_close(gains, gains[:1].expand_as(gains), **EXACT)
    assert tokens.shape == got.shape


@pytest.mark.parametrize(("grid", "half"), [((4, 6), (2, 3)), ((3, 5), (2, 3)), ((1, 1), (1, 1)), ((2, 1), (1, 1))])
def test_pooled_scores_are_means_of_the_same_sum(grid, half):
    score = torch.rand(2, grid[0] * grid[1], dtype=torch.float64)
    got = pool_scores(score, grid)
    assert got.shape == (2, half[0] * half[1])
    for image in range(2):
        means = []
        for row in range(half[0]):
            for column in range(half[1]):
                cells = [
                    float(score[image, y * grid[1] + x])
                    for y in range(2 * row, min(2 * row + 2, grid[0]))
                    for x in range(2 * column, min(2 * column + 2, grid[1]))
                ]
                means.append(sum(cells) / len(cells))
        want = torch.tensor(means, dtype=torch.float64) * (score[image].sum() / sum(means))
        torch.testing.assert_close(got[image], want, **EXACT)


def network(**options):
    torch.manual_seed(1)
    model = timm.create_model("zoo_uniformer_xxs", **{**_SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@torch.no_grad()
def test_stages_hand_scores_and_class_token_on():
    """The network is its blocks in a row: first scores in stage 3, pooled and not made anew for stage 4."""
    model = network().double()
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    maps = model.forward_intermediates(x, intermediates_only=True)
    third, fourth = model.stages[2], model.stages[3]
    assert [made.whole for stage in (third, fourth) for made in stage.blocks] == [True, False, False, False, False]
    y, cls, score = third.downsample(maps[1]), model.cls_token, torch.zeros(1, 0, dtype=torch.float64)
    for made in third.blocks:
        y, cls, score = made(y, cls, score)
    torch.testing.assert_close(y, maps[2], **EXACT)
    score = pool_scores(score, (4, 6))
    y, cls = fourth.downsample(y), cls @ fourth.cls_upsample.weight.T + fourth.cls_upsample.bias
    for made in fourth.blocks:
        y, cls, score = made(y, cls, score)
    torch.testing.assert_close(y, maps[3], **EXACT)


@torch.no_grad()
def test_the_class_token_has_a_say_in_training_alone():
    model = network()
    x = torch.randn(2, 3, 64, 64)
    pooled, token = model.forward_auxiliary(x)
    assert pooled.shape == token.shape == (2, 5)
    assert torch.equal(model(x), pooled)
    model.train()
    pooled, token = model.forward_auxiliary(x)
    torch.testing.assert_close(model(x), (pooled + token) / 2)


@pytest.mark.parametrize("size", [(32, 32), (33, 65), (1, 1), (128, 160)])
def test_images_of_one_colour_and_any_size(size):
    """All scores tie there, and every size leaves at least one token to go on with."""
    model = network().train()
    out = model(torch.ones(2, 3, *size))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_scores_are_float32_under_autocast():
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        x, cls, score = model.start(torch.randn(2, 3, 64, 64))
        for stage in model.stages:
            x, cls, score = stage(x, cls, score)
    assert score.dtype == torch.float32


@pytest.mark.parametrize("option", [{"init_values": 1e-5}, {"aux_head": True}])
def test_what_shrinking_networks_lack_is_refused(option):
    with pytest.raises(UsageError, match=f"takes no {next(iter(option))}"):
        timm.create_model("zoo_uniformer_xxs", **option)
