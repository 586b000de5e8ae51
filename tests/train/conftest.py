from pathlib import Path

import datasets
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def repository_root(monkeypatch):
    """Configs name their files from the root of the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """A cache of our own, so that nothing left by another run is read."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("datasets")
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    yield folder
    patch.undo()
