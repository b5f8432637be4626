"""The bundled images are what the tool draws, and are of use: balanced, not too easy, masks where defects are."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "data" / "samples"
CLASSES = ["blots", "bricks", "checks", "dots", "rings", "stripes"]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_samples", ROOT / "tools" / "make_samples.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fresh(tool, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    assert tool.main([str(folder)]) == 0
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_bundled_files_are_what_the_tool_draws(fresh):
    assert files(SAMPLES) == files(fresh)
    for name in files(fresh):
        if name.endswith(".txt"):
            assert (SAMPLES / name).read_bytes() == (fresh / name).read_bytes()
            continue
        ours, drawn = pixels(SAMPLES / name), pixels(fresh / name)
        # Exact: the seed decides every draw, and encoder and decoder are those of one Pillow.
        assert np.array_equal(ours, drawn), name


def test_some_bundled_files_are_the_same_bytes(fresh):
    for name in (
        "classification/val/dots/000.jpg",
        "anomaly/fabric/test/blob/003.jpg",
        "segmentation/train/masks/007.png",
    ):
        assert (SAMPLES / name).read_bytes() == (fresh / name).read_bytes()


def test_tool_does_not_write_into_a_folder_that_holds_something(tool, tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(SystemExit) as stopped:
        tool.main([str(tmp_path)])
    assert stopped.value.code == 2
    assert "not empty" in capsys.readouterr().err
    assert files(tmp_path) == ["mine"]


def test_size_is_at_most_3_megabytes():
    assert sum((SAMPLES / name).stat().st_size for name in files(SAMPLES)) <= 3_000_000


def test_classification_is_balanced_with_at_least_120_validation_images():
    for split, count in (("train", 120), ("val", 30)):
        folder = SAMPLES / "classification" / split
        assert sorted(path.name for path in folder.iterdir()) == CLASSES
        assert {len(list((folder / name).iterdir())) for name in CLASSES} == {count}
    assert 30 * len(CLASSES) >= 120


def test_no_image_is_there_twice():
    contents = [path.read_bytes() for path in (SAMPLES / "classification").rglob("*.jpg")]
    assert len(set(contents)) == len(contents) == 900


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_pixels_alone_do_not_tell_the_class():
    sets = []
    for split in ("train", "val"):
        paths = [
            (path, label)
            for label, name in enumerate(CLASSES)
            for path in sorted((SAMPLES / "classification" / split / name).iterdir())
        ]
        flat = np.stack([pixels(path).reshape(-1) for path, _ in paths]).astype(np.float32) / 255
        sets.append((flat, np.array([label for _, label in paths])))
    (x, y), (val_x, val_y) = sets
    # The weights lie in the span of the training images, and turning the space changes neither their norm nor the
    # answers: the same regression as on 12,288 pixels in 720 coordinates, many times faster.
    x, val_x = x.astype(np.float64) - 0.5, val_x.astype(np.float64) - 0.5
    with threadpool_limits(1):  # threads that wait for a busy core make this many times slower
        values, vectors = np.linalg.eigh(x @ x.T)
        turn = x.T @ (vectors / np.sqrt(values))
        model = LogisticRegression(max_iter=60).fit(x @ turn, y)
    assert model.score(x @ turn, y) > 0.9  # so it has learnt what it can
    accuracy = model.score(val_x @ turn, val_y)
    print(f"logistic regression on the pixels: {accuracy:.1%}")
    assert accuracy < 0.6


def test_anomaly_masks_lie_on_the_defects(tool):
    root = SAMPLES / "anomaly" / "fabric"
    assert files(root / "train")[0].startswith("good/")
    assert {name.split("/")[0] for name in files(root / "train")} == {"good"}
    areas = []
    for kind in ("blob", "dent", "scratch"):
        images = [path.stem for path in sorted((root / "test" / kind).iterdir())]
        assert [path.stem for path in sorted((root / "ground_truth" / kind).iterdir())] == [f"{n}_mask" for n in images]
        for name in images:
            image, mask = (
                pixels(root / "test" / kind / f"{name}.jpg"),
                pixels(root / "ground_truth" / kind / f"{name}_mask.png"),
            )
            assert mask.shape == image.shape[:2] == (128, 128)
            assert set(np.unique(mask)) == {0, 255}
            areas.append((mask > 0).mean())
    assert not (root / "ground_truth" / "good").exists()
    assert max(areas) > 20 * min(areas)  # very different sizes


def test_defect_images_differ_from_good_ones_only_under_their_mask(tool):
    for kind in tool.DEFECTS:
        good = tool.weave(np.random.default_rng(4))
        spoilt, mask = tool.spoil(np.random.default_rng(5), good, kind)
        changed = (np.asarray(spoilt) != np.asarray(good)).any(2)
        inside = np.asarray(mask) > 0
        assert not changed[~inside].any()
        # A dent fades out towards its rim, and a pixel may already have the colour of the defect.
        assert changed[inside].mean() > 0.9


def test_segmentation_masks_are_class_numbers_of_the_images():
    root = SAMPLES / "segmentation"
    names = (root / "classes.txt").read_text().split()
    assert names == ["background", "disc", "bar", "triangle"]
    for split, count in (("train", 48), ("val", 16)):
        images, masks = ([p.stem for p in sorted((root / split / kind).iterdir())] for kind in ("images", "masks"))
        assert images == masks
        assert len(images) == count
        seen = set()
        for name in masks:
            mask = pixels(root / split / "masks" / f"{name}.png")
            assert mask.shape == pixels(root / split / "images" / f"{name}.jpg").shape[:2] == (96, 96)
            seen |= set(np.unique(mask).tolist())
        assert seen == {0, 1, 2, 3}
