"""The same batches whatever the number of workers, and going on in the middle of an epoch."""

import pytest
import torch

from zoo.data import ImageClassification
from zoo.data.sampler import EpochSampler, mix

SHAKEN = {"auto_augment": "rand-m9-mstd0.5", "color_jitter": 0.4, "vflip": 0.5, "val_split": 0.2}


@pytest.fixture
def root(write):
    return write({"train/a": 9, "train/b": 9})


def make(root, **options):
    return ImageClassification(str(root), **({"img_size": 8, "batch_size": 4, "num_workers": 0} | SHAKEN | options))


def epoch_of(loader, epoch: int = 0):
    loader.sampler.set_epoch(epoch)
    return [(images.clone(), targets.clone()) for images, targets in loader]


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers_even_in_their_second_epoch(root, workers):
    alone, helped = make(root).train_dataloader(), make(root, num_workers=workers).train_dataloader()
    for epoch in range(2):
        torch.manual_seed(100 * workers + epoch)  # the state of the main process has no say
        assert same(epoch_of(alone, epoch), epoch_of(helped, epoch))


def test_another_epoch_or_seed_gives_other_batches_and_the_same_epoch_the_same(root):
    loader = make(root).train_dataloader()
    first = epoch_of(loader, 0)
    assert not same(first, epoch_of(loader, 1))
    assert not same(first, epoch_of(make(root, seed=1).train_dataloader(), 0))
    assert same(first, epoch_of(loader, 0))


def test_augmentation_of_one_image_changes_with_the_epoch(root):
    images = make(root).train_dataloader().dataset
    assert torch.equal(images[0, 3][0], images[0, 3][0])
    assert not torch.equal(images[0, 3][0], images[1, 3][0])
    assert not torch.equal(images[0, 3][0], make(root, seed=1).train_dataloader().dataset[0, 3][0])


def test_validation_is_the_same_every_time(root):
    loader = make(root, num_workers=2).val_dataloader()
    assert same(epoch_of(loader, 0), epoch_of(loader, 5))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_a_new_loader_goes_on_with_exactly_the_remaining_batches(root, workers, done):
    whole = epoch_of(make(root).train_dataloader(), 3)
    assert len(whole) == 3  # 14 images in batches of 4, the rest is dropped
    stopped = make(root, num_workers=workers).train_dataloader()
    stopped.sampler.set_epoch(3)
    batches = iter(stopped)
    for _ in range(done):
        next(batches)
    state = stopped.state_dict()
    assert state == {"epoch": 3, "done": done}
    resumed = make(root, num_workers=workers).train_dataloader()
    resumed.load_state_dict(state)
    assert same(epoch_of(resumed, 3), whole[done:])
    assert same(epoch_of(resumed, 4), epoch_of(make(root).train_dataloader(), 4))


def test_state_after_a_resumed_part_counts_from_the_start_of_the_epoch(root):
    whole = epoch_of(make(root).train_dataloader(), 0)
    loader = make(root).train_dataloader()
    loader.load_state_dict({"epoch": 0, "done": 1})
    next(iter(loader))
    assert loader.state_dict() == {"epoch": 0, "done": 2}
    last = make(root).train_dataloader()
    last.load_state_dict(loader.state_dict())
    assert same(epoch_of(last), whole[2:])


def test_state_of_another_epoch_is_ignored(root):
    loader = make(root).train_dataloader()
    loader.load_state_dict({"epoch": 2, "done": 2})
    assert same(epoch_of(loader, 3), epoch_of(make(root).train_dataloader(), 3))


@pytest.mark.filterwarnings("ignore:left out")
def test_damaged_images_do_not_shift_what_a_resumed_loader_sees(root):
    for file in sorted((root / "train" / "a").iterdir())[:5]:
        file.write_bytes(b"damaged")
    whole = epoch_of(make(root, batch_size=2).train_dataloader())
    stopped = make(root, batch_size=2).train_dataloader()
    batches = iter(stopped)
    next(batches)
    next(batches)
    resumed = make(root, batch_size=2).train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    rest = epoch_of(resumed)
    assert rest
    assert same(rest, whole[2:])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("length", "world"), [(10, 1), (10, 2), (10, 3), (3, 3), (3, 8), (1, 4)])
def test_ranks_share_the_data_in_equal_parts(length, world, shuffle):
    samplers = [EpochSampler(length, 5, shuffle, rank, world) for rank in range(world)]
    parts = [[index for _, index in sampler] for sampler in samplers]
    share = -(-length // world)
    assert [len(part) for part in parts] == [len(sampler) for sampler in samplers] == [share] * world
    counts = [sum(part.count(index) for part in parts) for index in range(length)]
    assert min(counts) == share * world // length  # 1, or more where there are fewer images than processes
    assert max(counts) - min(counts) <= 1


def test_shuffled_order_is_a_permutation_with_its_epoch():
    sampler = EpochSampler(50, seed=1)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        pairs = list(sampler)
        assert {one for one, _ in pairs} == {epoch}
        orders.append([index for _, index in pairs])
        assert sorted(orders[-1]) == list(range(50))
    assert orders[0] != orders[1] != list(range(50))
    sampler.set_epoch(0)
    assert [index for _, index in sampler] == orders[0]


def test_unshuffled_order_is_that_of_the_data():
    sampler = EpochSampler(5, shuffle=False)
    sampler.set_epoch(3)
    assert list(sampler) == [(0, index) for index in range(5)]


def test_mix_depends_on_every_part_and_on_nothing_else():
    assert mix("order", 1, 2) == mix("order", 1, 2)
    numbers = {
        mix(*parts) for parts in [("order", 1, 2), ("sample", 1, 2), ("order", 2, 1), ("order", 12), ("order", -1)]
    }
    assert len(numbers) == 5
    assert all(0 <= number < 2**63 for number in numbers)
