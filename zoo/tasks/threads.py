"""Keeps the threads of a network on the CPU and the processes that read its images off each other's cores."""

import os

import torch


def share_cores(workers: int) -> None:
    """Leaves one core to each reading process; never raises the number of threads that is set.

    More threads than free cores do not share the time: each parallel piece waits for its last thread, and training
    can be ten times slower than with one thread.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(min(torch.get_num_threads(), max(1, cores - workers)))
