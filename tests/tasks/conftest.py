"""A tiny, fully deterministic data module and task settings shared by the tests of this room."""

import importlib.util
import sys
from pathlib import Path

import pytest


def load_script(name: str):
    """Imports a helper of this folder by path: tests are no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def tiny():
    return load_script("tiny_run")


@pytest.fixture(autouse=True)
def clean_seed(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(scope="session")
def anomaly():
    return load_script("tiny_anomaly")


@pytest.fixture(scope="session")
def segmentation():
    return load_script("tiny_segmentation")
