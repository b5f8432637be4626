"""Order of samples as a function of (seed, epoch), and a loader that can start in the middle of an epoch."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data.distributed import DistributedSampler

from zoo.errors import UsageError


def mix(*parts: int | str) -> int:
    """A 63-bit number that looks random and depends on every part; neighbouring parts share nothing."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class EpochSampler(DistributedSampler):
    """Yields (epoch, index), so that a dataset in a long-lived worker knows the epoch of every sample.

    It is a DistributedSampler so that Lightning leaves it in place on several devices; around any other sampler it puts
    its own, which would divide the share of each process once more.

    Args:
        length: size of the dataset.
        seed: of the run.
        shuffle: whether the order changes with the epoch; otherwise it is 0, 1, 2, ... and epoch is always 0.
        rank, world: this process' share of a distributed run. A few samples are repeated where that makes all shares
            equal, in evaluation too: a process that is a batch short would leave the others waiting.
    """

    def __init__(self, length: int, seed: int = 0, shuffle: bool = True, rank: int = 0, world: int = 1):
        super().__init__(range(length), world, rank, shuffle, seed)  # type: ignore[arg-type]
        self.start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        start, self.start = self.start, 0
        epoch = self.epoch if self.shuffle else 0
        order = self.order(epoch)
        order += islice(cycle(tuple(order)), self.total_size - len(order))
        return iter([(epoch, index) for index in order[self.rank :: self.num_replicas][start:]])

    def order(self, epoch: int) -> list[int]:
        """Every index once, for all processes."""
        if not self.shuffle:
            return list(self.dataset)  # type: ignore[call-overload]
        generator = torch.Generator().manual_seed(mix("order", self.seed, epoch))
        return torch.randperm(len(self.dataset), generator=generator).tolist()  # type: ignore[arg-type]


class Unreadable(NamedTuple):
    """Takes the place of a sample that could not be read."""

    name: str
    reason: str


def split_key(key: tuple[int, int] | int) -> tuple[int, int]:
    """(epoch, index) of what a sampler gave; another one than `EpochSampler`, as Lightning's for overfit_batches, knows
    no epoch.
    """
    return key if isinstance(key, tuple) else (0, key)


def collate(samples: Sequence[Any]) -> tuple[Tensor, Tensor, list[Unreadable]]:
    """(images uint8 (B, C, H, W), targets int64 (B,), the samples that could not be read and are left out)."""
    bad = [sample for sample in samples if isinstance(sample, Unreadable)]
    good = [sample for sample in samples if not isinstance(sample, Unreadable)] if bad else samples
    if not good:
        return torch.empty(0), torch.empty(0, dtype=torch.int64), bad
    images = default_collate([image for image, _ in good])
    return images, torch.tensor([target for _, target in good], dtype=torch.int64), bad


class ResumableLoader(DataLoader):
    """Batches (images, targets), counted as they are handed out, so that a resumed epoch goes on after the last one.

    Lightning makes the iterator before it restores or announces the epoch, and after a checkpoint from the last batch
    goes on with the next epoch: so epoch and state are looked at only when the first batch is asked for, and a state
    is valid only for its own epoch.

    Args:
        on_unreadable: called with (name, reason) in the main process for every sample that could not be read.
        collate_batch: makes (images, targets, unreadable) of what the dataset gives.
        arguments: of torch's DataLoader; `sampler` is an `EpochSampler` (overfit_batches makes Lightning exchange it).
    """

    def __init__(
        self,
        *args: Any,
        on_unreadable: Callable[[str, str], None] | None = None,
        collate_batch: Callable[[Any], Any] = collate,
        **arguments: Any,
    ):
        super().__init__(*args, collate_fn=collate_batch, **arguments)
        self.on_unreadable = on_unreadable
        self._done = 0
        self._resumed = (-1, 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        epoch, done = self._resumed
        sampler: Any = self.sampler
        self._done = done if getattr(sampler, "epoch", None) == epoch else 0
        self._resumed = (-1, 0)
        if self._done:
            sampler.start = self._done * (self.batch_size or 1)
        nothing = not self._done
        for images, targets, unreadable in super().__iter__():
            self._done += 1
            for name, reason in unreadable:
                if self.on_unreadable is not None:
                    self.on_unreadable(name, reason)
            if len(targets):
                nothing = False
                yield images, targets
            elif getattr(sampler, "shuffle", False):  # no other image could take the place of this batch
                raise _none(unreadable[0])
        if nothing and self._done:
            raise _none(unreadable[0])

    def state_dict(self) -> dict[str, int]:
        return {"epoch": getattr(self.sampler, "epoch", 0), "done": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resumed = (state["epoch"], state["done"])


def _none(first: Unreadable) -> UsageError:
    return UsageError(f"none of these images can be read, such as {first.name}: {first.reason}")
