"""The data module of anomaly detection: what it says of damaged files, masks that do not fit, and wrong values."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.data import AnomalyDetection
from zoo.errors import UsageError

from .anomalies import epoch_of, make


@pytest.mark.filterwarnings("ignore")
def test_an_empty_mask_of_a_defect_counts_as_none(mvtec):
    Image.new("L", (20, 24)).save(mvtec / "ground_truth" / "hole" / "01_mask.png")
    last = list(make(mvtec, batch_size=1).test_dataloader())[-1]
    assert (last["label"].item(), last["has_mask"].item()) == (1, False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("values", "size", "words"),
    [
        ([0, 255], (19, 24), r"01_mask\.png' has 24 x 19 pixels .*hole/01\.png' has 24 x 20"),
        ([0, 90, 255], (20, 24), r"01_mask\.png' is not binary"),
    ],
)
def test_a_mask_that_does_not_fit_stops_with_a_sentence(mvtec, workers, values, size, words):
    """Also from a worker, and although on_error is "skip"."""
    pixels = np.resize(np.array(values, np.uint8), (size[1], size[0]))
    Image.fromarray(pixels).save(mvtec / "ground_truth" / "hole" / "01_mask.png")
    with pytest.raises(UsageError, match=words) as caught:
        list(make(mvtec, num_workers=workers).test_dataloader())
    assert "Traceback" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_sizes_of_all_masks_are_compared_before_the_first_batch(mvtec):
    Image.new("L", (19, 24)).save(mvtec / "ground_truth" / "hole" / "01_mask.png")
    data = make(mvtec)
    with pytest.raises(UsageError, match=r"01_mask\.png' has 24 x 19 pixels"):
        data.test_dataloader()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"tile": 12, "img_size": 8}])
def test_damaged_images_are_left_out_named_and_counted(mvtec, workers, options):
    data = make(mvtec, num_workers=workers, **options)
    bad = epoch_of(make(mvtec).train_dataloader())[0]["path"][:2]
    for path in bad:
        Path(path).write_bytes(Path(path).read_bytes()[:50])
    seen = {path for batch in epoch_of(data.train_dataloader()) for path in batch["path"]}
    assert len(seen) == 16
    assert not seen & set(bad)
    assert sorted(data.skipped) == sorted(bad)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("ground_truth/hole/00_mask.png", r"hole/00\.png cannot be read: its mask .*00_mask\.png: .*"),
        ("test/good/01.png", r"good/01\.png cannot be read: .*--data.on_error skip"),
    ],
)
def test_damaged_images_and_masks_stop_when_asked_to(mvtec, file, words):
    path = mvtec / file
    path.write_bytes(path.read_bytes()[:60])
    data = make(mvtec)
    assert sum(len(batch["path"]) for batch in data.test_dataloader()) == 5
    assert len(data.skipped) == 1
    with pytest.raises(UsageError, match=words):
        list(make(mvtec, on_error="raise").test_dataloader())


@pytest.mark.filterwarnings("ignore")
def test_no_readable_image_is_a_plain_message(mvtec):
    for path in (mvtec / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    for tile in (None, 16):
        with pytest.raises(UsageError, match="none of these images can be read, such as"):
            list(make(mvtec, tile=tile).train_dataloader())


def test_roots_that_are_no_data(tmp_path, write):
    (tmp_path / "empty").mkdir()
    for root, words in (
        ("", r"give --data\.root FOLDER \(a folder with good images"),
        (tmp_path / "nowhere", "nowhere' does not exist"),
        (tmp_path / "empty", "no good images in .*empty'; it holds nothing"),
        (write({"good": 1}, name="one"), r"0\.1 for val of 1 good images leaves nothing to train on; add good images"),
    ):
        with pytest.raises(UsageError, match=words):
            make(root).train_dataloader()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("img_size", 0, "positive side"),
        ("in_chans", 2, "3 channels, or 1"),
        ("layout", "mvtex", "Did you mean 'mvtec'"),
        ("resize", "padd", "Did you mean 'pad'"),
        ("tile", 1, "at least 2"),
        ("batch_size", 0, "1 or more"),
        ("num_workers", -1, "0 or more"),
        ("val_split", 0.0, "between 0 and 1"),
        ("test_split", 1.0, "between 0 and 1"),
        ("on_error", "ignore", "Valid: raise, skip"),
        ("hflip", 1.5, "probability"),
        ("rotate", -1.0, "0 and 180"),
        ("brightness", 1.0, "between 0"),
    ],
)
def test_values_out_of_range(option, value, words):
    with pytest.raises(UsageError, match=words) as caught:
        AnomalyDetection("x", **{option: value})
    assert option in str(caught.value)


def test_overlap_out_of_range():
    with pytest.raises(UsageError, match="tile_overlap=20: tiles of 32 pixels share 0 to 16"):
        AnomalyDetection("x", tile=32, tile_overlap=20)
