"""Where the tests of Triton code run: on a GPU, or on the CPU in Triton's interpreter, at sizes that both can bear."""

import os

import pytest
import torch

from zoo.kernels import dispatch


@pytest.fixture
def triton_device():
    """The device whose tensors a Triton kernel takes here.

    Triton reads TRITON_INTERPRET when it is imported, so the interpreted run is a process of its own, which
    test_interpreter.py starts.
    """
    if not dispatch.HAS_TRITON:
        pytest.skip("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device (test_interpreter.py runs this on the CPU)")
    return "cuda"


@pytest.fixture
def poisoned(monkeypatch):
    """Every tensor that an implementation makes for its answer starts as NaN."""
    real = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: real(self, *a, **k).fill_(float("nan")))
