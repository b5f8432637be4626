"""Shared test setup: one thread a process, so that two workers share two cores fairly, and a seed for every test."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
