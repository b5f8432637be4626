"""Where the tests of Triton code run: on a GPU, or on the CPU in Triton's interpreter, at sizes that both can bear."""

import os

import pytest
import torch

from zoo.kernels import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _masks_are_bool() -> None:
    """Triton 3.9's interpreter spreads a bool over a block as int32, and then refuses that as a mask.

    The types of the language, which a GPU's code is made from, stay right; the numbers are 0 and 1.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        real = getattr(InterpreterBuilder, name)

        def told(self, *args, real=real, place=place):
            args[place].data = args[place].data.astype(bool)
            return real(self, *args)

        setattr(InterpreterBuilder, name, told)


if INTERPRETED and dispatch.HAS_TRITON:
    _masks_are_bool()


@pytest.fixture
def triton_device():
    """The device whose tensors a Triton kernel takes here.

    Triton reads TRITON_INTERPRET when it is imported, so the interpreted run is a process of its own, which
    test_interpreter.py starts.
    """
    if not dispatch.HAS_TRITON:
        pytest.skip("triton is not installed")
    if INTERPRETED:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device (test_interpreter.py runs this on the CPU)")
    return "cuda"


@pytest.fixture
def poisoned(monkeypatch):
    """Every tensor that an implementation makes for its answer starts as NaN."""
    real = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: real(self, *a, **k).fill_(float("nan")))
