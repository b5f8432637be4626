"""What every segmentation head promises, and the three general ones against their papers."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from zoo.errors import UsageError
from zoo.heads import create_segmenter, list_heads
from zoo.heads.segmentation import FPN, HEADS, SegFormer, UPerNet
from zoo.heads.segmentation.layers import BinMeans

CHANNELS = (8, 12, 20, 28)
SMALL = {
    "fpn": {"pyramid_channels": 32, "hidden_channels": 32},
    "segformer": {"embed_dim": 32},
    "upernet": {"hidden_channels": 32},
}
SUPERVISED = {"macmd": 3, "upernet": 2}


def maps(size, channels=CHANNELS, batch=2, dtype=torch.float32):
    """Random maps of images of a size, a quarter of it and coarser."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, width, -(-size[0] // level), -(-size[1] // level), generator=generator, dtype=dtype)
        for width, level in zip(channels, (4, 8, 16, 32), strict=True)
    ]


def make(name, **options):
    torch.manual_seed(0)
    return HEADS[name](CHANNELS, 5, **options)


def test_the_names():
    assert list_heads("segmentation") == ["fpn", "macmd", "segformer", "upernet"]


@pytest.mark.parametrize("name", list_heads("segmentation"))
@pytest.mark.parametrize("size", [(64, 64), (75, 130), (33, 47)])
@torch.inference_mode()
def test_logits_have_the_images_size_and_depend_on_their_image_alone(name, size):
    head = make(name).eval()
    features = maps(size)
    logits = head(features, size)
    assert logits.shape == (2, 5, *size)
    assert logits.dtype == torch.float32
    assert torch.equal(head(features, size), logits)
    # Another batch size is another order of sums.
    torch.testing.assert_close(head([map_[1:] for map_ in features], size), logits[1:], atol=1e-5, rtol=1e-4)
    assert logits.std() > 1e-3


@pytest.mark.parametrize("name", list_heads("segmentation"))
@pytest.mark.parametrize("backbone", ["test_resnet", "zoo_shvit_s1", "test_vit", "test_mambaout"])
def test_an_encoder_and_a_head_are_one_network(name, backbone):
    segmenter = create_segmenter(name, backbone, 4, img_size=64)
    assert segmenter.img_size == (64, 64)
    assert segmenter.any_size
    assert len(segmenter.mean) == len(segmenter.std) == 3
    with torch.inference_mode():
        assert segmenter.eval()(torch.randn(2, 3, 53, 70)).shape == (2, 4, 53, 70)
    answer = segmenter.train()(torch.randn(2, 3, 64, 64))
    many = name == "macmd"
    assert isinstance(answer, list) == many
    for logits in answer if many else [answer]:
        assert logits.shape == (2, 4, 64, 64)


@pytest.mark.parametrize(("name", "count"), SUPERVISED.items())
def test_deep_supervision_gives_a_list_in_training_alone(name, count):
    head = make(name, deep_supervision=True)
    features = maps((64, 96))
    answers = head.train()(features, (64, 96))
    assert [logits.shape for logits in answers] == [(2, 5, 64, 96)] * count
    assert len({logits.sum().item() for logits in answers}) == count
    assert isinstance(head.eval()(features, (64, 96)), torch.Tensor)
    assert isinstance(make(name, deep_supervision=False).train()(features, (64, 96)), torch.Tensor)


