"""Settings of every test: fixed seed, one thread, uninitialised memory full of NaN."""

import os

import pytest
import torch

DATA_FOLDERS = ("HF_ENGRAM_DATA", "HF_ENGRAM_REFERENCE")


def pytest_configure(config):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items):
    missing = [name for name in DATA_FOLDERS if name not in os.environ]
    if missing:
        skip = pytest.mark.skip(reason=f"needs real data: set {' and '.join(missing)} (CONTRIBUTING.md)")
        for item in items:
            if item.get_closest_marker("data"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
