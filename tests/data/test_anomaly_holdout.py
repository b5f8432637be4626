"""Images held out, near copies of them included."""

import numpy as np
import pytest
from PIL import Image

from zoo.data import holdout
from zoo.data.anomaly_layouts import Photo
from zoo.data.holdout import group_alike, hold_out
from zoo.errors import UsageError

SCENES, VIEWS = 40, 3


@pytest.fixture
def series(tmp_path) -> list[Photo]:
    """40 scenes of smooth noise, each in 3 photos of another exposure and noise; those of a scene lie far apart."""
    rng = np.random.default_rng(0)
    photos = []
    scenes = [
        np.asarray(Image.fromarray(rng.random((12, 12)).astype(np.float32)).resize((70, 60), Image.Resampling.BICUBIC))
        for _ in range(SCENES)
    ]
    for view in range(VIEWS):
        for number, scene in enumerate(scenes):
            pixels = scene * (90 + 40 * view) + 20 * view + rng.normal(0, 3, scene.shape)
            path = tmp_path / f"{view}_{number:02d}.{'jpg' if view else 'png'}"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
            photos.append(Photo(str(path)))
    return photos


def scene_of(photo: Photo) -> str:
    return photo.path.rpartition("_")[2][:2]


def test_a_series_is_never_on_both_sides(series):
    rest, held = hold_out(series, 0.2, "val")
    assert sorted(rest + held) == sorted(series)
    assert 20 <= len(held) <= 24
    assert not {scene_of(p) for p in rest} & {scene_of(p) for p in held}
    assert len({scene_of(p) for p in held}) >= 6


def test_series_are_found_however_they_are_exposed(series):
    groups = group_alike(series, largest=VIEWS)
    assert sorted(map(len, groups)) == [VIEWS] * SCENES
    assert all(len({scene_of(series[n]) for n in group}) == 1 for group in groups)


def test_groups_stay_small_enough_and_hold_every_image_once(series):
    for largest in (0, 1, 2, 5, 1000):
        groups = group_alike(series, largest)
        assert max(map(len, groups)) <= max(largest, 1)
        assert sorted(n for group in groups for n in group) == list(range(len(series)))


def test_where_looking_takes_too_long_every_image_goes_alone(series, monkeypatch):
    monkeypatch.setattr(holdout, "_COSTLY", 1000.0)
    assert group_alike(series, 3) == [[n] for n in range(len(series))]
    rest, held = hold_out(series, 0.2, "val")
    assert len(held) == 24
    # What the grouping is for: a random share has its twins among the rest.
    assert {scene_of(p) for p in rest} & {scene_of(p) for p in held}


def test_the_same_images_every_time_and_damaged_ones_do_no_harm(series):
    first = hold_out(series, 0.2, "val")
    np.random.seed(5)
    assert hold_out(series, 0.2, "val") == first
    for photo in series[::7]:
        with open(photo.path, "wb") as file:
            file.write(b"no image")
    rest, held = hold_out(series, 0.2, "val")
    assert sorted(rest + held) == sorted(series)


@pytest.mark.parametrize(("images", "share", "held"), [(20, 0.1, 2), (20, 0.01, 1), (2, 0.1, 1), (10, 0.5, 5)])
def test_at_least_one_image_on_either_side(series, images, share, held):
    rest, apart = hold_out(series[:images], share, "val")
    assert (len(rest), len(apart)) == (images - held, held)


@pytest.mark.parametrize(("images", "share"), [(1, 0.1), (10, 0.96)])
def test_a_share_that_leaves_nothing(series, images, share):
    with pytest.raises(
        UsageError, match=f"share of {share} for val of {images} good images leaves nothing to train on"
    ):
        hold_out(series[:images], share, "val")
