"""Feature pyramids over many families of timm's and all of ours: shapes, order, resizing, sizes and refusals."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import zoo
from zoo.errors import UsageError
from zoo.features import FeaturePyramid
from zoo.features.pyramid import as_map, layout_of, resize

# The smallest network of each family, seconds apart: convolutions, pyramids of attention, ladders without fine levels,
# plain transformers, channels last, fixed sizes.
QUICK = [
    "test_byobnet",
    "test_convnext",
    "test_efficientnet",
    "test_mambaout",
    "test_resnet",
    "test_vit",
    "test_vit_relpos",
    "test_nfnet",
    "cait_xxs24_224",
    "efficientvit_m0",
    "mobilenetv3_small_050",
    "hrnet_w18_small",
    "visformer_tiny",
    "pvt_v2_b0",
]
SLOW = [
    "beit_base_patch16_224",
    "coat_tiny",
    "convmixer_768_32",
    "cs3darknet_focus_s",
    "davit_tiny",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla34",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformerv2_s0",
    "efficientvit_b0",
    "vit_tiny_patch16_dinov3_qkvb",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "ghostnet_050",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "inception_next_atto",
    "levit_128s",
    "test_coatnet",
    "poolformer_s12",
    "mixer_s16_224",
    "mobilevit_xxs",
    "pit_ti_224",
    "regnetx_002",
    "repvit_m1",
    "resnetv2_18",
    "rexnet_100",
    "sequencer2d_s",
    "shvit_s1",
    "starnet_s1",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224",
    "twins_svt_small",
    "vit_tiny_r_s16_p8_224",
    "volo_d1_224",
    "ese_vovnet19b_slim_dw",
    "xcit_nano_12_p8_224",
]
# Of families that do not take small images or flat ones: (name, side).
OWN_SIZE = [
    ("mvitv2_tiny", 64),
    ("nest_tiny", 64),
    ("crossvit_tiny_240", 240),
    ("convit_tiny", 96),
    ("efficientformer_l1", 224),
    ("eca_halonext26ts", 256),
    ("inception_v3", 299),
]
OURS = [
    "zoo_attention_resnet50",
    "zoo_flatten_pvt_tiny",
    "zoo_halonet_h0",
    "zoo_lambda_resnet26t",
    "zoo_pvt_tiny",
    "zoo_pvt_v2_b0",
    "zoo_shvit_s1",
    "zoo_uniformer_xxs",
    "zoo_vit_tiny_patch16_224",
]
OURS_SLOW = [
    "zoo_cswin_tiny",
    "zoo_flatten_swin_tiny",
    "zoo_halonet26t",
    "zoo_swin_tiny_patch4_window7_224",
    "zoo_uniformer_small",
    "zoo_uniformer_small_tl",
    "zoo_vit_tiny_cb_patch16_224",
]
LEVELS = (4, 8, 16, 32)


def sides(size, level):
    return (-(-size[0] // level), -(-size[1] // level))


@torch.inference_mode()
def check(name, size):
    """Every promise about one network at one size."""
    pyramid = FeaturePyramid(name, LEVELS, size).eval()
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    maps = pyramid(images)
    assert [map_.shape[1] for map_ in maps] == pyramid.channels
    assert pyramid.reductions == list(LEVELS)
    # A network's own map loses rows to convolutions without padding: one, but for those made of them.
    loss = 5 if name.startswith("inception") else 1
    for map_, level, native in zip(maps, LEVELS, pyramid.native, strict=True):
        slack = loss if native else 0
        assert all(0 <= want - got <= slack for want, got in zip(sides(size, level), map_.shape[2:], strict=True))
        assert map_.isfinite().all()
        assert map_.std() > 0
    odd = (size[0] + 7, size[1] - 11)
    if pyramid.any_size:
        for map_, level in zip(pyramid(torch.zeros(2, 3, *odd)), LEVELS, strict=True):
            assert all(abs(want - got) <= loss for want, got in zip(sides(odd, level), map_.shape[2:], strict=True))
    else:
        refused = [other for other in (odd, (size[0] + 5, size[1] + 3), (49, 147)) if not pyramid.takes(other)]
        with pytest.raises(UsageError, match=r"multiples of \d+|windows of its own size"):
            pyramid(torch.zeros(1, 3, *refused[0]))
    return pyramid


@pytest.mark.parametrize("name", QUICK)
def test_a_family_of_timm(name):
    check(name, (64, 96))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_families_of_timm(name):
    check(name, (64, 96))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), OWN_SIZE)
def test_families_of_one_or_large_sizes(name, side):
    check(name, (side, side))


@pytest.mark.parametrize("name", [*OURS, *(pytest.param(name, marks=pytest.mark.slow) for name in OURS_SLOW)])
def test_our_families_take_any_size(name):
    assert check(name, (64, 96)).any_size


def test_the_lists_are_wide_enough():
    own = [name for name, _ in OWN_SIZE]
    families = {timm.model_entrypoint(name).__module__ for name in QUICK + SLOW + own}
    assert len(families) >= 60
    assert {timm.model_entrypoint(name).__module__ for name in OURS + OURS_SLOW} == {
        timm.model_entrypoint(name).__module__ for name in timm.list_models("zoo_*")
    }


@torch.inference_mode()
def test_native_maps_are_the_networks_own():
    torch.manual_seed(1)
    pyramid = FeaturePyramid("test_resnet", LEVELS, 64).eval()
    network = timm.create_model("test_resnet", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    network.load_state_dict(pyramid.network.state_dict())
    images = torch.randn(2, 3, 64, 50)
    for map_, want in zip(pyramid(images), network(images), strict=True):
        assert torch.equal(map_, want)
    assert pyramid.native == [True] * 4


@pytest.mark.parametrize(
    ("name", "levels", "native"),
    [
        ("test_resnet", (2, 4, 8, 16, 32), [True] * 5),
        ("test_resnet", (16, 64), [True, False]),
        ("zoo_shvit_s1", (16, 32, 64), [True] * 3),
        ("zoo_pvt_v2_b0", (2, 4, 32), [False, True, True]),
        ("test_vit", (8, 16), [False, True]),
        ("nest_tiny", (4, 8, 16, 32), [True, True, True, False]),
    ],
)
def test_ladders(name, levels, native):
    pyramid = FeaturePyramid(name, levels, 64).eval()
    assert pyramid.native == native
    assert pyramid.reductions == list(levels)
    if all(native):
        FeaturePyramid(name, levels, 64, strict=True)
    maps = pyramid(torch.zeros(1, 3, 64, 64))
    assert [tuple(map_.shape[1:]) for map_ in maps] == [
        (channels, 64 // level, 64 // level) for channels, level in zip(pyramid.channels, levels, strict=True)
    ]


@torch.inference_mode()
def test_missing_levels_are_the_nearest_ones_resized():
    pyramid = FeaturePyramid("zoo_shvit_s1", (2, 8, 16, 64), 128).eval()
    images = torch.randn(1, 3, 128, 96)
    finest, _, coarsest = timm_maps(pyramid, images)
    maps = pyramid(images)
    assert pyramid.native == [False, False, True, True]
    assert torch.equal(maps[2], finest)
    assert torch.equal(maps[3], coarsest)
    for map_, level in zip(maps[:2], (2, 8), strict=True):
        assert torch.equal(map_, F.interpolate(finest, (128 // level, 96 // level), mode="bilinear"))


def timm_maps(pyramid, images):
    network = timm.create_model(pyramid.name, features_only=True).eval()
    state = {key: value for key, value in pyramid.network.state_dict().items() if key in network.state_dict()}
    network.load_state_dict(state, strict=False)
    return network(images)


@torch.inference_mode()
def test_levels_of_a_plain_transformer_come_from_even_depths():
    pyramid = FeaturePyramid("vit_tiny_patch16_224", LEVELS, 64).eval()
    full = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0).eval()
    full.load_state_dict(pyramid.network.state_dict())
    images = torch.randn(1, 3, 64, 64)
    # Of 12 blocks every third, as in ViTDet's and BEiT's pyramids; after the network's last norm.
    wanted = full.forward_intermediates(images, indices=[2, 5, 8, 11], norm=True, intermediates_only=True)
    for map_, want, level in zip(pyramid(images), wanted, LEVELS, strict=True):
        assert torch.equal(map_, want if level == 16 else F.interpolate(want, (64 // level,) * 2, mode="bilinear"))


@torch.inference_mode()
def test_a_map_with_as_many_columns_as_channels_keeps_its_layout():
    """Channels last is told from channels first by the network, where the shape says nothing."""
    small = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    name = "swin_tiny_patch4_window7_224"
    ambiguous = FeaturePyramid(name, (4,), 64, backbone_options=small).eval()
    plain = FeaturePyramid(name, (4,), (64, 128), backbone_options=small).eval()
    own = {key: value for key, value in ambiguous.state_dict().items() if "attn_mask" not in key}
    plain.load_state_dict(own, strict=False)
    images = torch.randn(1, 3, 64, 128)
    torch.testing.assert_close(plain(images)[0], ambiguous(images)[0])


def test_tokens_become_maps_without_their_prefix():
    grid = torch.randn(2, 5, 3, 4)
    tokens = torch.cat([torch.randn(2, 2, 5), grid.flatten(2).transpose(1, 2)], 1)
    assert layout_of(tokens, 5, None, "any") == "NLC"
    assert torch.equal(as_map(tokens, "NLC", 16, (47, 64)), grid)
    with pytest.raises(UsageError, match="where a map of 7 channels is needed"):
        layout_of(tokens, 7, None, "any")


def test_one_pass_of_an_image_does_not_touch_the_network():
    pyramid = FeaturePyramid("test_resnet", LEVELS, 64)
    pyramid.network.train()
    before = {key: value.clone() for key, value in pyramid.state_dict().items()}
    frozen = next(module for module in pyramid.modules() if isinstance(module, torch.nn.BatchNorm2d))
    frozen.eval()
    assert pyramid.takes((70, 50))
    assert not frozen.training
    assert sum(module.training for module in pyramid.modules()) == len(list(pyramid.modules())) - 1
    assert all(torch.equal(value, before[key]) for key, value in pyramid.state_dict().items())


def test_weights_come_from_a_file_and_foreign_ones_are_refused(tmp_path):
    full = timm.create_model("test_efficientnet")
    save_file(full.state_dict(), tmp_path / "own.safetensors")
    pyramid = FeaturePyramid("test_efficientnet", img_size=64, pretrained=tmp_path / "own.safetensors")
    assert torch.equal(pyramid.network.conv_stem.weight, full.conv_stem.weight)
    grey = FeaturePyramid("test_efficientnet", img_size=64, in_chans=1, pretrained=tmp_path / "own.safetensors")
    torch.testing.assert_close(grey.network.conv_stem.weight, full.conv_stem.weight.sum(1, keepdim=True))
    # Names that no network has: timm would load nothing, in silence.
    renamed = {f"other.{key}": torch.randn_like(value.float()) for key, value in full.state_dict().items()}
    save_file(renamed, tmp_path / "foreign.safetensors")
    with pytest.raises(UsageError, match="do not fit backbone 'test_efficientnet'"):
        FeaturePyramid("test_efficientnet", img_size=64, pretrained=tmp_path / "foreign.safetensors")


def test_segment_anything_gives_its_blocks_maps():
    # timm's norm of them is a neck, which leaves 256 channels where its list of levels says embed_dim.
    options = {"embed_dim": 32, "depth": 4, "num_heads": 2, "global_attn_indexes": (1, 3), "window_size": 3}
    pyramid = FeaturePyramid("samvit_base_patch16", LEVELS, (64, 96), backbone_options=options).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps, network = pyramid(images), pyramid.network
        x = network.norm_pre(network.patch_embed(images) + network.pos_embed)
        for index, block in enumerate(network.blocks):
            x = block(x)
            want = resize(x.permute(0, 3, 1, 2), sides((64, 96), LEVELS[index]))
            torch.testing.assert_close(maps[index], want)
    assert pyramid.channels == [32] * 4
    assert not [name for name, _ in network.named_parameters() if "neck" in name]


def test_tokens_on_a_grid_that_they_do_not_have_are_refused():
    # timm's ViTamin makes 35 tokens of such an image and folds them into 4 x 6 places, with channels mixed up.
    pyramid = FeaturePyramid("vitamin_small_224", LEVELS, 64).eval()
    assert not pyramid.any_size
    with pytest.raises(UsageError, match="cannot take images of 65 x 97: give multiples of 16, for instance 80 x 112"):
        pyramid(torch.zeros(1, 3, 65, 97))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet10", {}, r"unknown backbone.*resnet10t"),
        ("zoo_shvit_s1", {"strict": True}, r"no maps of levels \[4, 8\]: it has \[16, 32, 64\]"),
        ("test_vit", {"strict": True}, r"no maps of levels \[4, 8, 32\]: it has \[16\]"),
        ("test_resnet", {"levels": (8, 4)}, "ascending"),
        ("test_resnet", {"levels": ()}, "ascending"),
        ("test_resnet", {"levels": 8}, "ascending"),
        ("test_resnet", {"img_size": 0}, "img_size=0"),
        ("test_resnet", {"img_size": 64.0}, r"img_size=64\.0"),
        ("test_resnet", {"img_size": (1, 2, 3)}, "height, width"),
        ("test_resnet", {"pretrained": "/none/w.pth"}, "no weights file"),
        ("test_resnet", {"backbone_options": {"dept": 1}}, "dept"),
        ("test_resnet", {"backbone_options": {"img_size": 64}}, "backbone_options holds img_size"),
        ("hrnet_w18_small", {"img_size": 70}, "multiples of 32, for instance 96 x 96"),
        ("swin_tiny_patch4_window7_224", {"img_size": (70, 66)}, "multiples of 4, for instance 72 x 68"),
        ("convit_tiny", {"img_size": (64, 96)}, "give squares, for instance 96 x 96"),
        ("nest_tiny", {"img_size": (64, 96)}, "give squares, for instance 96 x 96|multiples of"),
        ("efficientformer_l1", {"img_size": 64}, r"img_size=\[224, 224\], which it was made for"),
    ],
)
def test_wrong_usage_is_a_sentence(name, arguments, message):
    with pytest.raises(UsageError, match=message):
        FeaturePyramid(name, **{"img_size": 64, **arguments})


def test_other_errors_stay_what_they_are():
    pyramid = FeaturePyramid("test_resnet", LEVELS, 64)
    with pytest.raises(RuntimeError) as caught:
        pyramid(torch.zeros(1, 4, 64, 64))
    assert not isinstance(caught.value, UsageError)


@pytest.mark.parametrize("name", ["test_resnet", "zoo_shvit_s1", "test_vit"])
def test_it_compiles_in_one_graph(name):
    pyramid = FeaturePyramid(name, LEVELS, 64).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        answers = torch.compile(pyramid, fullgraph=True, backend="aot_eager")(images)
        for answer, want in zip(answers, pyramid(images), strict=True):
            torch.testing.assert_close(answer, want)
    torch.compiler.reset()


def test_it_is_a_public_name():
    assert zoo.FeaturePyramid is FeaturePyramid
