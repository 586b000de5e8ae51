import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from PIL import Image as PIL

from train.images import ImageArguments, collate, load_images, make_processor
from train.trainer import shift

SHAPES = "tests/fixtures/shapes"


def arguments(**kwargs):
    return ImageArguments(**{"dataset_name": SHAPES, "image_size": 8, **kwargs})


def colours(folder, count=12):
    """A dataset of coloured images 10 pixels high and 14 wide, with a validation split, in `folder`."""
    random = np.random.default_rng(0)
    images = [PIL.fromarray(random.integers(0, 256, (10, 14, 3), dtype=np.uint8)) for _ in range(count)]
    features = Features({"img": Image(), "kind": ClassLabel(names=["a", "b"])})
    rows = Dataset.from_dict({"img": images, "kind": [n % 2 for n in range(count)]}, features=features)
    for split in ("train", "validation", "test"):
        rows.to_parquet(folder / f"{split}.parquet")
    return images


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_what_the_saved_processor_makes_of_the_images(channels, tmp_path):
    images = colours(tmp_path)
    mean, std = [0.3] * channels, [0.2] * channels
    args = arguments(dataset_name=str(tmp_path), num_channels=channels, image_mean=mean, image_std=std)
    splits, names = load_images(args)
    processor = make_processor(args)
    batch = collate([splits["train"][n] for n in range(4)], processor)
    expected = processor(images[:4], return_tensors="pt")["pixel_values"]
    # Bytes after resizing are rounded, the processor's are not: up to half a grey level.
    assert (batch["pixel_values"] - expected).abs().max() <= (0.5 / 255 / 0.2 if channels == 1 else 1e-6)
    assert batch["pixel_values"].shape == (4, channels, 8, 8)
    assert batch["labels"].tolist() == [0, 1, 0, 1]
    assert names == ["a", "b"]


def test_validation_images_are_drawn_from_the_train_split_by_a_seed():
    def labels(**kwargs):
        splits, _ = load_images(arguments(**kwargs))
        assert len(splits["train"]) + len(splits["validation"]) == 240
        assert len(splits["test"]) == 80
        return splits["validation"]["pixels"][:]

    assert len(labels(validation_fraction=0.25)) == 60
    assert labels() == labels()
    assert labels() != labels(split_seed=1)


def test_a_validation_split_of_the_dataset_is_used(tmp_path):
    colours(tmp_path)
    splits, _ = load_images(arguments(dataset_name=str(tmp_path)))
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [12, 12, 12]


def test_without_a_validation_share_the_test_images_validate():
    splits, _ = load_images(arguments(validation_fraction=0))
    assert len(splits["train"]) == 240
    assert splits["validation"]["pixels"][:] == splits["test"]["pixels"][:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": None}, "dataset_name is None; allowed: a name on the Hub or a local folder"),
        ({"image_sequence": "column"}, "image_sequence is 'column'; allowed: one of"),
        ({"num_channels": 2}, "num_channels is 2; allowed: 1 and 3"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0; allowed: from 0 up to"),
        ({"random_shift": -1}, "random_shift is -1; allowed: 0 or more"),
        ({"image_mean": [0.1, 0.2], "image_std": [1.0]}, r"image_mean is \[0.1, 0.2\]; allowed: as many numbers"),
        ({"image_mean": [0.1]}, r"image_std is None; allowed: .* together with image_mean \(\[0.1\]\)"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        arguments(**options)


def test_columns_and_splits_that_lack_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"image_column is 'photo'; allowed: .* \['image'\]"):
        load_images(arguments(image_column="photo"))
    with pytest.raises(ValueError, match=r"label_column is 'image'; allowed: .* \['label'\]"):
        load_images(arguments(label_column="image"))
    DatasetDict(train=load_dataset(SHAPES, split="test"))["train"].to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"has the splits \['train'\]; \['test'\] missing"):
        load_images(arguments(dataset_name=str(tmp_path)))


def test_shifted_images_are_moved_as_a_whole_and_differently():
    images = torch.zeros(64, 2, 9, 9)
    images[:, :, 4, 4] = torch.tensor([1.0, 2.0])
    moved = shift(images, 2)
    places = [(image[0].argmax() // 9 - 4, image[0].argmax() % 9 - 4) for image in moved]
    assert {int(x) for place in places for x in place} == {-2, -1, 0, 1, 2}
    assert len({(int(y), int(x)) for y, x in places}) > 15
    assert torch.equal(moved[:, 1], 2 * moved[:, 0])
    assert torch.equal(moved.sum((2, 3)), images.sum((2, 3)))
