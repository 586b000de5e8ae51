"""Settings of every test: fixed seed, one thread, uninitialised memory full of NaN, our own warnings as errors."""

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error:::hf_engram")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