@pytest.mark.parametrize("name", list_heads("segmentation"))
def test_gradients_reach_every_parameter(name):
    options = {"deep_supervision": True} if name in SUPERVISED else {}
    # Residual branches that start at zero pass nothing on to their convolutions.
    backbone = {"zero_init_last": False}
    segmenter = create_segmenter(name, "test_resnet", 5, img_size=64, backbone_options=backbone, **options).train()
    answer = segmenter(torch.randn(2, 3, 64, 64))
    sum((logits * torch.randn_like(logits)).sum() for logits in (answer if options else [answer])).backward()
    without = [key for key, value in segmenter.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []


@pytest.mark.parametrize("name", list_heads("segmentation"))
def test_it_learns_where_bright_squares_are(name):
    generator = torch.Generator().manual_seed(0)
    images, masks = torch.randn(4, 3, 64, 64, generator=generator), torch.zeros(4, 64, 64, dtype=torch.long)
    for image, mask, (row, column) in zip(images, masks, [(8, 8), (30, 12), (10, 34), (32, 32)], strict=True):
        mask[row : row + 24, column : column + 24] = 1
        image[:, mask.bool()] += 2
    segmenter = create_segmenter(name, "test_resnet", 2, img_size=64, **SMALL.get(name, {})).train()
    optimizer = torch.optim.AdamW(segmenter.parameters(), 3e-3)
    for _ in range(40):
        answer = segmenter(images)
        losses = [F.cross_entropy(logits, masks) for logits in (answer if isinstance(answer, list) else [answer])]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    with torch.inference_mode():
        found = segmenter.eval()(images).argmax(1)
    # 86 % is background.
    assert (found == masks).float().mean() > 0.97


@pytest.mark.parametrize("name", list_heads("segmentation"))
@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_is_finite_and_near(name, training):
    head = make(name).train(training)
    features = maps((64, 96))
    with torch.autocast("cpu", torch.bfloat16):
        answer = head(features, (64, 96))
    first = answer[0] if isinstance(answer, list) else answer
    assert first.isfinite().all()
    sum(logits.float().square().mean() for logits in (answer if isinstance(answer, list) else [answer])).backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters() if parameter.grad is not None)
    if not training:
        with torch.no_grad():
            wanted = head(features, (64, 96))
        # bfloat16 keeps 8 bits, and the layers' errors add up: a few per cent of the spread.
        assert (first - wanted).abs().max() < 0.1 * wanted.std()


