"""Files that do not fit are refused by name, and tables of positions keep the place that they were learned for."""

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

import zoo.backbones  # noqa: F401  (registers the names)
from zoo.backbones import CHECKPOINT_KEYS, UnfitWeightsError
from zoo.errors import UsageError

SMALL = {"depths": (1, 1, 1, 1), "embed_dims": (16, 24, 32, 40), "num_heads": (1, 1, 2, 2), "mlp_ratios": (1, 1, 1, 1)}
TINY_VIT = {"depth": 1, "embed_dim": 16, "num_heads": 2, "img_size": 32}
NETWORKS = [
    ("zoo_vit_tiny_patch16_224", TINY_VIT),
    ("zoo_flatten_pvt_tiny", SMALL),
    ("zoo_shvit_s1", {"depths": (1, 1, 1)}),
    ("zoo_uniformer_small", {"depths": (1, 1, 1, 1)}),
    ("zoo_attention_resnet50", {"depths": (1, 1, 1, 1)}),
]


def make(name, options, state=None, **more):
    if state is not None:
        more |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state, **more.pop("overlay", {})}}
    return timm.create_model(name, **{**options, **more}).eval()


@pytest.mark.parametrize(("name", "options"), NETWORKS)
@pytest.mark.parametrize("classes", [0, 7, 1000])
def test_a_file_of_another_network_is_refused_whatever_the_head(name, options, classes):
    """timm loads a file with another number of classes loosely, and would leave most of the network as it was made."""
    state = make(name, options).state_dict()
    renamed = {key.replace("fc1", "dense").replace("conv3", "last"): value for key, value in state.items()}
    missing = sorted(set(state) - set(renamed))
    assert missing
    with pytest.raises(UnfitWeightsError, match=rf"{name}: they lack {missing[0]}.*they bring "):
        make(name, options, renamed, num_classes=classes)
    whole = make(name, options, dict(state), num_classes=classes)
    assert all(
        torch.equal(value, state[key]) for key, value in whole.state_dict().items() if not key.startswith("head")
    )


def test_maps_alone_are_no_excuse():
    state = make("zoo_flatten_pvt_tiny", SMALL).state_dict()
    state["stages.9.extra"] = torch.zeros(1)
    with pytest.raises(UnfitWeightsError, match=r"they bring stages\.9\.extra"):
        make("zoo_flatten_pvt_tiny", SMALL, state, features_only=True)


@pytest.mark.parametrize("name", ["zoo_flatten_pvt_tiny", "zoo_flatten_swin_tiny"])
@torch.no_grad()
def test_own_files_of_wide_grids_come_back_as_they_were(name):
    """8 x 32 places could be 16 x 16 as well."""
    options = SMALL if "pvt" in name else {"depths": (1, 1, 1, 1), "embed_dim": 24, "window_size": 4}
    source = make(name, options, img_size=(32, 128))
    for key, value in source.named_parameters():
        if key.endswith(("pos_embed", "positional_encoding")):
            value.normal_()
    other = make(name, options, source.state_dict(), img_size=(32, 128))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in source.state_dict().items())


@pytest.mark.parametrize(("size", "grid"), [((64, 96), (16, 24)), ((224, 224), (56, 56))])
@torch.no_grad()
def test_tables_of_a_known_size_turn_and_grow(size, grid):
    """What was learned at 96 x 64 is resized as 24 x 16 places, also where 16 x 24 are as many."""
    source = make("zoo_flatten_pvt_tiny", SMALL, img_size=(96, 64))
    for key, value in source.named_parameters():
        if key.endswith(("pos_embed", "positional_encoding")):
            value.normal_()
    state = source.state_dict()
    model = make("zoo_flatten_pvt_tiny", SMALL, state, img_size=size, overlay={"input_size": (3, 96, 64)})
    for key in ("stages.0.pos_embed", "stages.0.blocks.0.attn.positional_encoding"):
        want = resample_abs_pos_embed(state[key], list(grid), [24, 16], num_prefix_tokens=0)
        assert torch.equal(model.state_dict()[key], want), key


def test_a_table_of_unknown_size_is_no_square_by_force():
    state = make("zoo_flatten_pvt_tiny", SMALL, img_size=(96, 64)).state_dict()
    with pytest.raises(UsageError, match=r"384 places.*input_size"):
        make("zoo_flatten_pvt_tiny", SMALL, state)


@pytest.mark.parametrize("first", CHECKPOINT_KEYS)
def test_averaged_weights_come_before_raw_ones(first):
    """As in timm: of a file that holds several, the first of the list counts."""
    options = TINY_VIT
    states = [{key: torch.full_like(v, float(n)) for key, v in make(*NETWORKS[0]).state_dict().items()} for n in (1, 2)]
    later = CHECKPOINT_KEYS[CHECKPOINT_KEYS.index(first) :]
    file = {key: states[0 if key == first else 1] for key in reversed(later)}
    model = make(NETWORKS[0][0], options, file)
    assert all((value == 1).all() for value in model.state_dict().values())


def test_what_is_no_state_is_named(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"holds a list, no weights by name"):
        timm.create_model(
            "zoo_vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "w.pth")}
        )
