"""Settings of every test: fixed seed, one thread, uninitialised memory full of NaN."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_stand_in import FreshPython, StandInHub

ROOT = Path(__file__).parent.parent

DATA_FOLDERS = ("HF_ENGRAM_DATA", "HF_ENGRAM_REFERENCE")


def pytest_configure(config):
    for name in DATA_FOLDERS:
        if name in os.environ and not Path(os.environ[name]).is_dir():
            raise pytest.UsageError(f"{name} is {os.environ[name]!r}; allowed: a folder (CONTRIBUTING.md).")
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


@pytest.fixture(scope="session")
def hub():
    """A Hugging Face Hub on this machine, with nothing on it but what tests push."""
    hub = StandInHub()
    yield hub
    hub.close()


@pytest.fixture
def hub_api(hub, monkeypatch):
    """The client of huggingface_hub in this process, which may be set to be offline, for the Hub on this machine."""
    settings = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    return huggingface_hub.HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture(scope="session")
def installed_package(tmp_path_factory):
    """A folder with hf_engram as `pip install` of its wheel leaves it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "hf_engram", source / "hf_engram", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    return target


@pytest.fixture
def fresh_python(hub, tmp_path, installed_package):
    """Runs code in a new process that knows the Hub, but neither the source tree nor, unless asked, hf_engram."""
    return FreshPython(hub, tmp_path, installed_package)
