"""Weights come from safetensors; a pickle is refused, unopened, with the way to convert it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import MODEL_CLASSES, same, tiny_inputs, tiny_model
from test_auto_classes import AUTO_CLASSES, first
from transformers import AutoModelForCausalLM

from hf_engram import EnnForCausalLM


class Payload:
    """What opening this pickle would do."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def pickled(tmp_path):
    """A folder whose weights are a pickle that makes a folder when it is opened."""
    tiny_model().config.save_pretrained(tmp_path)
    torch.save({"weights": Payload(str(tmp_path / "ran"))}, tmp_path / "pytorch_model.bin")
    return tmp_path


@pytest.mark.parametrize("opener", [AutoModelForCausalLM, EnnForCausalLM], ids=lambda opener: opener.__name__)
def test_pickled_weights_are_refused_unopened(pickled, opener):
    with pytest.raises(OSError, match=r"holds pickled weights \(pytorch_model.bin\).*load safetensors only"):
        opener.from_pretrained(pickled)
    assert not (pickled / "ran").exists()


def test_pickles_cannot_be_asked_for(pickled):
    with pytest.raises(ValueError, match="`use_safetensors` is False; allowed: True"):
        EnnForCausalLM.from_pretrained(pickled, use_safetensors=False)
    assert not (pickled / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_refusal_tells_how_to_convert(tmp_path, monkeypatch, model_class):
    model = tiny_model(model_class, dtype=torch.float32)
    model.config.save_pretrained(tmp_path / "folder")
    torch.save(model.state_dict(), tmp_path / "folder" / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="convert it once") as refused:
        model_class.from_pretrained("folder")
    advice = re.findall(r"^    (.*)$", str(refused.value), re.MULTILINE)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", "\n".join(advice)], env=environment, check=True)
    inputs = tiny_inputs(model)
    same(first(AUTO_CLASSES[model_class].from_pretrained("folder")(**inputs)), first(model(**inputs)))


@pytest.mark.parametrize("path", ["./no-such-folder", "/no/such/folder"])
def test_a_wrong_path_is_told_as_everywhere(path):
    with pytest.raises(OSError, match="no"):
        EnnForCausalLM.from_pretrained(path)


def test_folder_without_weights_is_still_told_as_such(tmp_path):
    tiny_model().config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        EnnForCausalLM.from_pretrained(tmp_path)
