"""The predictor on models of defects: scores, tiles with seams that do not show, heat maps, tables, bad input."""

import csv
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.errors import UsageError
from zoo.export import Predictor, PredictorError, bundle, to_onnx
from zoo.export import predictor as room

from .anomaly_task import Brightness, TinyDetector, in_float64
from .conftest import TinyTask


@pytest.fixture(scope="module")
def task():
    return TinyDetector()


@pytest.fixture(scope="module")
def model(task, tmp_path_factory):
    return to_onnx(task, tmp_path_factory.mktemp("model") / "detector.onnx").path


@pytest.fixture(scope="module")
def bright(tmp_path_factory):
    """Says how bright each pixel is; tiles of 32 pixels go through it unchanged."""
    task = Brightness((32, 32), threshold=0.6)
    return to_onnx(task, tmp_path_factory.mktemp("model") / "bright.onnx").path


def picture(height, width, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


SIZES = [(60, 70), (60, 70), (33, 41), (60, 70), (20, 90), (20, 90), (32, 40)]


@pytest.fixture
def folder(tmp_path):
    """Seven pictures of four sizes, in two folders with some names in common."""
    for number, size in enumerate(SIZES):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number // 2}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(*size, seed=number)).save(path)
    return tmp_path / "photos"


def exact(task, path):
    """Score and map (H, W) of a picture, in float64."""
    images = np.moveaxis(np.asarray(Image.open(path).convert("RGB")), 2, 0)[None]
    score, anomaly_map = in_float64(task, images)
    return float(score[0]), anomaly_map[0, 0]


def rows(folder):
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_predict_equals_torch_whatever_the_sizes(task, model, folder, batch_size):
    paths = sorted(folder.rglob("*.png"))
    for path, result in zip(paths, Predictor(model).predict(paths, batch_size=batch_size), strict=True):
        score, anomaly_map = exact(task, path)
        # 1e-4 is the criterion; float32 alone is a hundred times better.
        assert result.score == pytest.approx(score, rel=1e-4)
        np.testing.assert_allclose(result.map, anomaly_map, atol=1e-4 * anomaly_map.max())
        assert result.label == ("defect" if score > 9.5 else "good")
        # A pixel at the threshold may fall either way.
        unsure = np.mean(np.abs(anomaly_map - 9.5) < 1e-3)
        assert abs(result.area - np.mean(anomaly_map > 9.5)) <= unsure


def test_command_writes_table_and_heat_maps(task, model, folder, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert room.main([str(model), str(folder), "--out", str(out), "--batch", "2"]) == 0
    table, paths = rows(out), sorted(folder.rglob("*.png"))
    assert list(table[0]) == ["path", "score", "label", "area"]
    assert [row["path"] for row in table] == [str(path) for path in paths]
    scores = [exact(task, path)[0] for path in paths]
    np.testing.assert_allclose([float(row["score"]) for row in table], scores, rtol=1e-4)
    labels = ["defect" if score > 9.5 else "good" for score in scores]
    assert [row["label"] for row in table] == labels
    assert 0 < labels.count("good") < 7  # both kinds are there
    printed = capsys.readouterr()
    assert f"{labels.count('defect')} defect, {labels.count('good')} good" in printed.out
    assert len(printed.out.splitlines()) == 7 + 2
    assert "7 images" in printed.err
    pictures = sorted(path.relative_to(out / "heatmaps") for path in (out / "heatmaps").rglob("*") if path.is_file())
    assert pictures == sorted(path.relative_to(folder) for path in paths)
    for path in paths:
        with Image.open(out / "heatmaps" / path.relative_to(folder)) as drawn, Image.open(path) as given:
            assert (drawn.size, drawn.mode) == (given.size, "RGB")


def test_heat_map_shows_where(bright, tmp_path):
    """Black with a bright square: black stays black, the square becomes red inside a white outline."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[16:48, 16:48] = 250
    (result,) = Predictor(bright).predict(pixels)
    drawn = np.asarray(result.overlay())
    assert result.label == "defect"
    assert (drawn[:8, :8] == 0).all()
    red, green, blue = drawn[32, 32].astype(int)
    assert red > green + 40 > blue
    edge = (drawn == 255).all(-1)
    inside = result.map > 0.6
    assert edge.any()
    assert not (edge & ~inside).any()
    # Every pixel of the region whose neighbour above, below, left or right is outside, counted by a loop.
    for y in range(1, 63):
        for x in range(1, 63):
            around = inside[y - 1, x] & inside[y + 1, x] & inside[y, x - 1] & inside[y, x + 1]
            assert edge[y, x] == (inside[y, x] and not around)


def test_outline_at_the_edge_of_the_image():
    inside = np.zeros((4, 5), bool)
    inside[0:2, 3:5] = True
    assert room.outline(inside).tolist() == [[0, 0, 0, 255, 255], [0, 0, 0, 255, 255], [0] * 5, [0] * 5]
    thick = room.outline(np.pad(np.ones((7, 9), bool), 2), 3)
    assert thick[2:9, 2:11].tolist() == [[255] * 9] * 3 + [[255] * 3 + [0] * 3 + [255] * 3] + [[255] * 9] * 3
    assert not room.outline(np.ones((3, 3), bool)).any()
    assert not room.outline(np.zeros((3, 3), bool)).any()


def grey_level(height, width, seed):
    return np.moveaxis(picture(height, width, seed), 2, 0).astype(np.float64).mean(0) / 255


@pytest.mark.parametrize("size", [(100, 130), (32, 32), (33, 200), (64, 31), (10, 12), (32, 57)])
@pytest.mark.parametrize("overlap", [0, 8, 16])
def test_seams_of_tiles_do_not_show(bright, size, overlap):
    """Tiles at the model's own size pass unchanged, so the blended map has to be the picture, to rounding."""
    predictor = Predictor(bright)
    predictor.output.use_tiles(32, overlap)
    (result,) = predictor.predict(picture(*size, seed=3))
    # One float32 resize of 1-pixel weights and a weighted mean of equal values: 1e-6.
    np.testing.assert_allclose(result.map, grey_level(*size, 3), atol=3e-6)
    assert result.score == pytest.approx(grey_level(*size, 3).max(), abs=3e-6)


def test_tiles_are_blended_by_their_distance_to_the_end(task, model):
    """Against a float64 loop over pixels: weight of a tile = distance to its nearer end in each direction, up to the
    overlap."""
    image, tile, overlap = picture(90, 75, seed=5), 48, 12
    predictor = Predictor(model)
    predictor.output.use_tiles(tile, overlap)
    (result,) = predictor.predict(image)
    total, weights, best = np.zeros((90, 75)), np.zeros((90, 75)), -math.inf
    # 90 = 2 tiles of 48 with 6 shared is too few: three, at 0, 21, 42. 75: two share 21, at 0 and 27.
    for top in (0, 21, 42):
        for left in (0, 27):
            part = image[top : top + tile, left : left + tile]
            score, anomaly_map = in_float64(task, np.moveaxis(part, 2, 0)[None])
            best = max(best, float(score[0]))
            for y in range(tile):
                for x in range(tile):
                    weight = min(1, (min(y, tile - 1 - y) + 0.5) / overlap) * min(
                        1, (min(x, tile - 1 - x) + 0.5) / overlap
                    )
                    total[top + y, left + x] += weight * anomaly_map[0, 0, y, x]
                    weights[top + y, left + x] += weight
    expected = total / weights
    np.testing.assert_allclose(result.map, expected, atol=1e-4 * expected.max())
    assert result.score == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("size", [(90, 75), (20, 100), (10, 7)])
def test_tiles_are_those_of_validation(task, model, size):
    """What `zoo.data` gives validation by tiles, and so what the threshold is made of."""
    pytest.importorskip("lightning", reason="needs the train extra")
    from zoo.data.tiling import inspect_by_tiles

    predictor = Predictor(model)
    predictor.output.use_tiles(48, 12)
    (result,) = predictor.predict(picture(*size, seed=5))
    images = torch.tensor(picture(*size, seed=5)).permute(2, 0, 1)[None]
    with torch.no_grad():
        score, anomaly_map = inspect_by_tiles(task.inference, images, 48, 12, task.img_size)
    # The criterion of the project.
    np.testing.assert_allclose(result.map, anomaly_map[0, 0].numpy(), atol=1e-4 * float(anomaly_map.max()))
    assert result.score == pytest.approx(float(score), rel=1e-4)


@pytest.mark.parametrize(("length", "tile", "overlap"), [(3000, 224, 56), (225, 224, 0), (448, 224, 112), (1000, 7, 3)])
def test_starts_of_tiles(length, tile, overlap):
    starts = room.tile_starts(length, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] + tile == length
    shared = [first + tile - second for first, second in itertools.pairwise(starts)]
    assert min(shared) >= overlap
    assert len(starts) == math.ceil((length - overlap) / (tile - overlap))


def test_tiles_of_the_run_are_used_and_an_option_overrides(bright, tmp_path, monkeypatch, capsys):
    from zoo.export import onnx

    monkeypatch.setattr(onnx, "_resolve", lambda source: (source, {"tile": 24, "tile_overlap": 6}))
    path = to_onnx(TinyDetector(), tmp_path / "m.onnx").path
    output = Predictor(path).output
    assert (output.tile, output.overlap) == (24, 6)
    assert Predictor(bright).output.tile is None
    Image.fromarray(picture(40, 70)).save(tmp_path / "a.png")
    seen = []
    monkeypatch.setattr(Predictor, "run", lambda self, batch: seen.append(batch.shape) or self._run(batch))
    assert room.main([str(path), str(tmp_path / "a.png")]) == 0
    assert room.main([str(path), str(tmp_path / "a.png"), "--tile", "20", "--overlap", "4"]) == 0
    assert room.main([str(path), str(tmp_path / "a.png"), "--tile", "20", "--overlap", "0"]) == 0
    assert seen == [(2 * 4, 3, 24, 24), (3 * 5, 3, 20, 20), (2 * 4, 3, 20, 20)]
    capsys.readouterr()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_kinds_of_pictures(model, task, tmp_path, mode):
    photo = Image.fromarray(picture(50, 60))
    if mode == "I;16":
        photo = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    else:
        photo = photo.convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    photo.save(path)
    assert room.main([str(model), str(path), "--out", str(tmp_path / "out")]) == 0
    seen = np.asarray(photo.convert("RGB")) if mode != "I;16" else None
    if seen is None:
        seen = np.stack([np.asarray(Image.fromarray(picture(50, 60)).convert("L"))] * 3, -1)
    score = in_float64(task, np.moveaxis(seen, 2, 0)[None])[0][0]
    assert float(rows(tmp_path / "out")[0]["score"]) == pytest.approx(score, rel=1e-4)
    with Image.open(tmp_path / "out" / "heatmaps" / "a.png") as drawn:
        assert drawn.size == (60, 50)


def test_grey_detector_draws_in_colour(tmp_path):
    path = to_onnx(TinyDetector((24, 24), in_chans=1), tmp_path / "m.onnx").path
    (result,) = Predictor(path).predict(picture(30, 50))
    assert result.pixels.shape == (1, 30, 50)
    assert result.overlay().mode == "RGB"


@pytest.mark.parametrize("tile", [None, 20])
def test_no_more_at_once_than_memory_holds(model, folder, monkeypatch, tile):
    """Four times the model's own pixels at a time, however small the images are."""
    monkeypatch.setattr(room, "INNER", 4 * 32 * 40)
    sizes = []
    monkeypatch.setattr(Predictor, "run", lambda self, batch: sizes.append(len(batch)) or self._run(batch))
    predictor = Predictor(model)
    if tile:
        predictor.output.use_tiles(tile)
    assert len(predictor.predict([picture(30, 50)] * 9)) == 9
    # By tiles: 2 x 3 of 20 pixels that share 5, of each image.
    assert sizes == ([4, 2] * 9 if tile else [4, 4, 1])


def test_pictures_get_names_of_their_own(tmp_path):
    paths = [tmp_path / name for name in ("x/a.png", "x/a.jpg", "y/a.png", "x/a.jpg.png", "b.tif")]
    names = room.picture_names(paths)
    assert len(set(names.values())) == 5
    assert {str(name) for name in names.values()} == {"x/a.png", "x/a.jpg.png", "y/a.png", "x/a.jpg.png.png", "b.png"}
    assert room.picture_names([Path("only.jpg")]) == {Path("only.jpg"): Path("only.png")}


def test_unreadable_images_are_left_out(model, folder, tmp_path, capsys):
    (folder / "a" / "text.jpg").write_text("no picture")
    assert room.main([str(model), str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "1 skipped because" in capsys.readouterr().err
    assert len(rows(tmp_path / "out")) == 7


def test_bad_input(model, bright, folder, tmp_path, capsys):
    image = next(folder.rglob("*.png"))
    classifier = to_onnx(TinyTask(), tmp_path / "classes.onnx").path
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").touch()
    (tmp_path / "file").touch()
    cases = [
        ([model, image, "--top", "3"], "--top: only for models of classes"),
        ([model, image, "--labels"], "--labels: only for models of classes"),
        ([classifier, image, "--tile", "32"], "--tile: only for models of defects"),
        ([classifier, image, "--overlap", "0"], "--overlap: only for models of defects"),
        ([model, image, "--tile", "1"], "a tile of 1 pixels"),
        ([model, image, "--tile", "32", "--overlap", "20"], "share 0 to 16"),
        ([model, image, "--overlap", "4"], "--tile N"),
        ([model, tmp_path / "bad"], "none of the 1 images can be read"),
        ([model, image, "--out", tmp_path / "file"], "cannot be written to"),
    ]
    for arguments, message in cases:
        assert room.main([str(argument) for argument in arguments]) == 2, message
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said
    with pytest.raises(PredictorError, match="has no classes"):
        Predictor(model).accuracy(folder)


def test_bundle_runs_without_torch_and_zoo(model, task, folder, tmp_path):
    kit = bundle(model, tmp_path / "kit")
    assert "where the defects are" in (kit / "README.txt").read_text()
    blocked = "import sys\nfor name in ('torch', 'zoo', 'timm', 'onnx', 'lightning'): sys.modules[name] = None\n"
    code = f"{blocked}import runpy\nsys.argv = {['predictor.py', 'detector.onnx', str(folder), '--out', 'out']!r}\n"
    code += "runpy.run_path('predictor.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=kit, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    scores = [exact(task, path)[0] for path in sorted(folder.rglob("*.png"))]
    np.testing.assert_allclose([float(row["score"]) for row in rows(kit / "out")], scores, rtol=1e-4)


def test_checkpoint_predicts_like_its_export(model, task, folder, monkeypatch):
    tasks = pytest.importorskip("zoo.tasks", reason="needs the train extra")
    from zoo.export.checkpoint import CheckpointPredictor

    monkeypatch.setattr(tasks, "load_task", lambda path: (task, {"tile": 24, "tile_overlap": 6}))
    theirs = Predictor(model)
    theirs.output.use_tiles(24, 6)
    paths = sorted(folder.rglob("*.png"))
    for ours, other in zip(CheckpointPredictor("a.ckpt").predict(paths), theirs.predict(paths), strict=True):
        assert (ours.label, ours.map.shape) == (other.label, other.map.shape)
        np.testing.assert_allclose(ours.map, other.map, atol=1e-4 * other.map.max())


MEASURED = """
import sys
sys.argv = ['predictor.py', *sys.argv[1:]]
import predictor
status = predictor.main(sys.argv[1:])
print('PEAK', next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc, which Linux alone has"
)
@pytest.mark.parametrize("tiles", [[], ["--tile", "512"]], ids=["whole", "tiles"])
def test_large_images_in_little_memory(tmp_path, tiles):
    """Six photos of 3000 x 2000, with a bank of 20,000 places at 224 pixels: peak resident memory below 2 GB."""
    pytest.importorskip("timm")
    from zoo.heads import create_detector

    class Bank(TinyDetector):
        def __init__(self):
            super().__init__((224, 224))
            self.detector = create_detector("memory_bank", "tf_efficientnet_lite0", img_size=(224, 224))
            self.detector.update(torch.rand(1, 3, 224, 224))
            self.detector.finalize()
            # As many as a bank keeps at most; choosing them would take minutes.
            self.detector.head.bank = torch.randn(20_000, self.detector.head.bank.shape[1])
            self.eval()

        def inference(self, images):
            return self.detector((images - self.mean) / 0.3)

    path = to_onnx(Bank(), tmp_path / "m.onnx").path
    for number in range(6):
        Image.fromarray(picture(2000, 3000, number)).save(tmp_path / f"{number}.jpg")
    command = [sys.executable, "-c", MEASURED, path, *sorted(tmp_path.glob("*.jpg")), "--out", tmp_path / "o", *tiles]
    done = subprocess.run(
        [str(part) for part in command], cwd=Path(room.__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "o")) == 6
    peak = int(done.stdout.split("PEAK")[1])
    print(f"peak {peak / 1e6:.2f} GB")
    assert peak < 2_000_000  # kB


def test_bundle_of_bad_input(tmp_path):
    with pytest.raises(UsageError, match="there is no model file"):
        bundle(tmp_path / "none.onnx", tmp_path / "kit")
