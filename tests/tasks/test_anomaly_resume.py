"""A detector's run that is cut anywhere and resumed ends with the same bits as one that was not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Update -> method: inside an epoch, and at the end of one. 6 updates an epoch; a bank has one epoch.
CUTS = [("l2bt", 3), pytest.param("l2bt", 10, marks=pytest.mark.slow), ("memory_bank", 3)]


def program(anomaly, folder, *arguments):
    root = Path(__file__).parents[2]
    command = [sys.executable, anomaly.__file__, str(folder), *arguments]
    environment = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def content(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, anomaly):
    """Method -> the run folder of an uninterrupted run in this process, without workers."""
    folders = {}
    for method in ("l2bt", "memory_bank"):
        folders[method] = tmp_path_factory.mktemp(method)
        anomaly.fitted(folders[method], method, callbacks=anomaly.run_callbacks(folders[method]))
    return folders


@pytest.mark.parametrize(("method", "batches"), CUTS)
def test_killed_and_resumed_equals_uninterrupted(method, batches, whole, tmp_path, anomaly):
    killed = program(anomaly, tmp_path, method, "die", str(batches))
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert 0 < content(tmp_path)["global_step"] <= batches
    resumed = program(anomaly, tmp_path, method, "resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    expected, got = content(whole[method]), content(tmp_path)
    assert got["global_step"] == expected["global_step"] == 6 * anomaly.epochs(method)
    different = anomaly.differing(expected["state_dict"], got["state_dict"])
    assert not different, f"{len(different)} of {len(expected['state_dict'])} differ, first {different[:3]}"
    for index, moments in expected["optimizer_states"][0]["state"].items():
        other = got["optimizer_states"][0]["state"][index]
        assert all(torch.equal(v, other[k]) for k, v in moments.items() if isinstance(v, torch.Tensor))
