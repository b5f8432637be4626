"""Tiles cover an image, share what they should, and their maps join without a seam."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from zoo.data import tiling
from zoo.errors import UsageError

SIZES = [(90, 75), (33, 64), (20, 100), (10, 7), (48, 48)]


@pytest.mark.parametrize(("length", "tile", "overlap"), [(3000, 224, 56), (225, 224, 0), (448, 224, 112), (1000, 7, 3)])
def test_starts_cover_with_the_fewest_tiles_that_share_enough(length, tile, overlap):
    found = tiling.starts(length, tile, overlap)
    assert (found[0], found[-1] + tile) == (0, length)
    assert min(a + tile - b for a, b in itertools.pairwise(found)) >= overlap
    # One tile fewer would leave less than `overlap` somewhere: n tiles reach n * tile - (n - 1) * overlap at most.
    fewer = len(found) - 1
    assert fewer * tile - (fewer - 1) * overlap < length
    gaps = np.diff(found)
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [0, 5, 16])
def test_a_picture_cut_and_blended_is_the_picture(size, overlap):
    image = torch.rand(2, 3, *size, dtype=torch.float64).float()
    tiles = tiling.split(image, 32, overlap)
    assert tiles.shape[-2:] == (32, 32)
    # Weights sum to 1 up to the rounding of float32.
    torch.testing.assert_close(tiling.blend(tiles, size, overlap), image, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_blend_against_a_loop_over_pixels(size):
    tile, overlap = 32, 10
    places = tiling.places(size, tile, overlap)
    values = torch.rand(1, len(places), 1, tile, tile)
    expected = np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            total = weight = 0.0
            for number, (top, left) in enumerate(places):
                v, u = y - top, x - left
                if 0 <= v < tile and 0 <= u < tile:
                    share = min(1, (min(v, tile - 1 - v) + 0.5) / overlap)
                    share *= min(1, (min(u, tile - 1 - u) + 0.5) / overlap)
                    total += share * float(values[0, number, 0, v, u])
                    weight += share
            expected[y, x] = total / weight
    # float32 sums of at most a few terms, each below 1
    assert np.abs(tiling.blend(values, size, overlap)[0, 0].numpy() - expected).max() < 1e-6


def test_small_image_goes_on_with_its_last_pixels():
    image = torch.arange(12.0).view(1, 1, 3, 4)
    (tile,) = tiling.split(image, 6, 2)[0]
    assert np.array_equal(tile[0].numpy(), np.pad(image[0, 0].numpy(), ((0, 3), (0, 2)), mode="edge"))


def test_blend_has_no_step_at_a_seam():
    """Two tiles that disagree by 1: the blend crosses over in steps of at most one part of the overlap."""
    places = tiling.places((64, 112), 64, 16)
    assert places == [(0, 0), (0, 48)]
    tiles = torch.stack([torch.zeros(1, 64, 64), torch.ones(1, 64, 64)])[None]
    row = tiling.blend(tiles, (64, 112), 16)[0, 0, 32]
    assert row[:48].max() == 0
    assert row[64:].min() == 1
    assert float(row.diff().max()) < 1.01 / 16
    assert float(row.diff().min()) >= 0


def test_blend_refuses_another_number_of_tiles():
    with pytest.raises(ValueError, match=r"has 6 tiles of 32 pixels, not 3"):
        tiling.blend(torch.zeros(1, 3, 1, 32, 32), (90, 64), 0)


def test_inspection_takes_the_largest_score_and_brings_maps_back():
    """A detector whose map is its input and whose score is the input's largest value, at half the size of a tile."""
    image = torch.rand(1, 1, 70, 50)
    calls = []

    def detector(tiles):
        calls.append(tuple(tiles.shape))
        return tiles.amax((1, 2, 3)), tiles

    score, heat = tiling.inspect_by_tiles(detector, image, 32, 8, (16, 16), batch_size=4)
    halves = [
        F.interpolate(tiling.cut(image, place, 32), (16, 16), mode="bilinear", antialias=True)
        for place in tiling.places((70, 50), 32, 8)
    ]
    assert [shape[0] for shape in calls] == [4, 2]
    assert {shape[1:] for shape in calls} == {(1, 16, 16)}
    assert score.tolist() == [max(float(half.max()) for half in halves)]
    back = torch.stack([F.interpolate(half, (32, 32), mode="bilinear")[0] for half in halves])
    torch.testing.assert_close(heat, tiling.blend(back[None], (70, 50), 8), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(5, 1), (1, 5), (1, 1), (37, 1), (5, 2), (11, 13), (80, 90)])
def test_resizing_is_pillows(size):
    """With places and weights in float32. One column is its own case: torch reads wrong pixels there."""
    pixels = torch.rand(2, 3, 37, 50, generator=torch.Generator().manual_seed(0))
    ours = tiling.resize(pixels, size)
    assert ours.shape == (2, 3, *size)
    for one, other in zip(pixels.flatten(0, 1), ours.flatten(0, 1), strict=True):
        want = Image.fromarray(one.numpy()).resize((size[1], size[0]), Image.Resampling.BILINEAR)
        assert abs(np.asarray(want) - other.numpy()).max() < 1e-5


def test_inspection_of_bytes_is_that_of_fractions():
    image = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8)
    one, two = (
        tiling.inspect_by_tiles(lambda t: (t.mean((1, 2, 3)), t[:, :1]), pixels, 32, 8, (32, 32))
        for pixels in (image, image.float() / 255)
    )
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


@pytest.mark.parametrize(
    ("tile", "overlap", "words"), [(1, None, "at least 2"), (32, 17, "0 to 16"), (32, -1, "0 to 16")]
)
def test_tilings_that_are_none(tile, overlap, words):
    with pytest.raises(UsageError, match=words):
        tiling.check_tiles(tile, overlap)


def test_overlap_is_a_quarter_unless_given():
    assert tiling.check_tiles(224, None) == (224, 56)
    assert tiling.check_tiles(224, 0) == (224, 0)


def test_same_tiles_as_the_predictor_that_needs_no_torch():
    predictor = pytest.importorskip("zoo.export.predictor")
    for length in (30, 224, 225, 999, 3000):
        for tile, overlap in ((224, 56), (64, 0), (100, 50)):
            assert tiling.starts(length, tile, overlap) == predictor.tile_starts(length, tile, overlap)
            ramp = predictor.tile_ramp(tile, overlap)
            assert np.array_equal(tiling.window(tile, overlap).numpy(), ramp[:, None] * ramp)
