"""Blocks of the ViT that share one map of attention: against loops, and against the plain ViT."""

import copy
import math

import pytest
import timm
import torch

from zoo.backbones import choose_attn_share
from zoo.backbones._vit_blocks import map_similarity, similar_spans
from zoo.errors import UsageError

NAME = "zoo_vit_tiny_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}


def create(**options):
    torch.manual_seed(0)
    return timm.create_model(NAME, **{**TINY, **options}).eval()


def images(batch=2, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(tmp_path):
    """A file with the weights of a plain network, in which everything counts."""
    model = create(qk_norm=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    return model, {
        "pretrained": True,
        "pretrained_cfg_overlay": {"file": str(tmp_path / "plain.pth"), "num_classes": 5},
    }


def test_a_span_of_one_block_is_the_plain_network(saved):
    plain, weights = saved
    shared = create(attn_share=[[1, 1], [3, 3]], qk_norm=True, **weights)
    # float32 noise of four blocks
    torch.testing.assert_close(shared(images()), plain(images()), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_blocks_of_a_span_take_the_first_ones_map():
    """A = softmax(s q0 k0^T); y_l = (A (x_l W_v)) W_o, by loops over tokens in float64."""
    model = create(attn_share=[[1, 3]]).double()
    x, grid = model.embed(images(1).double())
    x = model.blocks[0](x, grid)
    leader, count, heads = model.blocks[1], x.shape[1], 2
    q, k = leader.share.qk(leader.norm1(x))[0].chunk(2, dim=1)
    maps = torch.zeros(heads, count, count, dtype=torch.float64)
    for a in range(heads):
        part = slice(8 * a, 8 * a + 8)
        for n in range(count):
            logits = [(q[n, part] @ k[m, part]).item() / math.sqrt(8) for m in range(count)]
            total = sum(math.exp(logit) for logit in logits)
            for m in range(count):
                maps[a, n, m] = math.exp(logits[m]) / total
    for block in model.blocks[1:]:
        v = block.norm1(x)[0] @ block.attn.v.weight.T + block.attn.v.bias
        out = torch.zeros_like(v)
        for a in range(heads):
            for n in range(count):
                out[n, 8 * a : 8 * a + 8] = sum(maps[a, n, m] * v[m, 8 * a : 8 * a + 8] for m in range(count))
        x = x + (out @ block.attn.proj.weight.T + block.attn.proj.bias)[None]
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(model.forward_features(images(1).double()), model.norm(x), rtol=1e-10, atol=1e-10)


def test_the_weights_of_the_plain_network_load_and_change_nothing_before_the_second_block_of_a_span(saved):
    plain, weights = saved
    shared = create(attn_share=[[1, 2]], qk_norm=True, **weights)
    ours, theirs = (model.forward_intermediates(images(), intermediates_only=True) for model in (shared, plain))
    for index in (0, 1):
        torch.testing.assert_close(ours[index], theirs[index], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours[2], theirs[2], atol=1e-3)
    own = create(attn_share=[[1, 2]], qk_norm=True)
    own.load_state_dict(shared.state_dict(), strict=True)
    assert torch.equal(own(images()), shared(images()))


def test_a_block_that_reuses_saves_queries_and_keys():
    plain, shared = create(), create(attn_share=[[0, 2]])
    count = [sum(p.numel() for p in model.parameters()) for model in (plain, shared)]
    assert count[0] - count[1] == 2 * (2 * 16 * 16 + 2 * 16)


@torch.no_grad()
def test_without_values_only_the_shortcut_is_left():
    model = create(attn_share=[[0, 1]])
    x, grid = model.embed(images())
    block = model.blocks[1]
    weights = model.blocks[0].shared(x, None)
    block.attn.v.weight.zero_()
    block.attn.v.bias.zero_()
    want = x + block.attn.proj.bias
    torch.testing.assert_close(block(x, grid, weights), want + block.mlp(block.norm2(want)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_map_learns_from_every_block_that_uses_it(checkpointing):
    model = create(attn_share=[[0, 1], [2, 3]]).train()
    plain = copy.deepcopy(model)
    model.set_grad_checkpointing(checkpointing)
    model(images()).square().sum().backward()
    plain(images()).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    with torch.no_grad():
        for block in (model.blocks[0], plain.blocks[1]):
            block.attn.proj.weight.zero_()
    model.zero_grad()
    model(images()).square().sum().backward()
    # The first block's own answer is gone; what is left comes through the second.
    assert model.blocks[0].share.qk.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_scripts_compiles_and_takes_other_sizes():
    model = create(attn_share=[[1, 2]])
    x = images(size=40)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        weights = model.blocks[1].shared(torch.randn(1, 17, 16), None)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 17), rtol=1e-6, atol=2e-6)


def test_dropout_falls_on_the_map_after_it_is_shared():
    model = create(attn_share=[[0, 1]], attn_drop_rate=0.5).train()
    x, _ = model.embed(images())
    weights = model.blocks[0].shared(x, None)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    v = model.blocks[0].attn(x, weights)
    assert not torch.equal(v, model.blocks[0].attn(x, weights))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"attn_share": [[2, 1]]}, r"\[2, 1\] is no span"),
        ({"attn_share": [[2, 4]]}, r"0 <= first <= last <= 3"),
        ({"attn_share": [3]}, r"3 is no span"),
        ({"attn_share": [[0, 1], [1, 2]]}, r"block 1 is in two spans"),
        (
            {"attn_share": [[0, 1]], "attn": "uniform"},
            r"block 0 has UniformAttention.*of attention 'softmax'",
        ),
        ({"attn_share": [[0, 1]], "attn_options": [None, {"num_heads": 4}, None, None]}, r"4 heads.*to share has 2"),
        ({"attn_share": [[0, 1]], "attn_options": {"sr_ratio": 2}}, r"sr_ratio"),
    ],
)
def test_wrong_spans_are_named(options, named):
    with pytest.raises(UsageError, match=named):
        create(**options)


