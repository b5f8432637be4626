"""ViT against timm's with the same weights, Context Broadcasting against its equation, released files, bad input."""

import copy

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import nn

import zoo
from zoo.attention import registry
from zoo.errors import UsageError

PLAIN, CB, CBS = "zoo_vit_tiny_patch16_224", "zoo_vit_tiny_cb_patch16_224", "zoo_vit_tiny_cbs_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


def create(name=PLAIN, **kwargs):
    return timm.create_model(name, **{**TINY, **kwargs}).eval()


@torch.no_grad()
def shaken(model):
    """Weights that all count: at the start biases are 0 and the class token nearly so."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


@pytest.mark.parametrize("size", ["tiny", pytest.param("small", marks=pytest.mark.slow)])
@torch.no_grad()
def test_equals_timm(size):
    theirs = shaken(timm.create_model(f"vit_{size}_patch16_224", dynamic_img_size=True, dynamic_img_pad=True)).eval()
    ours = timm.create_model(f"zoo_vit_{size}_patch16_224").eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    for height, width in ((224, 224), (96, 160), (101, 67)):
        x = torch.randn(2, 3, height, width)
        # float32 noise of 12 blocks (about 1e-6 of features of size 1), with room for another order of sums.
        torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_every_option_equals_timm():
    options = {"class_token": False, "global_pool": "avg", "qk_norm": True, "qkv_bias": False, "init_values": 0.5}
    theirs = timm.create_model("vit_tiny_patch16_224", **TINY, **options, mlp_ratio=3, in_chans=2)
    ours = create(**options, mlp_ratio=3, in_chans=2)
    ours.load_state_dict(shaken(theirs).eval().state_dict(), strict=True)
    x = torch.randn(2, 2, 32, 32)
    # float32 noise of two blocks.
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


WRAPS = {
    "bare": lambda weights: weights,
    "model": lambda weights: {"model": weights, "epoch": 3},
    "state_dict": lambda weights: {"state_dict": weights},
    "model_ema": lambda weights: {"model_ema": weights},
    "state_dict_ema": lambda weights: {"state_dict_ema": weights, "arch": "vit"},
    "module.": lambda weights: {f"module.{key}": value for key, value in weights.items()},
    "model and module.": lambda weights: {"model": {f"module.{key}": value for key, value in weights.items()}},
}


@pytest.mark.parametrize("wrap", list(WRAPS))
def test_checkpoint_formats(tmp_path, wrap):
    source = shaken(create())
    torch.save(WRAPS[wrap](source.state_dict()), tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth"), "num_classes": 5}
    model = create(pretrained=True, pretrained_cfg_overlay=overlay)
    for key, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


@pytest.mark.parametrize("token", [True, False])
def test_another_position_table_and_patch_size(tmp_path, token):
    pool = {"class_token": token, "global_pool": "token" if token else "avg"}
    source = shaken(create(**pool))
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth"), "num_classes": 5}
    model = create(
        **pool, img_size=(24, 30), patch_size=(4, 6), pretrained=True, pretrained_cfg_overlay=overlay
    ).state_dict()
    old = source.state_dict()
    table = resample_abs_pos_embed(old["pos_embed"], [6, 5], [4, 4], num_prefix_tokens=int(token))
    patches = resample_patch_embed(old["patch_embed.proj.weight"], [4, 6])
    assert torch.equal(model.pop("pos_embed"), table)
    assert torch.equal(model.pop("patch_embed.proj.weight"), patches)
    assert all(torch.equal(value, old[key]) for key, value in model.items())


def test_own_file_of_a_wide_grid_comes_back_as_it_was(tmp_path):
    source = shaken(create(img_size=(16, 64)))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    # 16 positions could be a 4 x 4 grid as well, which is what timm would take them for: the size has to be said.
    overlay = {"file": str(tmp_path / "w.pth"), "num_classes": 5, "input_size": (3, 16, 64)}
    model = create(img_size=(16, 64), pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.pos_embed, source.pos_embed)


def test_another_head_and_other_channels(tmp_path):
    source = shaken(create())
    torch.save(source.state_dict(), tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth"), "num_classes": 5}
    model = create(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1)
    assert model.head.weight.shape == (7, 16)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)
    # timm's convention for one channel: the sum over the three.
    summed = source.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.patch_embed.proj.weight, summed, rtol=1e-6, atol=1e-7)  # a sum of three floats
    none = create(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
    assert torch.equal(none.norm.weight, source.norm.weight)


def test_averaging_model_takes_a_file_with_a_norm(tmp_path):
    source = shaken(create())
    torch.save(source.state_dict(), tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth"), "num_classes": 5}
    model = create(pretrained=True, pretrained_cfg_overlay=overlay, global_pool="avg")
    assert torch.equal(model.fc_norm.weight, source.norm.weight)


class Foreign:
    """What a training script may have put beside its weights."""


def test_foreign_pickles_are_refused(tmp_path):
    torch.save({"model": create().state_dict(), "args": Foreign()}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"tools/convert_checkpoint\.py") as caught:
        create(pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "w.pth"), "num_classes": 5})
    assert PLAIN in str(caught.value)


def test_context_broadcast_loads_the_plain_weights():
    plain = create().state_dict()
    create(CB).load_state_dict(plain, strict=True)
    missing = create(CBS).load_state_dict(plain, strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys == ["blocks.0.cb.scale", "blocks.1.cb.scale"]


def test_pretrained_cbs_starts_at_scale_one(tmp_path):
    source = shaken(create())
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth"), "num_classes": 5}
    model = timm.create_model(CBS, pretrained=False, **TINY)
    missing = model.load_state_dict(source.state_dict(), strict=False)
    assert len(missing.missing_keys) == 2
    assert all(torch.equal(block.cb.scale, torch.ones(16)) for block in model.blocks)
    assert create(CB, pretrained=True, pretrained_cfg_overlay=overlay).blocks[0].cb.scale is None


def by_equation(block, x, scale):
    """A block as the papers write it, with Context Broadcasting after the MLP, in loops over tokens."""
    x = x + block.attn(block.norm1(x), (4, 4))
    branch = block.mlp(block.norm2(x))
    mean = sum(branch[:, n] for n in range(branch.shape[1])) / branch.shape[1]
    moved = torch.stack([(branch[:, n] + scale * mean) / 2 for n in range(branch.shape[1])], dim=1)
    return x + moved


@pytest.mark.parametrize("name", [CB, CBS])
@torch.no_grad()
def test_context_broadcast_sits_on_the_mlp_branch(name):
    block = shaken(create(name)).double().blocks[0]
    scale = torch.ones(16, dtype=torch.float64) if name == CB else block.cb.scale
    x = torch.randn(2, 17, 16, dtype=torch.float64)
    # float64 rounding in sums over 17 tokens.
    torch.testing.assert_close(block(x, (4, 4)), by_equation(block, x, scale), rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_context_broadcast_halves_deviations():
    cb = create(CB).blocks[0].cb.double()
    x = torch.randn(2, 17, 16, dtype=torch.float64)
    mean = x.mean(1, keepdim=True)
    # float64 rounding in sums over 17 tokens, here and below.
    torch.testing.assert_close(cb(x).mean(1, keepdim=True), mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(cb(x) - mean, (x - mean) / 2, rtol=1e-11, atol=1e-13)
    constant = x[:, :1].expand(-1, 17, -1)
    torch.testing.assert_close(cb(constant), constant, rtol=1e-12, atol=1e-13)


@torch.no_grad()
def test_constant_tokens_make_context_broadcast_vanish():
    block = shaken(create(CB)).blocks[0].double()
    plain = copy.deepcopy(block)
    plain.cb = nn.Identity()
    x = torch.randn(2, 1, 16, dtype=torch.float64).expand(-1, 17, -1)
    torch.testing.assert_close(block(x, (4, 4)), plain(x, (4, 4)), rtol=1e-11, atol=1e-13)  # float64 rounding
    other = torch.randn(2, 17, 16, dtype=torch.float64)
    assert not torch.allclose(block(other, (4, 4)), plain(other, (4, 4)))


def test_attention_by_name():
    def kinds(**kwargs):
        return [zoo_name(block.attn) for block in create(**kwargs).blocks]

    def zoo_name(module):
        return next(name for name in zoo.list_attentions() if registry.attention_spec(name).cls is type(module))

    assert kinds() == ["softmax", "softmax"]
    assert kinds(attn="uniform") == ["uniform", "uniform"]
    assert kinds(attn=["uniform", None]) == ["uniform", "softmax"]
    assert kinds(attn=("softmax", "uniform")) == ["softmax", "uniform"]
    options = create(attn="softmax", attn_options=[{"num_heads": 4}, None])
    assert [block.attn.num_heads for block in options.blocks] == [4, 2]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"attn": "uniformm"}, "uniform"),
        ({"attn": ["softmax"]}, "1 entries.*2 blocks"),
        ({"attn": ["softmax"] * 3}, "3 entries.*2 blocks"),
        ({"attn": "softmax", "attn_options": [{}]}, "attn_options has 1 entries"),
        ({"attn": "softmax", "attn_options": {"num_headz": 2}}, "num_heads"),
        ({"cb": "cbz"}, "'cbs'"),
        ({"global_pool": "mean"}, "avgmax"),
        ({"class_token": False}, "global_pool='avg'"),
        ({"class_token": False, "global_pool": "token"}, "class token"),
    ],
)
def test_mistakes_say_what_is_valid(kwargs, words):
    with pytest.raises(UsageError, match=words):
        create(**kwargs)


def test_global_pool_cannot_cross_the_norm():
    with pytest.raises(UsageError, match="create the model with"):
        create().reset_classifier(3, "avg")
    with pytest.raises(UsageError, match="class token"):
        create(class_token=False, global_pool="avg").reset_classifier(3, "token")
    model = create(global_pool="avg")
    model.reset_classifier(3, "max")
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


@pytest.fixture
def passing(monkeypatch):
    """An attention that hands prefix tokens on unchanged."""
    monkeypatch.setattr(registry, "_SPECS", dict(registry._SPECS))

    @registry.register_attention("passing", paper="none", prefix="pass", cost="0")
    class Passing(registry.attention_spec("uniform").cls):
        pass

    return "passing"


def test_attention_that_passes_the_class_token_on_is_refused(passing):
    with pytest.raises(UsageError, match="class_token=False, global_pool='avg'"):
        create(attn=passing)
    with pytest.raises(UsageError, match="passing"):
        create(attn=[None, passing])
    create(attn=passing, class_token=False, global_pool="avg")
    create(attn=passing, global_pool="avg")


def test_a_square_table_is_resized_to_a_grid_of_as_many_places(tmp_path):
    """14 x 14 and 7 x 28 are both 196 places: taken as it is, the table would be scrambled; timm resizes it."""
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224", depth=1).state_dict(), path)
    made = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}, "img_size": (112, 448), "depth": 1}
    ours, theirs = (timm.create_model(f"{prefix}vit_tiny_patch16_224", **made) for prefix in ("zoo_", ""))
    assert torch.equal(ours.pos_embed, theirs.pos_embed)


@pytest.mark.parametrize("wrong", [{"patch_size": 0}, {"depth": 0}, {"img_size": (0, 32)}])
def test_sizes_that_make_no_network_are_refused(wrong):
    with pytest.raises(UsageError, match="must all be at least 1"):
        timm.create_model("zoo_vit_tiny_patch16_224", **wrong)
