"""The tests of Triton code on the CPU, in a process where Triton interprets its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.kernels import dispatch

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="triton is not installed")
# On a GPU all of them take seconds; the interpreter needs more than ten for some, which are marked so.
@pytest.mark.parametrize("which", ["gpu and not slow", pytest.param("gpu and slow", marks=pytest.mark.slow)])
def test_triton_code_in_its_interpreter(which):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(HERE.parents[1])])
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", str(HERE), "-m", which, "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist"]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    # What stays skipped needs a real GPU; nothing may be skipped for want of the interpreter.
    assert "test_interpreter.py runs this" not in done.stdout
    assert " passed" in done.stdout.splitlines()[-1]
