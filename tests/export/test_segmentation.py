"""Segmentation from the exported file: the classes of torch at any size, windows, masks, tables, bad input."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from zoo.errors import UsageError
from zoo.export import ExportError, Predictor, PredictorError, bundle, to_onnx
from zoo.export import predictor as room

from .conftest import TinyTask

NAMES = ["sky", "röad", "car, blue", "tree"]
PALETTE = [[0, 0, 0], [200, 10, 20], [30, 40, 250], [5, 150, 5]]


class TinySegmenter(nn.Module):
    """Two convolutions of stride 2 and a resize back: exports in seconds."""

    def __init__(self, any_size=True, img_size=(24, 32), window=None, overlap=None, in_chans=3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(in_chans, 32, 5, stride=2, padding=2), nn.GELU(), nn.Conv2d(32, len(NAMES), 3, padding=1)
        )
        self.any_size, self.img_size, self.in_chans = any_size, img_size, in_chans
        self.window, self.overlap = window, overlap
        self.register_buffer("mean", torch.full((in_chans, 1, 1), 0.4))
        self.eval()

    def inference(self, images):
        images = images.to(self.mean.dtype) / 255 if images.dtype == torch.uint8 else images
        if not self.any_size:
            assert images.shape[-2:] == self.img_size
        found = self.layers((images - self.mean) / 0.3)
        return 8 * F.interpolate(found, images.shape[-2:], mode="bilinear", align_corners=False)

    def export_meta(self):
        return {
            "task": "segmentation",
            "head": "tiny",
            "backbone": "convolution",
            "class_names": NAMES,
            "palette": PALETTE,
            "img_size": list(self.img_size),
            "in_chans": self.in_chans,
            "mean": self.mean.flatten().tolist(),
            "std": [0.3] * self.in_chans,
            "any_size": self.any_size,
            "window": self.window,
            "window_overlap": self.overlap,
        }


@pytest.fixture(scope="module")
def task():
    return TinySegmenter()


@pytest.fixture(scope="module")
def model(task, tmp_path_factory):
    return to_onnx(task, tmp_path_factory.mktemp("model") / "segments.onnx").path


def picture(height, width, seed=0, mode="RGB"):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


SIZES = [(40, 50), (40, 50), (33, 41), (20, 90), (24, 32)]


@pytest.fixture
def folder(tmp_path):
    for number, size in enumerate(SIZES):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(*size, seed=number).save(path)
    return tmp_path / "photos"


def exact(task, path):
    """Classes (H, W) of a picture, by torch."""
    pixels = np.moveaxis(np.asarray(Image.open(path).convert("RGB")), 2, 0)[None]
    with torch.no_grad():
        return task.inference(torch.from_numpy(pixels.copy())).argmax(1)[0].numpy()


def test_graph_equals_torch_at_two_sizes_and_batches(task, model):
    session = onnxruntime.InferenceSession(model)
    for shape in ((1, 3, 24, 32), (3, 3, 57, 43)):
        images = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
        (logits,) = session.run(None, {"images": images})
        with torch.no_grad():
            wanted = task.inference(torch.from_numpy(images)).numpy()
        assert logits.shape == (shape[0], 4, *shape[2:])
        assert (logits.argmax(1) == wanted.argmax(1)).mean() >= 0.9999
        np.testing.assert_allclose(logits, wanted, atol=1e-4 * np.abs(wanted).max())


def test_a_graph_that_names_other_classes_is_no_export(task, tmp_path, monkeypatch):
    from zoo.export import check

    def swapped(network, images, device="cpu"):
        # Two classes a hair apart, which no tolerance of logits sees.
        (logits,) = true(network, images, device)
        top = logits.max(1, keepdims=True)
        logits = np.where(logits == top, top - 1e-5, np.where(np.arange(4)[:, None, None] == 0, top, logits))
        return [logits.astype(np.float32)]

    true = check.outputs_of
    monkeypatch.setattr(check, "outputs_of", swapped)
    monkeypatch.setattr(TinySegmenter, "inference", lambda self, images: 0 * images[:, :1].float() + self.flat)
    flat = TinySegmenter()
    flat.register_buffer("flat", torch.tensor([1.0, 1.0, 1.0, 1.00001]).view(4, 1, 1))
    with pytest.raises(ExportError, match="different classes in"):
        to_onnx(flat, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def rows(folder):
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_command_writes_masks_overlays_and_shares(task, model, folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert room.main([str(model), str(folder), "--out", str(out), "--batch", "2"]) == 0
    printed = capsys.readouterr()
    paths, table = sorted(folder.rglob("*.png")), rows(out)
    assert list(table[0]) == ["path", *NAMES]
    assert len(printed.out.splitlines()) == 5 + 1
    for path, row in zip(paths, table, strict=True):
        wanted = exact(task, path)
        with Image.open(out / "masks" / path.relative_to(folder)) as mask:
            assert mask.mode == "P"
            assert mask.getpalette()[:12] == [part for colour in PALETTE for part in colour]
            assert (np.asarray(mask) == wanted).mean() >= 0.9999
            classes = np.asarray(mask)
        shares = [float(row[name]) for name in NAMES]
        # Six digits in the table.
        np.testing.assert_allclose(shares, [(classes == n).mean() for n in range(4)], atol=1e-6)
        with Image.open(out / "overlays" / path.relative_to(folder)) as drawn, Image.open(path) as photo:
            half = (np.asarray(photo, np.int64) + np.asarray(PALETTE)[classes]) / 2
            assert np.abs(np.asarray(drawn, np.int64) - half).max() <= 1  # how a half is rounded


def by_windows(task, path, window, overlap):
    from zoo.tasks.sliding import classes_by_windows

    pixels = np.moveaxis(np.asarray(Image.open(path).convert("RGB")), 2, 0)[None]
    with torch.no_grad():
        return classes_by_windows(task.inference, torch.from_numpy(pixels.copy()), window, overlap)[0].numpy()


def test_windows_as_the_task_has_them(folder, tmp_path):
    fixed = TinySegmenter(any_size=False, window=[24, 32], overlap=6)
    model = to_onnx(fixed, tmp_path / "fixed.onnx").path
    assert [d.dim_value for d in onnx_shape(model)][2:] == [24, 32]
    paths = sorted(folder.rglob("*.png"))
    for path, found in zip(paths, Predictor(model).predict(paths, batch_size=3), strict=True):
        assert (found.classes == by_windows(fixed, path, (24, 32), 6)).mean() >= 0.9999


def onnx_shape(model):
    import onnx

    return onnx.load(model).graph.input[0].type.tensor_type.shape.dim


def test_tiles_on_request_and_for_what_is_too_large(task, model, folder, monkeypatch):
    paths = sorted(folder.rglob("*.png"))
    asked = Predictor(model)
    asked.output.use_tiles(20, 5)
    for path, found in zip(paths, asked.predict(paths), strict=True):
        assert (found.classes == by_windows(task, path, (20, 20), 5)).mean() >= 0.9999
    monkeypatch.setattr(room, "LOGITS", 4 * 1000)
    monkeypatch.setattr(room, "WINDOW", 16)
    for path, found in zip(paths, Predictor(model).predict(paths), strict=True):
        small = found.classes.size <= 1000
        wanted = exact(task, path) if small else by_windows(task, path, (16, 16), 4)
        assert (found.classes == wanted).mean() >= 0.9999


def test_an_image_within_a_window_is_seen_whole_whatever_its_classes(task, model, folder, monkeypatch):
    # Many classes make any image count as large; continued up to a window it would get other classes near its edges.
    monkeypatch.setattr(room, "LOGITS", 100)
    monkeypatch.setattr(room, "WINDOW", 64)
    seen = []
    for path in sorted(folder.rglob("*.png")):
        ours = Predictor(model)
        monkeypatch.setattr(ours, "_run", lambda batch, run=ours._run: seen.append(batch.shape) or run(batch))
        found = ours.predict(path)[0].classes
        height, width = found.shape
        assert {shape[2:] for shape in seen} == {(height, min(width, 64))}
        wanted = exact(task, path) if width <= 64 else by_windows(task, path, (height, 64), 16)
        # Two sums of four logits apart in their last bits.
        assert (found == wanted).mean() >= 0.9999
        seen.clear()


def test_an_evaluation_size_is_kept_and_classes_come_back_to_the_image(task, model, folder):
    ours = Predictor(model)
    ours.output.eval_size = [24, 32]
    path = sorted(folder.rglob("*.png"))[0]
    (found,) = ours.predict(path)
    with Image.open(path) as photo:
        small = photo.resize((32, 24), Image.Resampling.BILINEAR)
        wanted = Predictor(model).predict(small)[0].classes
        across, down = [int((x + 0.5) * 32 / photo.width) for x in range(photo.width)], photo.height
    for y in range(down):
        assert np.array_equal(found.classes[y], wanted[int((y + 0.5) * 24 / down), across])


def test_grey_images_and_many_classes(tmp_path):
    grey = TinySegmenter(in_chans=1)
    found = Predictor(to_onnx(grey, tmp_path / "grey.onnx").path).predict(picture(30, 40, mode="L"))[0]
    assert found.overlay().size == (40, 30)
    many = room.Segments(np.full((2, 3), 300, np.uint16), (0.0,) * 300 + (1.0,), np.zeros((301, 3), np.uint8), None)
    assert np.array_equal(np.asarray(many.mask()), np.full((2, 3), 300))


def test_bad_input_is_one_sentence(model, task, folder, tmp_path, capsys):
    image = next(folder.rglob("*.png"))
    fixed = to_onnx(TinySegmenter(any_size=False, window=[24, 32], overlap=6), tmp_path / "fixed.onnx").path
    classifier = to_onnx(TinyTask(), tmp_path / "classes.onnx").path
    cases = [
        ([model, image, "--top", "3"], "--top: only for models of classes"),
        ([classifier, image, "--tile", "32"], "only for models of defects or segmentation"),
        ([model, image, "--overlap", "4"], "--tile N"),
        ([model, image, "--tile", "1"], "at least 2"),
        ([model, image, "--tile", "32", "--overlap", "20"], "share 0 to 16"),
        ([fixed, image, "--tile", "32"], "24 x 32 alone"),
    ]
    for arguments, message in cases:
        assert room.main([str(argument) for argument in arguments]) == 2, message
        said = capsys.readouterr().err
        assert message in said
        assert len(said.splitlines()) == 1
    with pytest.raises(PredictorError, match="no classes to count"):
        Predictor(model).accuracy(folder)
    with pytest.raises(UsageError, match="16-bit"):
        to_onnx(task, tmp_path / "m.onnx", half=True)
    with pytest.raises(UsageError, match="preprocess"):
        to_onnx(task, tmp_path / "m.onnx", preprocess={"crop_pct": 0.9})


def test_bundle_runs_without_torch_and_zoo(model, folder, tmp_path):
    kit = bundle(model, tmp_path / "kit")
    assert "class of every pixel" in (kit / "README.txt").read_text()
    blocked = "import sys\nfor name in ('torch', 'zoo', 'timm', 'onnx', 'lightning'): sys.modules[name] = None\n"
    code = f"{blocked}import runpy\nsys.argv = {['predictor.py', 'segments.onnx', str(folder), '--out', 'out']!r}\n"
    code += "runpy.run_path('predictor.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=kit, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((kit / "out" / "masks").rglob("*.png"))) == len(SIZES)


def test_checkpoint_predicts_like_its_export(model, task, folder, monkeypatch):
    tasks = pytest.importorskip("zoo.tasks", reason="needs the train extra")
    from zoo.export.checkpoint import CheckpointPredictor

    monkeypatch.setattr(tasks, "load_task", lambda path: (task, {}))
    paths = sorted(folder.rglob("*.png"))
    for ours, other in zip(CheckpointPredictor("a.ckpt").predict(paths), Predictor(model).predict(paths), strict=True):
        assert (ours.classes == other.classes).mean() >= 0.9999


MEASURED = """
import sys
import predictor
status = predictor.main(sys.argv[1:])
print('PEAK', next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc, which Linux alone has"
)
@pytest.mark.parametrize("head", ["fpn", "upernet"])
def test_a_large_image_in_little_memory(tmp_path, head):
    """Photos of 2000 x 1500 pixels and of 1 megapixel, 11 classes: peak resident memory below 2 GB."""
    from zoo.tasks import Segmentation

    names = [f"class {n}" for n in range(11)]
    path = to_onnx(Segmentation(head, "tf_efficientnet_lite0", names, img_size=128).eval(), tmp_path / "m.onnx").path
    picture(1500, 2000).save(tmp_path / "large.jpg")
    picture(1024, 1024).save(tmp_path / "whole.jpg")
    command = [sys.executable, "-c", MEASURED, path, tmp_path / "large.jpg", tmp_path / "whole.jpg", "--out", tmp_path]
    done = subprocess.run(
        [str(part) for part in command], cwd=Path(room.__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("PEAK")[1])
    print(f"peak {peak / 1e6:.2f} GB")
    assert peak < 2_000_000  # kB
    with Image.open(tmp_path / "masks" / "large.png") as mask:
        assert mask.size == (2000, 1500)
