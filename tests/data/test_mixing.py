"""What happens to a batch on the device: mixup, cutmix, erasing."""

import numpy as np
import pytest
import torch

from zoo.data import ImageClassification

MIXED = [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}]


@pytest.fixture
def make(write):
    root = write({"train/a": 5, "train/b": 5, "train/c": 5, "val/a": 1, "val/b": 1, "val/c": 1})
    return lambda **options: ImageClassification(str(root), img_size=16, num_workers=0, **options)


def batch(count: int = 6):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (count, 3, 16, 16), generator=generator).to(torch.uint8), torch.arange(count) % 3


@pytest.mark.parametrize("options", MIXED)
@pytest.mark.parametrize("count", [6, 5, 1])
def test_mixed_targets_sum_to_one_and_images_stay_in_range(make, running, options, count):
    data = make(**options)
    data.trainer = running()
    images, targets = data.on_after_batch_transfer(batch(count), 0)
    assert images.shape == (count, 3, 16, 16)
    assert (targets.shape, targets.dtype) == ((count, 3), torch.float32)
    # Two or three float32 numbers below 1 are added: an error of at most a few times 2**-24.
    torch.testing.assert_close(targets.sum(1), torch.ones(count), rtol=0, atol=1e-6)
    assert images.min() >= 0
    assert images.max() <= 1 + 1e-6  # mixup adds two rounded products
    if count == 5:  # the odd one stays as it is
        assert torch.equal(images[4], batch(5)[0][4] / 255)
        assert targets[4].tolist() == [0, 1, 0]


def test_mixup_is_a_weighted_sum_of_a_pair_with_the_weights_of_its_targets(make, running):
    data = make(mixup=0.8)
    data.trainer = running()
    raw, labels = batch(6)
    images, targets = data.on_after_batch_transfer((raw, labels), 0)
    plain = raw.double() / 255
    weight = targets[0, labels[0]].double()  # labels 0 and 2 of the pair (0, 5) differ
    assert 0 < weight < 1
    expected = weight * plain + (1 - weight) * plain.flip(0)
    # float32 products and sums of numbers up to 1
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-6)


def test_cutmix_pastes_a_box_whose_share_is_in_the_targets(make, running):
    data = make(cutmix=1.0)
    data.trainer = running(batch=1)
    raw, labels = batch(6)
    images, targets = data.on_after_batch_transfer((raw, labels), 0)
    own, other = raw[0].float() / 255, raw[5].float() / 255
    pasted = (images[0] != own).any(0)
    assert 0 < pasted.sum() < 256
    assert torch.equal(images[0][:, pasted], other[:, pasted])
    # The two pictures are noise, so a pixel is equal in all three channels by chance with probability 256**-3.
    assert targets[0, labels[5]].item() == pytest.approx(pasted.sum().item() / 256, abs=1e-6)


@pytest.mark.parametrize("options", [*MIXED, {"re_prob": 1.0, "re_mode": "pixel"}])
def test_mixing_is_a_function_of_seed_epoch_batch_and_rank(make, running, options):
    def mixed(seed=0, **place):
        data = make(seed=seed, **options)
        data.trainer = running(**place)
        return data.on_after_batch_transfer(batch(), 0)[0]

    first = mixed()
    torch.manual_seed(999)
    np.random.seed(5)
    assert torch.equal(first, mixed())
    for other in (mixed(seed=1), mixed(epoch=1), mixed(batch=1), mixed(rank=1)):
        assert not torch.equal(first, other)


@pytest.mark.parametrize("options", [*MIXED, {"re_prob": 1.0}])
def test_validation_is_neither_mixed_nor_erased(make, running, options):
    data = make(**options)
    data.trainer = running(training=False)
    raw, labels = batch()
    images, targets = data.on_after_batch_transfer((raw, labels), 0)
    assert torch.equal(images, raw / 255)
    assert torch.equal(targets, labels)


def test_mixing_is_off_without_probability(make, running):
    data = make(mixup=0.8, mixup_prob=0.0)
    data.trainer = running()
    raw, labels = batch()
    images, targets = data.on_after_batch_transfer((raw, labels), 0)
    assert torch.equal(images, raw / 255)
    assert torch.equal(targets, labels)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_changes_a_box_of_training_images_alone(make, running, mode):
    data = make(re_prob=1.0, re_mode=mode)
    data.trainer = running()
    raw, labels = batch()
    images, targets = data.on_after_batch_transfer((raw, labels), 0)
    assert torch.equal(targets, labels)
    assert images.min() >= 0
    assert images.max() <= 1
    # Pixels outside the box go through (x - mean) / std * std + mean in float32: a few times 2**-24 off.
    changed = ((images - raw / 255).abs() > 1e-5).any(1)
    for one in changed:
        rows, columns = one.any(1).nonzero(), one.any(0).nonzero()
        height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert 0 < height * width < 16 * 16
        # Noise equals what replaces it in all channels hardly ever: the box is solid.
        assert one.sum() == height * width
