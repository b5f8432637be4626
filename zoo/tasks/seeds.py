"""Randomness of a training step as a function of where the run is, so that no generator's state need be saved."""

import hashlib
import os

import torch


def run_seed() -> int:
    """The seed of the run, as Lightning's seed_everything leaves it for every process; 0 without one."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def seed_step(epoch: int, batch: int, rank: int) -> None:
    """Seeds torch's generators, of the CPU and of every GPU, for one batch: dropout and drop path draw from them."""
    # A hash keeps neighbouring batches, epochs and seeds from sharing streams; it costs a microsecond.
    digest = hashlib.blake2b(f"{run_seed()}/{epoch}/{batch}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