@pytest.mark.parametrize(
    "name", ["fpn", "segformer", *(pytest.param(name, marks=pytest.mark.slow) for name in ("macmd", "upernet"))]
)
def test_it_compiles_in_one_graph(name):
    head = make(name).eval()
    features = maps((64, 96))
    with torch.no_grad():
        answer = torch.compile(head, fullgraph=True, backend="aot_eager")(features, (64, 96))
        torch.testing.assert_close(answer, head(features, (64, 96)))
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", list_heads("segmentation"))
@pytest.mark.parametrize("backbone", ["test_resnet", "zoo_shvit_s1", "test_vit"])
def test_an_onnx_graph_of_free_sizes_answers_the_same(name, backbone, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    segmenter = create_segmenter(name, backbone, 5, img_size=64).eval()
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    path = str(tmp_path / "graph.onnx")
    images = torch.randn(2, 3, 67, 103)
    torch.onnx.export(segmenter, (images,), path, dynamo=True, dynamic_shapes=(free,), input_names=["x"], verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    # Sides that are no multiples, and one whose coarse maps are stretched by no whole number.
    for shape in [(1, 3, 64, 64), (3, 3, 75, 130), (2, 3, 49, 99)]:
        images = torch.randn(shape)
        with torch.inference_mode():
            wanted = segmenter(images)
        (answer,) = session.run(None, {"x": images.numpy()})
        # Float32 noise of two programs.
        assert abs(answer - wanted.numpy()).max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize(("length", "bins"), [(7, 1), (7, 2), (7, 3), (7, 6), (3, 6), (1, 6), (12, 6), (13, 5)])
def test_bin_means_are_adaptive_pooling(length, bins):
    x = torch.randn(2, 3, length, length + 4)
    torch.testing.assert_close(BinMeans(bins)(x), F.adaptive_avg_pool2d(x, bins))


@torch.inference_mode()
def test_segformer_is_its_equations():
    head = make("segformer").double().eval()
    head.fuse[1].running_mean.normal_()
    head.fuse[1].running_var.uniform_(0.5, 2)
    features = maps((64, 64), dtype=torch.float64)
    joined = []
    for map_, layer in zip(features, head.project, strict=True):
        tokens = map_.flatten(2).transpose(1, 2) @ layer.weight[:, :, 0, 0].T + layer.bias
        grid = tokens.transpose(1, 2).unflatten(2, map_.shape[2:])
        joined.insert(0, F.interpolate(grid, (16, 16), mode="bilinear", align_corners=False))
    mixed = torch.einsum("bchw,oc->bohw", torch.cat(joined, 1), head.fuse[0].weight[:, :, 0, 0])
    norm = head.fuse[1]
    mixed = (mixed - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
    mixed = (mixed * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
    logits = torch.einsum("bchw,oc->bohw", mixed, head.classifier.weight[:, :, 0, 0])
    logits = logits + head.classifier.bias[:, None, None]
    wanted = F.interpolate(logits, (64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(head(features, (64, 64)), wanted)


@torch.inference_mode()
def test_fpn_is_its_equations():
    head = make("fpn").double().eval()
    features = maps((64, 64), dtype=torch.float64)
    merged = [F.conv2d(map_, layer.weight, layer.bias) for map_, layer in zip(features, head.lateral, strict=True)]
    for level in (2, 1, 0):
        merged[level] = merged[level] + merged[level + 1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    total = 0
    for level, (map_, climb) in enumerate(zip(merged, head.climbs, strict=True)):
        # One block at the finest level, else as many as it takes to double its way there.
        assert len(climb) == max(1, level)
        for block in climb:
            map_ = F.conv2d(map_, block[0].weight, padding=1)
            map_ = F.group_norm(map_, 32, block[1].weight, block[1].bias).clamp(min=0)
            map_ = F.interpolate(map_, scale_factor=2.0, mode="bilinear") if level else map_
        total = total + map_
    logits = F.conv2d(total, head.classifier.weight, head.classifier.bias)
    wanted = F.interpolate(logits, scale_factor=4.0, mode="bilinear")
    torch.testing.assert_close(head(features, (64, 64)), wanted)


@torch.inference_mode()
def test_upernet_is_its_equations():
    def run(block, x):
        y = F.conv2d(x, block[0].weight, padding=block[0].padding)
        if isinstance(block[1], torch.nn.GroupNorm):
            return F.group_norm(y, 1, block[1].weight, block[1].bias).clamp(min=0)
        mean, var = block[1].running_mean, block[1].running_var
        return F.batch_norm(y, mean, var, block[1].weight, block[1].bias).clamp(min=0)

    head = make("upernet", hidden_channels=16).double().eval()
    features = maps((128, 128), dtype=torch.float64)
    last = features[3]
    pooled = [
        run(pool[1], F.adaptive_avg_pool2d(last, count))
        for pool, count in zip(head.pooling.pools, (1, 2, 3, 6), strict=True)
    ]
    pooled = [F.interpolate(map_, last.shape[2:], mode="bilinear") for map_ in pooled]
    levels = [run(block, map_) for block, map_ in zip(head.lateral, features[:3], strict=True)]
    levels.append(run(head.pooling.fuse, torch.cat([last, *pooled], 1)))
    for level in (2, 1, 0):
        levels[level] = levels[level] + F.interpolate(levels[level + 1], scale_factor=2.0, mode="bilinear")
    levels = [run(block, map_) for block, map_ in zip(head.smooth, levels[:3], strict=True)] + levels[3:]
    joined = [F.interpolate(map_, (32, 32), mode="bilinear") for map_ in levels]
    logits = head.classifier[1](run(head.fuse, torch.cat(joined, 1)))
    torch.testing.assert_close(head(features, (128, 128)), F.interpolate(logits, (128, 128), mode="bilinear"))


def test_sizes_are_those_of_the_papers():
    """SegFormer-B0: 0.4 million parameters in the decoder (table 1a of the paper); FPN and UPerNet counted by hand."""
    count = {
        "segformer": sum(p.numel() for p in SegFormer((32, 64, 160, 256), 150).parameters()),
        "fpn": sum(p.numel() for p in FPN((256, 512, 1024, 2048), 150).parameters()),
        "upernet": sum(p.numel() for p in UPerNet((96, 192, 384, 768), 150, hidden_channels=512).parameters()),
    }
    assert count["segformer"] == 256 * (512 + 4) + 4 * 256 * 256 + 2 * 256 + 150 * 257
    first, later = 9 * 256 * 128 + 256, 9 * 128 * 128 + 256
    assert count["fpn"] == 256 * (3840 + 4) + 4 * first + 3 * later + 150 * 129
    pools, sides = 4 * (768 * 512 + 1024), 512 * (96 + 192 + 384) + 3 * 1024
    fuses = 9 * 512 * (768 + 4 * 512) + 1024 + 3 * (9 * 512 * 512 + 1024) + 9 * 4 * 512 * 512 + 1024
    assert count["upernet"] == pools + sides + fuses + 150 * 513


def test_a_head_takes_other_levels():
    segmenter = create_segmenter("segformer", "test_resnet", 3, img_size=64, levels=(2, 8, 32))
    assert segmenter.encoder.reductions == [2, 8, 32]
    with torch.inference_mode():
        assert segmenter.eval()(torch.randn(1, 3, 60, 44)).shape == (1, 3, 60, 44)


@pytest.mark.parametrize("name", ["fpn", "segformer", "upernet"])
def test_one_level_is_enough_for_the_general_heads(name):
    segmenter = create_segmenter(name, "test_vit", 3, img_size=64, levels=(16,)).eval()
    assert segmenter.encoder.native == [True]
    assert segmenter(torch.randn(1, 3, 64, 48)).shape == (1, 3, 64, 48)


def test_grey_images_have_one_mean():
    segmenter = create_segmenter("fpn", "resnet10t", 2, img_size=64, in_chans=1)
    assert segmenter.mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert segmenter.eval()(torch.zeros(1, 1, 64, 64)).shape == (1, 2, 64, 64)


def test_a_network_comes_back_from_its_file(tmp_path):
    segmenter = create_segmenter("upernet", "test_resnet", 3, img_size=64).eval()
    save_file(segmenter.state_dict(), tmp_path / "w.safetensors")
    again = create_segmenter("upernet", "test_resnet", 3, img_size=64, weights=tmp_path / "w.safetensors").eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(images), segmenter(images))
    with pytest.raises(UsageError, match=r"has another shape of head\.classifier"):
        create_segmenter("upernet", "test_resnet", 4, img_size=64, weights=tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="it brings"):
        create_segmenter("segformer", "test_resnet", 3, img_size=64, weights=tmp_path / "w.safetensors")
    (tmp_path / "bad.pth").write_bytes(b"<html>")
    with pytest.raises(UsageError, match=r"bad.pth"):
        create_segmenter("upernet", "test_resnet", 3, img_size=64, weights=tmp_path / "bad.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": "segforner"}, r"unknown segmentation head.*segformer"),
        ({"backbone": "resnet10"}, r"unknown backbone.*resnet10t"),
        ({"num_classes": 0}, r"num_classes=0"),
        ({"embed_dims": 3}, r"unknown option of segformer.*embed_dim"),
        ({"embed_dim": 0}, r"embed_dim=0: give a positive number"),
        ({"dropout": 1.0}, r"dropout=1.0"),
        ({"head": "fpn", "hidden_channels": 100}, r"hidden_channels=100: give a positive multiple of 32"),
        ({"head": "upernet", "bins": (0,)}, r"bins=0"),
        ({"head": "macmd", "levels": (8, 16, 32)}, r"four levels, not of 3: give levels=\[4, 8, 16, 32\]"),
        ({"head": "macmd", "token_side": 0}, r"token_side=0"),
        ({"head": "upernet", "bins": 3}, r"bins=3: give a list"),
        ({"levels": (8, 4)}, r"ascending"),
        ({"backbone": "test_vit", "strict": True}, r"no maps of levels \[4, 8, 32\]: it has \[16\]"),
        ({"pretrained": "/none/w.pth"}, r"no weights file"),
        ({"weights": "/none/w.pth"}, r"no weights file"),
        ({"backbone": "hrnet_w18_small", "img_size": 70}, r"multiples of 32, for instance 96 x 96"),
    ],
)
def test_wrong_usage_is_a_sentence(arguments, message):
    given = {"head": "segformer", "backbone": "test_resnet", "num_classes": 3, "img_size": 64, **arguments}
    with pytest.raises(UsageError, match=message):
        create_segmenter(given.pop("head"), given.pop("backbone"), given.pop("num_classes"), **given)
