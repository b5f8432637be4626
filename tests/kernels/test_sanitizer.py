"""compute-sanitizer sees no kernel read or write beyond its tensors, in one small case of each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoo.kernels.dispatch import OPS

from .small_cases import CASES, arguments, run

HERE = Path(__file__).resolve().parent
# CUDA's own folder is often on no path.
TOOL = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def test_every_kernel_has_a_case_that_it_takes():
    assert set(CASES) == set(OPS)
    for op in CASES:
        run(op, "cpu", torch.float32, "reference")
        assert OPS[op].unsupported(*arguments(op, "cpu", torch.bfloat16)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, whose memory compute-sanitizer watches")
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer, which comes with the CUDA toolkit, is not here")
@pytest.mark.parametrize("op", CASES)
def test_no_kernel_leaves_its_tensors(op):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(HERE.parents[1])])}
    # Without torch's cache, every tensor is memory of its own, and what lies beyond it is seen.
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    program = [sys.executable, str(HERE / "small_cases.py"), op, "cuda"]
    command = [TOOL, "--tool", "memcheck", "--error-exitcode", "3", *program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"ran {op}" in done.stdout
    assert "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr
