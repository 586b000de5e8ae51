"""The test splits of the README's numbers, rebuilt as the files they first were, have the sums that it names."""

import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset

README = " ".join(Path("README.md").read_text(encoding="utf-8").split())


def published_split(name, *config):
    return load_dataset(str(Path(os.environ["HF_ENGRAM_DATA"], name)), *config, split="test")


def mnist():
    """t10k-images-idx3-ubyte."""
    pixels = np.stack([np.asarray(image) for image in published_split("mnist")["image"]])
    return hashlib.sha256(struct.pack(">4i", 2051, *pixels.shape) + pixels.tobytes())


def cifar10():
    """test_batch.bin: per image its label, then its red, green and blue pixels."""
    rows = published_split("cifar10")
    records = [
        bytes([label]) + np.asarray(image).transpose(2, 0, 1).tobytes()
        for image, label in zip(rows["img"], rows["label"], strict=True)
    ]
    return hashlib.md5(b"".join(records))


def wikitext():
    """wiki.test.raw, in which a blank line holds a space."""
    lines = published_split("wikitext", "wikitext-2-raw-v1")["text"]
    return hashlib.sha256("".join(line or " \n" for line in lines).encode())


@pytest.mark.data
@pytest.mark.parametrize("rebuilt", [mnist, cifar10, wikitext], ids=lambda function: function.__name__)
def test_a_test_split_is_the_published_one(rebuilt):
    found = rebuilt()
    assert f"{found.name.upper().replace('SHA256', 'SHA-256')} `{found.hexdigest()}`" in README
