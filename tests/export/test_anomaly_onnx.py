"""The exported graph of an anomaly detector: any size and batch, equal to torch, and the loss of 16-bit weights."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from zoo.errors import UsageError
from zoo.export import ExportError, half, to_onnx
from zoo.export.anysize import AnySize

from .anomaly_task import Output, TinyDetector, in_float64
from .conftest import TinyTask


@pytest.fixture(scope="module")
def task():
    return TinyDetector()


@pytest.fixture(scope="module")
def exported(task, tmp_path_factory):
    return to_onnx(task, tmp_path_factory.mktemp("model") / "detector.onnx")


def run(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["score", "map"], {"images": images})


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# The model's own size, larger, smaller, extreme, a single pixel.
@pytest.mark.parametrize("size", [(32, 40), (75, 61), (17, 9), (3, 200), (1, 1)])
@pytest.mark.parametrize("batch", [1, 4])
def test_equals_a_float64_network_at_any_size_and_batch(task, exported, size, batch):
    images = noise(batch, 3, *size)
    (score, anomaly_map), (exact_score, exact_map) = run(exported.path, images), in_float64(task, images)
    assert anomaly_map.shape == (batch, 1, *size)
    assert score.shape == (batch,)
    # The criterion of the project: 1e-4 of the largest value; float32 keeps 6e-8 of each term.
    np.testing.assert_allclose(anomaly_map, exact_map, rtol=0, atol=1e-4 * exact_map.max())
    np.testing.assert_allclose(score, exact_score, rtol=1e-4)


def test_interface_of_the_graph(exported):
    session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    (given,), (score, anomaly_map) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", 3, "height", "width"])
    assert (score.name, score.type, score.shape) == ("score", "tensor(float)", ["batch"])
    assert (anomaly_map.name, anomaly_map.shape) == ("map", ["batch", 1, "height", "width"])


def test_metadata_and_result(exported):
    entries = metadata(exported.path)
    expected = {"format": "1", "task": "anomaly_detection", "method": "tiny", "threshold": "9.5"}
    expected |= {"pixel_threshold": "9.5", "img_size": "[32, 40]", "in_chans": "3", "tile": "null", "layers": "[0, 1]"}
    assert {name: entries[f"zoo.{name}"] for name in expected} == expected
    assert 0 <= float(entries["zoo.max_relative_error"]) < 1e-4
    assert not [name for name in entries if "class" in name or "crop" in name]
    assert exported.images == 2 * (1 + 3)  # two image sizes, two batch sizes
    assert "of the largest map value" in str(exported)


class Seen(TinyDetector):
    """Keeps what it is shown; its map is a random one."""

    def inference(self, images):
        self.images = images
        self.map = torch.rand(len(images), 1, *self.img_size, generator=torch.Generator().manual_seed(1))
        return Output(self.map.flatten(1).amax(1), self.map)


@pytest.mark.parametrize("given", [(64, 80), (200, 37), (33, 300), (20, 11), (32, 40), (1, 1), (500, 1)])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("img_size", [(32, 40), (48, 48)])
def test_images_are_fitted_in_as_in_training(given, pad, img_size):
    """Against Pillow: stretched, or at the top left and continued by the last pixels; and the map back."""
    task, image = Seen(img_size), noise(*given, 3)
    _, anomaly_map = AnySize(task, img_size, pad)(torch.from_numpy(image).permute(2, 0, 1)[None])
    scale = min(img_size[0] / given[0], img_size[1] / given[1])
    inner = [max(1, min(m, round(s * scale))) for s, m in zip(given, img_size, strict=True)] if pad else img_size
    fitted = Image.fromarray(image).resize((inner[1], inner[0]), Image.Resampling.BILINEAR)
    missing = [(0, whole - part) for whole, part in zip(img_size, inner, strict=True)]
    expected = np.pad(np.asarray(fitted, np.float64), [*missing, (0, 0)], mode="edge")
    difference = np.abs(255 * task.images[0].permute(1, 2, 0).numpy() - expected)
    # Pillow rounds to whole levels after each of its two passes, 0.5 each, of weights with 22 bits.
    assert difference.max() <= 1.01
    assert difference.mean() < 0.5
    # Pillow's own arithmetic on float pixels; torch's antialiased filter is wrong where the result is one pixel wide.
    part = Image.fromarray(task.map[0, 0, : inner[0], : inner[1]].numpy())
    back = np.asarray(part.resize((given[1], given[0]), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(anomaly_map[0, 0].numpy(), back, atol=1e-6)


def test_fitting_in_is_that_of_the_data_module():
    pytest.importorskip("lightning", reason="needs the train extra")
    from zoo.data.anomaly_images import Look, whole

    # Sizes at which a side falls on half a pixel or next to it: 40 * 32 / 1024 and its like.
    for given in [(100, 1040), (1040, 100), (64, 3), (77, 770), (81, 65), (3, 64)]:
        image, task = noise(*given, 3), Seen((32, 32))
        AnySize(task, (32, 32), pad=True)(torch.from_numpy(image).permute(2, 0, 1)[None])
        theirs = whole(Image.fromarray(image), Look((32, 32), "pad", 3, None, 0)).astype(np.float64)
        assert np.abs(255 * task.images[0].permute(1, 2, 0).numpy() - theirs).max() <= 1.01, given


def test_padding_is_in_the_graph(tmp_path, monkeypatch):
    from zoo.export import onnx as module

    monkeypatch.setattr(module, "_resolve", lambda source: (source, {"resize": "pad"}))
    task = TinyDetector()
    path = to_onnx(task, tmp_path / "m.onnx").path
    for size in [(64, 64), (30, 90), (1, 7), (81, 65)]:
        images = noise(2, 3, *size)
        with torch.no_grad():
            expected = AnySize(task, task.img_size, pad=True)(torch.from_numpy(images))
            stretched = AnySize(task, task.img_size)(torch.from_numpy(images))
        found = run(path, images)
        np.testing.assert_allclose(found[1], expected[1].numpy(), atol=1e-4 * float(expected[1].max()))
        np.testing.assert_allclose(found[0], expected[0].numpy(), rtol=1e-4)
        assert not np.allclose(found[1], stretched[1].numpy(), atol=1e-2)
    assert metadata(path)["zoo.resize"] == "pad"


def test_grey_detector(tmp_path):
    task = TinyDetector((24, 24), in_chans=1)
    images = noise(2, 1, 50, 30)
    _, exact = in_float64(task, images)
    np.testing.assert_allclose(run(to_onnx(task, tmp_path / "m.onnx").path, images)[1], exact, atol=1e-4 * exact.max())


class Different(TinyDetector):
    """Computes something else under export than in eager mode, as a wrongly translated operator would."""

    def inference(self, images):
        score, anomaly_map = super().inference(images)
        return Output(score, anomaly_map * (1.001 if torch.compiler.is_exporting() else 1))


class WrongScore(TinyDetector):
    def inference(self, images):
        score, anomaly_map = super().inference(images)
        return Output(score * (1.001 if torch.compiler.is_exporting() else 1), anomaly_map)


class Damaged(TinyDetector):
    def __init__(self):
        super().__init__()
        self.student.bias.data[2] = float("nan")


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Different, "differ by .* 40x32 pixels"), (WrongScore, "differ by"), (Damaged, "NaN or infinite maps")],
)
def test_failure_leaves_no_file(tmp_path, kind, message):
    with pytest.raises(ExportError, match=message):
        to_onnx(kind(), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("threshold", [None, float("nan"), float("inf")])
def test_detector_without_a_threshold_is_refused(tmp_path, threshold):
    with pytest.raises(UsageError, match="no threshold yet"):
        to_onnx(TinyDetector(threshold=threshold), tmp_path / "m.onnx")


def test_options_of_the_other_task_are_refused(tmp_path, task):
    with pytest.raises(UsageError, match="resizes inside its graph"):
        to_onnx(task, tmp_path / "m.onnx", preprocess={"crop_pct": 1.0})
    with pytest.raises(UsageError, match="16-bit weights are for anomaly detection"):
        to_onnx(TinyTask(), tmp_path / "m.onnx", half=True)
    assert list(tmp_path.iterdir()) == []


def test_half_halves_the_file_and_states_its_loss(tmp_path):
    task = TinyDetector(width=2048)
    whole = to_onnx(task, tmp_path / "whole.onnx")
    small = to_onnx(task, tmp_path / "half.onnx", half=True)
    assert 0.45 < small.size_bytes / whole.size_bytes < 0.6
    entry = json.loads(metadata(small.path)["zoo.half_loss"])
    assert entry["source"] == "test patterns"
    assert (entry["images"], entry["changed"]) == (10, small.loss.changed)
    assert f"{small.loss.map:.1e}" in str(small)
    # What the weights' own rounding does, computed in float64: the loss that is stated is of this size.
    rounded = TinyDetector(width=2048)
    for parameter in rounded.parameters():
        if parameter.numel() >= half.SMALLEST:
            parameter.data = parameter.data.half().float()
    images = noise(1, 3, 50, 60)
    actual, exact = run(small.path, images)[1], in_float64(rounded, images)[1]
    np.testing.assert_allclose(actual, exact, atol=1e-4 * exact.max())
    true = np.abs(exact - in_float64(task, images)[1]).max() / exact.max()
    assert true > 1e-6
    assert true / 20 < small.loss.map < 20 * true + 1e-3
    assert "zoo.half_loss" not in metadata(whole.path)


def test_half_measures_on_the_runs_validation_images(tmp_path, task, monkeypatch):
    images = [noise(1, 3, 32, 40, seed=seed) for seed in range(6)]
    monkeypatch.setattr(half, "validation_images", lambda data: images)
    result = to_onnx(task, tmp_path / "m.onnx", half=True)
    assert (result.loss.images, result.loss.source) == (6, "validation images")
    found = [abs(run(result.path, image)[0][0] - in_float64(task, image)[0][0]) / 9.5 for image in images]
    # Both sides computed in float32 or better; 1e-6 of a score is float32's noise.
    assert result.loss.score == pytest.approx(max(found), abs=3e-6)


def test_half_counts_labels_that_change(task):
    images = noise(1, 3, 32, 40)

    class Shifted(TinyDetector):
        def inference(self, images):
            score, anomaly_map = super().inference(images)
            return Output(score - 0.5, anomaly_map)

    other = Shifted()
    score = float(in_float64(task, images)[0][0])
    content = to_onnx_bytes(task)
    patched = pytest.MonkeyPatch()
    patched.setattr(half, "validation_images", lambda data: [images])
    try:
        network = AnySize(other, other.img_size)
        assert half.measure(content, network, {}, (3, 32, 40), score - 0.25).changed == 1
        assert half.measure(content, network, {}, (3, 32, 40), score + 0.25).changed == 0
    finally:
        patched.undo()


def to_onnx_bytes(task):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        return Path(to_onnx(task, Path(folder) / "m.onnx").path).read_bytes()


def test_a_weight_beyond_16_bits_is_refused(tmp_path):
    task = TinyDetector()
    task.teacher.weight.data[0, 0, 0, 0] = 1e6
    with pytest.raises(ExportError, match=r"teacher\.weight holds 1e\+06"):
        to_onnx(task, tmp_path / "m.onnx", half=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "written"), [(3.5, "3.5"), (float("nan"), "9.5"), (None, "9.5")])
def test_threshold_of_pixels(given, written):
    """Without masks in validation a detector has none of pixels; the one of images stands in."""
    from zoo.export.metadata import build_metadata

    entries = build_metadata(TinyDetector().export_meta() | {"pixel_threshold": given}, {"tile": 64, "tile_overlap": 8})
    assert (entries["zoo.threshold"], entries["zoo.pixel_threshold"]) == ("9.5", written)
    assert (entries["zoo.tile"], entries["zoo.tile_overlap"]) == ("64", "8")


@pytest.mark.parametrize("tile", [None, 24])
def test_validation_images_are_those_of_the_run(tmp_path, tile):
    pytest.importorskip("lightning", reason="needs the train extra")
    (tmp_path / "good").mkdir()
    pictures = {}
    for number in range(30):
        pictures[number] = noise(40, 56, 3, seed=number) // 4 + 8 * number
        Image.fromarray(pictures[number]).save(tmp_path / "good" / f"{number:02d}.png")
    data = {"root": str(tmp_path), "img_size": (40, 56), "tile": tile, "val_split": 0.6, "num_workers": 2}
    images = half.validation_images(data)
    # Sixteen good ones and sixteen with a drawn defect; 18 images are held out, or their 2 x 3 tiles.
    assert len(images) == 32
    assert {image.shape for image in images} == {(1, 3, *((tile, tile) if tile else (40, 56)))}
    assert {image.dtype for image in images} == {np.dtype(np.uint8)}
    if tile is None:
        whole = {picture.tobytes() for picture in pictures.values()}
        known = [image[0].transpose(1, 2, 0).tobytes() in whole for image in images]
        assert known == [True] * 16 + [False] * 16
    assert half.validation_images(data | {"root": str(tmp_path / "gone")}) == []
    assert half.validation_images({}) == []
