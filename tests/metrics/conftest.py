"""Loads the slow answers that these tests compare with."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("metric_oracles", Path(__file__).with_name("oracles.py"))
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)


@pytest.fixture(scope="session")
def oracles():
    return module


def pytest_generate_tests(metafunc):
    if "distribution" in metafunc.fixturenames:
        metafunc.parametrize("distribution", module.DISTRIBUTIONS)
