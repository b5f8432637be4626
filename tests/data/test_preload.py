"""Images kept in memory: the same pixels as the files, cropped as the arithmetic says, resumable like any loader."""

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data import ImageClassification
from zoo.data.preload import random_crop_flip
from zoo.errors import UsageError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{number}.png")
    return tmp_path


def module(folder, **options):
    defaults = {"preload": True, "img_size": 8, "batch_size": 4, "num_workers": 0, "val_split": 0.2}
    return ImageClassification(str(folder), **(defaults | options))


def test_pixels_are_those_of_the_files(folder):
    data = module(folder)
    loader = data.train_dataloader()
    files = {np.asarray(Image.open(path)).tobytes() for path in folder.rglob("*.png")}
    seen = [image.permute(1, 2, 0).numpy().tobytes() for images, _ in loader for image in images]
    assert len(seen) == len(set(seen)) == 16
    assert set(seen) <= files


def test_resumes_with_the_batches_that_are_left(folder):
    whole = [targets.tolist() + images.flatten().tolist() for images, targets in module(folder).train_dataloader()]
    first = module(folder).train_dataloader()
    batches = iter(first)
    next(batches)
    second = module(folder).train_dataloader()
    second.load_state_dict(first.state_dict())
    assert [t.tolist() + i.flatten().tolist() for i, t in second] == whole[1:]


def test_the_whole_image_is_itself_and_its_mirror():
    images = torch.rand(3, 3, 6, 9)
    whole = {"scale": (1.0, 1.0), "ratio": (1.5, 1.5), "seed": 1, "size": (6, 9)}
    # Pixels are looked up at their own centres; float32 noise of the grid remains.
    same = random_crop_flip(images, hflip=0.0, bicubic=True, **whole)
    torch.testing.assert_close(same, images, rtol=0, atol=1e-4)
    mirrored = random_crop_flip(images, hflip=1.0, bicubic=False, **whole)
    torch.testing.assert_close(mirrored, images.flip(3), rtol=0, atol=1e-4)


def test_crops_lie_inside_and_cover_the_asked_for_area():
    """On a ramp of x and y, bilinear interpolation tells where a crop lies: its slope is its size."""
    side = 64
    ramp = (torch.arange(side) + 0.5) / side
    images = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side)]).expand(500, 2, -1, -1)
    out = random_crop_flip(images.contiguous(), (16, 16), (0.25, 0.5), (0.5, 2.0), 0.0, False, 3)
    width = (out[:, 0, 8, 12] - out[:, 0, 8, 4]) * 2
    height = (out[:, 1, 12, 8] - out[:, 1, 4, 8]) * 2
    area = width * height
    # Float32 interpolation of values up to 1.
    assert area.min() > 0.25 - 1e-3
    assert area.max() < 0.5 + 1e-3
    assert (width / height).min() > 0.5 - 1e-2
    assert (width / height).max() < 2 + 2e-2
    left = out[:, 0, 8, 8] - width * 17 / 32
    assert left.min() > -1e-3
    assert (left + width).max() < 1 + 1e-3
    # Uniform in area: the mean of 500 draws from [0.25, 0.5] has a standard error of 0.0032.
    assert abs(area.mean() - 0.375) < 0.015


def test_a_function_of_the_seed_alone(folder):
    data = module(folder, scale=(0.3, 1.0))
    images, targets = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    first, again, other = (data.augment(images, targets, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_images_of_several_sizes_are_refused(folder):
    # More of them than are held out for validation.
    for number in range(3):
        Image.new("RGB", (9, 8)).save(folder / "train" / "a" / f"wide{number}.png")
    with pytest.raises(UsageError, match=r"8 x 8, 8 x 9; use --data\.preload false"):
        module(folder, val_split=0.05).train_dataloader()


def test_unreadable_images_are_named(folder):
    for number in range(3):
        (folder / "train" / "a" / f"broken{number}.png").write_bytes(b"no image")
    data = module(folder, val_split=0.05)
    # 13 and 10 images, one of each class held out.
    assert len(data.train_dataloader().dataset) + len(data.skipped) == 21
    assert 2 <= len(data.skipped) <= 3
    with pytest.raises(UsageError, match=r"broken\d\.png cannot be read"):
        module(folder, val_split=0.05, on_error="raise").train_dataloader()


def test_what_preload_cannot_do_is_refused(folder):
    with pytest.raises(UsageError, match="preload does not do color_jitter"):
        module(folder, color_jitter=0.4)
