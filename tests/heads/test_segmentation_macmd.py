"""MACMD against the authors' recorded answers, loops over its equations, and its own options."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from zoo.errors import UsageError
from zoo.heads import create_segmenter
from zoo.heads.segmentation import MACMD
from zoo.heads.segmentation.macmd_layers import ChannelGate, ContextGate, DilatedContext, SpatialGate
from zoo.heads.segmentation.macmd_mixing import Agreement, ChannelMixer, CrossScaleMixer, nearest, quarter_shift

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(),
    reason="the authors' recorded answers lie beside the project, in ../shared/golden, and are absent here",
)
# Entries of the published files that ours have no use for: a norm that no forward calls, a stem of grey images.
UNUSED_NORMS = 2 * (512 + 640 + 256 + 128)
GREY_STEM = 12


RECORDS = sorted(path.stem for path in GOLDEN.glob("macmd_pvt_v2_b*.json"))


def recorded(name):
    spec = importlib.util.spec_from_file_location("check", GOLDEN / "check.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    return check, json.loads((GOLDEN / f"{name}.json").read_text())


def authors_file(folder, name):
    """The program that checks, a record, and the file of weights that belongs to it."""
    check, golden = recorded(name)
    path = folder / f"{name}.pth"
    torch.save(check.state_dict(golden), path)
    return check, golden, path


def every_map(segmenter, images):
    """All that the golden records of a network, by its names."""
    head, seen = segmenter.head, {}

    def keep(name):
        return lambda module, given, answer: seen.__setitem__(name, answer)

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in [
            ("enc", segmenter.encoder),
            ("ag4", head.gates[3]),
            ("acb", head.bottleneck),
            ("apm", head.agreement),
            ("ccm", head.mixer),
            ("ffb", head.fusion),
        ]
    ]
    size = images.shape[2:]
    answers = {}
    maps = head.decode(segmenter.encoder(images if segmenter.stem is None else segmenter.stem(images)), size)
    for index, (map_, classifier) in enumerate(zip(maps, head.classifiers, strict=True), 1):
        answers[f"dec{index - 1}"] = map_
        answers[f"head{index}_before_upsample"] = classifier(map_)
        up = torch.nn.functional.interpolate(classifier(map_), size, mode="bilinear", align_corners=False)
        answers["logits" if index == 1 else f"p{index}"] = up.sigmoid()
    for hook in hooks:
        hook.remove()
    answers |= {name: seen[name] for name in ("ag4", "acb", "apm", "ffb")}
    answers |= {f"enc{index}": map_ for index, map_ in enumerate(seen["enc"], 1)}
    answers |= dict(zip(("ccm_enc3", "ccm_enc2", "ccm_enc1"), seen["ccm"], strict=True))
    return answers


@needs_golden
@pytest.mark.parametrize("prefix", ["zoo_", pytest.param("", marks=pytest.mark.slow)], ids=["ours", "timms"])
@pytest.mark.parametrize("name", RECORDS)
@torch.inference_mode()
def test_the_network_is_the_authors(tmp_path, name, prefix):
    check, golden, path = authors_file(tmp_path, name)
    backbone = prefix + re.match(r"macmd_(pvt_v2_b\d)", name)[1]
    classes = golden["state_dict"]["out_head.weight"][0][0]
    _, chans, *size = golden["input"]["shape"]
    segmenter = create_segmenter("macmd", backbone, classes, img_size=tuple(size), in_chans=chans, weights=path).eval()
    if re.search(r"in this golden: (\w+)", golden["notes"])[1] != "eval":
        # As the published program runs: those that it makes anew are in training mode.
        segmenter.head.agreement.climb.train()
    images = check.image(golden["input"]["seed"], golden["input"]["shape"])
    answers = every_map(segmenter, images)
    outputs = golden["outputs"]
    named = {key: value.get("of", key) for key, value in outputs.items()}
    errors = {key: check.error(answers[of], outputs[key]) for key, of in named.items() if of in answers}
    assert {f"{answer}{end}" for answer in ("logits", "p2", "p3") for end in ("", "_sub")} <= errors.keys()
    assert len(errors) == len(outputs) or name != "macmd_pvt_v2_b2_evalbn"
    # Float32 noise of some sixty layers.
    assert max(errors.values()) <= 2e-5, errors
    # What is recorded and what a prediction is are the same.
    torch.testing.assert_close(segmenter(images).sigmoid(), answers["logits"])


@needs_golden
def test_files_without_the_random_convolutions_load_and_others_do_not(tmp_path):
    _, _, path = authors_file(tmp_path, "macmd_pvt_v2_b2_evalbn")
    state = torch.load(path, weights_only=True)
    released = {key: value for key, value in state.items() if ".up_blocks." not in key}
    assert len(state) - len(released) == 27
    torch.save(released, tmp_path / "released.pth")
    arguments = {"img_size": 64, "weights": tmp_path / "released.pth"}
    segmenter = create_segmenter("macmd", "zoo_pvt_v2_b2", 9, **arguments)
    assert all(gate.rectified for gate in segmenter.head.gates)
    grey = create_segmenter("macmd", "zoo_pvt_v2_b2", 9, in_chans=1, **arguments)
    assert torch.equal(grey.stem[0].weight, state["conv.0.weight"])
    assert torch.equal(grey.stem[1].running_var, state["conv.1.running_var"])
    assert grey.eval()(torch.rand(1, 1, 64, 64)).shape == (1, 9, 64, 64)
    with pytest.raises(UsageError, match=r"another shape of head\.classifiers"):
        create_segmenter("macmd", "zoo_pvt_v2_b2", 4, **arguments)
    with pytest.raises(UsageError, match="do not fit zoo_pvt_v2_b1"):
        create_segmenter("macmd", "zoo_pvt_v2_b1", 9, **arguments)
    del released["decoder.ffb.bn.weight"]
    torch.save(released, tmp_path / "cut.pth")
    with pytest.raises(UsageError, match=r"lacks head\.fusion\.norm\.weight"):
        create_segmenter("macmd", "zoo_pvt_v2_b2", 9, img_size=64, weights=tmp_path / "cut.pth")


@pytest.mark.parametrize(
    ("backbone", "classes", "total", "decoder", "encoder"),
    [
        ("zoo_pvt_v2_b2", 9, 34_602_792, 9_750_881, 24_849_856),
        ("zoo_pvt_v2_b2", 1, 34_600_976, 9_750_881, 24_849_856),
        ("zoo_pvt_v2_b0", 4, 5_887_025, 2_476_729, None),
    ],
)
def test_parameters_are_those_of_the_published_networks(backbone, classes, total, decoder, encoder):
    with torch.device("meta"):
        head = MACMD((64, 128, 320, 512) if backbone.endswith("b2") else (32, 64, 160, 256), classes)
    trained = count(head.agreement.climb)
    unused = sum(2 * block.expand[0].in_channels for block in head.up)
    assert count(head) - count(head.classifiers) - trained + unused == decoder
    if encoder is not None:
        assert unused == UNUSED_NORMS
        segmenter = create_segmenter("macmd", backbone, classes, img_size=64)
        assert count(segmenter.encoder) == encoder
        assert count(segmenter) - trained + unused + GREY_STEM == total
    else:
        # b0's encoder: the published total less the rest.
        segmenter = create_segmenter("macmd", backbone, classes, img_size=64)
        assert count(segmenter) - trained + unused + GREY_STEM == total


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@torch.inference_mode()
def test_dilated_context_exchanges_quarters():
    layer = DilatedContext(8, 12).double()
    x = torch.randn(2, 8, 11, 9, dtype=torch.float64)
    filtered = []
    for branch, dilation in zip(layer.branches, (1, 2, 3, 5), strict=True):
        y = torch.zeros(2, 12, 11, 9, dtype=torch.float64) + branch.bias[:, None, None]
        for channel in range(12):
            group = channel // 3
            for row in range(3):
                for column in range(3):
                    down, right = (row - 1) * dilation, (column - 1) * dilation
                    for i in range(max(0, -down), min(11, 11 - down)):
                        for j in range(max(0, -right), min(9, 9 - right)):
                            taken = x[:, 2 * group : 2 * group + 2, i + down, j + right]
                            y[:, channel, i, j] += taken @ branch.weight[channel, :, row, column]
        filtered.append(y)
    wanted = torch.zeros(2, 12, 11, 9, dtype=torch.float64)
    for j in range(4):
        for i in range(4):
            q = (j + i) % 4
            wanted[:, 3 * j : 3 * j + 3] += filtered[i][:, 3 * q : 3 * q + 3]
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("width", [8, 12, 6])
def test_quarter_shift_takes_neighbours(width):
    x = torch.randn(2, 4, 5, width, dtype=torch.float64)
    wanted = torch.zeros_like(x)
    quarter = width // 4
    for channel in range(width):
        part = min(channel // quarter, 3)
        down, right = [(0, -1), (0, 1), (-1, 0), (1, 0)][part]
        for i in range(4):
            for j in range(5):
                if 0 <= i + down < 4 and 0 <= j + right < 5:
                    wanted[:, i, j, channel] = x[:, i + down, j + right, channel]
    assert torch.equal(quarter_shift(x), wanted)


@torch.inference_mode()
def test_the_channel_mix_is_its_equations():
    layer = ChannelMixer(8).double()
    layer.mix_key.uniform_(0, 1)
    layer.mix_receptance.uniform_(0, 1)
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    shifted = quarter_shift(x)
    answer = layer(x)
    for i in range(3):
        for j in range(4):
            t, s = x[0, i, j], shifted[0, i, j]
            k = (layer.key.weight @ (t * layer.mix_key + s * (1 - layer.mix_key))).clamp(min=0) ** 2
            k = (k - k.mean()) / (k.var(unbiased=False) + 1e-5).sqrt() * layer.key_norm.weight + layer.key_norm.bias
            r = layer.receptance.weight @ (t * layer.mix_receptance + s * (1 - layer.mix_receptance))
            torch.testing.assert_close(answer[0, i, j], (layer.value.weight @ k) / (1 + (-r).exp()))


@torch.inference_mode()
def test_agreement_is_its_equations():
    layer = Agreement((6, 10), 8).double().eval()
    features = [torch.randn(1, 6, 4, 6, dtype=torch.float64), torch.randn(1, 10, 2, 3, dtype=torch.float64)]
    p = [project(map_) for project, map_ in zip(layer.project, features, strict=True)]
    p[1] = layer.climb[0](p[1], (4, 6))
    answer = layer(features)
    for i in range(4):
        for j in range(6):
            column = torch.stack([map_[0, :, i, j] for map_ in p])
            first, last = layer.score[0], layer.score[2]
            hidden = (column @ first.weight[:, :, 0, 0].T + first.bias).clamp(min=0)
            score = (hidden @ last.weight[:, :, 0, 0].T + last.bias)[:, 0]
            weight = score.exp() / score.exp().sum()
            pooled = weight[0] * column[0] + weight[1] * column[1]
            wanted = 0
            for level in range(2):
                e = (column[level].sigmoid() * pooled) * (pooled.sigmoid() * column[level])
                z = layer.modulate[0].weight[:, :, 0, 0] @ e
                # BatchNorm as it starts: mean 0, variance 1.
                wanted = wanted + (z / (1 + 1e-5) ** 0.5).sigmoid() * column[level] / 2
            torch.testing.assert_close(answer[0, :, i, j], wanted)


@torch.inference_mode()
def test_gates_are_their_equations():
    x = torch.randn(2, 32, 5, 7, dtype=torch.float64)
    channel, spatial = ChannelGate(32).double(), SpatialGate().double()
    down, up = channel.fc[0].weight, channel.fc[2].weight
    assert down.shape == (2, 32)
    weight = ((x.mean((2, 3)) @ down.T).clamp(min=0) @ up.T).sigmoid()
    torch.testing.assert_close(channel(x), x * weight[:, :, None, None])
    planes = torch.stack([x.mean(1), x.max(1).values], 1)
    gate = torch.nn.functional.conv2d(planes, spatial.conv.weight, padding=3).sigmoid()
    torch.testing.assert_close(spatial(x), x * gate)


@torch.inference_mode()
def test_a_rectified_gate_weighs_what_its_relu_leaves():
    plain, rectified = ContextGate(8).eval(), ContextGate(8, rectified=True).eval()
    rectified.load_state_dict(plain.state_dict())
    x = torch.randn(1, 8, 6, 6)
    assert (plain(x) < 0).any()
    # The gate is positive, so it commutes with the ReLU.
    torch.testing.assert_close(plain(x).clamp(min=0), rectified(x))


@pytest.mark.parametrize(("given", "wanted"), [(3, 3), (2, 8), (11, 33), (5, 37)])
def test_nearest_neighbours_of_whole_multiples_are_torchs(given, wanted):
    x = torch.randn(1, 2, given, given + 1)
    size = (wanted, (given + 1) * 3)
    places = [int(i * given // wanted) for i in range(wanted)]
    assert torch.equal(nearest(x, size), x[:, :, places].repeat_interleave(3, 3))
    if wanted % given == 0:
        assert torch.equal(nearest(x, size), torch.nn.functional.interpolate(x, size=size, mode="nearest"))


@pytest.mark.parametrize("channels", [(6, 10, 14, 22), (64, 64, 64, 64), (18, 36, 72, 144)])
@torch.inference_mode()
def test_encoders_of_any_channels(channels):
    """The authors' program knows PVTv2's; a ResNet-18's third map fails in it."""
    head = MACMD(channels, 3).eval()
    features = [
        torch.randn(1, width, 36 // side, 48 // side) for width, side in zip(channels, (1, 2, 4, 8), strict=True)
    ]
    assert head(features, (144, 192)).shape == (1, 3, 144, 192)


@torch.inference_mode()
def test_the_grid_of_the_mixing_follows_the_images_unless_told():
    features = [torch.randn(1, width, 8 * side, 6 * side) for width, side in zip((20, 12, 8), (1, 2, 4), strict=True)]
    free, fixed = CrossScaleMixer((20, 12, 8), 8).eval(), CrossScaleMixer((20, 12, 8), 8, side=16).eval()
    grids = []
    for layer in (free, fixed):
        layer.mixer.register_forward_pre_hook(lambda _, given: grids.append(given[0].shape[1:3]))
        assert [map_.shape for map_ in layer(features)] == [map_.shape for map_ in features]
    assert grids == [(32, 24), (16, 16)]


def test_the_published_quirks_are_options():
    size, channels = (64, 64), (8, 12, 20, 28)
    features = [
        torch.randn(2, width, 16 // side, 16 // side) for width, side in zip(channels, (1, 2, 4, 8), strict=True)
    ]
    sane = MACMD(channels, 3).eval()
    with torch.no_grad():
        assert torch.equal(sane(features, size), sane(features, size))
        fresh = MACMD(channels, 3, fresh_up_conv=True).eval()
        assert not torch.equal(fresh(features, size), fresh(features, size))
        assert not [key for key in fresh.state_dict() if ".climb." in key]
        squashed = MACMD(channels, 3, sigmoid_outputs=True).eval()
        squashed.load_state_dict(sane.state_dict())
        torch.testing.assert_close(squashed(features, size), sane(features, size).sigmoid())
        squashed.train()
        assert all(answer.min() > 0 and answer.max() < 1 for answer in squashed(features, size))


def test_grey_images_get_a_stem_unless_refused():
    with_stem = create_segmenter("macmd", "test_resnet", 2, img_size=64, in_chans=1)
    assert [type(layer).__name__ for layer in with_stem.stem] == ["Conv2d", "BatchNorm2d", "ReLU"]
    assert with_stem.encoder.in_chans == 3
    without = create_segmenter("macmd", "test_resnet", 2, img_size=64, in_chans=1, grey_stem=False)
    assert without.stem is None
    assert without.encoder.in_chans == 1
    for segmenter in (with_stem, without):
        assert len(segmenter.mean) == 1
        assert segmenter.eval()(torch.zeros(1, 1, 64, 80)).shape == (1, 2, 64, 80)