def test_similarity_is_the_cosine_of_maps():
    a = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    b = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    found = map_similarity([a.expand(3, 2, 2, 2), b.expand(3, 2, 2, 2)])
    # a.a = 1.5 and a.b = 0.5
    torch.testing.assert_close(found, torch.tensor([[1.0, 1 / 3], [1 / 3, 1.0]]))


def test_spans_are_runs_alike_without_the_first_and_the_last_block():
    alike = torch.ones(8, 8)
    assert similar_spans(alike, 0.9, 3) == [[1, 3], [4, 6]]
    alike[1, 3] = alike[4, 5] = 0.5
    assert similar_spans(alike, 0.9, 3) == [[1, 2], [3, 5]]
    assert similar_spans(torch.eye(8), 0.9, 3) == []


def test_spans_of_a_network():
    model = create(depth=5)
    for block in model.blocks:
        block.attn.qkv.weight.data.zero_()
    assert choose_attn_share(model, images(), 0.99) == [[1, 3]]
    create(depth=5, attn_share=[[1, 3]])


def test_networks_and_thresholds_that_cannot_be_are_named():
    with pytest.raises(UsageError, match="not of ResNet"):
        choose_attn_share(timm.create_model("test_resnet"), images(), 0.9)
    with pytest.raises(UsageError, match="softmax attention in all blocks"):
        choose_attn_share(create(attn="efficient"), images(), 0.9)
    with pytest.raises(UsageError, match="softmax attention in all blocks"):
        choose_attn_share(timm.create_model("test_vit"), images(2, 160), 0.9)
    with pytest.raises(UsageError, match="threshold=3 lies between 0 and 1"):
        choose_attn_share(create(), images(), 3)
    with pytest.raises(UsageError, match="longest=1 is 2 blocks or more"):
        choose_attn_share(create(), images(), 0.9, longest=1)
