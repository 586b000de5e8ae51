"""Images for classification: loading, splitting, and the pixels that a model reads."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, DatasetDict, Features, Image, Value, load_dataset
from torch import Tensor

from hf_engram import EnnImageProcessor
from hf_engram.configuration_enn import IMAGE_SEQUENCES
from hf_engram.hub import DataSource

from .arguments import require
from .sources import dataset_source


@dataclass
class ImageArguments:
    """The images, and how a model reads them."""

    _argument_group_name = "images"

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset on the Hub (ylecun/mnist), or a local folder with one."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    image_column: str | None = field(
        default=None, metadata={"help": "Column with the images. None: the only one that holds images."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column with the classes. None: the only one that holds classes."}
    )
    validation_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Share of the train split, drawn with split_seed, that is held out for validation if the dataset "
            "has no validation split. 0: the test split is used for validation, too."
        },
    )
    split_seed: int = field(default=42, metadata={"help": "Seed of the draw."})
    image_sequence: str = field(
        default="row",
        metadata={
            "help": "What a step reads: a 'row', a 'pixel' or a 'patch' of the image.",
            "choices": IMAGE_SEQUENCES,
        },
    )
    image_size: int = field(default=28, metadata={"help": "Images are resized to this height and width."})
    num_channels: int = field(default=1, metadata={"help": "1: grey levels, 3: colours.", "choices": (1, 3)})
    patch_size: int = field(default=4, metadata={"help": "Height and width of a patch."})
    pixel_permutation_seed: int | None = field(
        default=None, metadata={"help": "Read the steps in a fixed random order made from this seed."}
    )
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Subtract these from the channels' values in [0, 1]; needs image_std."}
    )
    image_std: list[float] | None = field(default=None, metadata={"help": "Divide by these."})
    random_shift: int = field(
        default=0, metadata={"help": "In training, move every image by up to so many pixels in both directions."}
    )
    random_flip: bool = field(default=False, metadata={"help": "In training, mirror every second image."})
    data_license: str | None = field(default=None, metadata={"help": "Licence of the images, for the model card."})

    def __post_init__(self) -> None:
        require(self, "dataset_name", self.dataset_name is not None, "a name on the Hub or a local folder")
        require(self, "image_sequence", self.image_sequence in IMAGE_SEQUENCES, f"one of {IMAGE_SEQUENCES}")
        require(self, "num_channels", self.num_channels in (1, 3), "1 and 3")
        require(self, "validation_fraction", 0 <= self.validation_fraction < 1, "from 0 up to, but not including, 1")
        require(self, "image_size", self.image_size >= 1, "a positive integer")
        require(self, "random_shift", self.random_shift >= 0, "0 or more")
        numbers = "as many numbers as num_channels"
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            require(self, name, values is None or len(values) == self.num_channels, f"{numbers}, or None")
        both = (self.image_mean is None) == (self.image_std is None)
        require(self, "image_std", both, f"{numbers} together with image_mean ({self.image_mean!r}), or both None")

    def source(self) -> DataSource:
        """The images as the model card names them."""
        return dataset_source(self.dataset_name, self.dataset_config, self.data_license)


def make_processor(args: ImageArguments) -> EnnImageProcessor:
    """The processor that is saved with the model."""
    normalize = {}
    if args.image_mean is not None:
        normalize = {"do_normalize": True, "image_mean": args.image_mean, "image_std": args.image_std}
    size = {"height": args.image_size, "width": args.image_size}
    return EnnImageProcessor(num_channels=args.num_channels, size=size, **normalize)


def load_images(args: ImageArguments) -> tuple[DatasetDict, list[str]]:
    """Load the images with the columns `pixels`, the bytes of a uint8 array `[C, S, S]`, and `labels`.

    They are cached on disk and read from there, so that they need not fit into memory.

    Returns:
        splits "train", "validation" and "test", and the names of the classes.

    Raises:
        ValueError: the dataset lacks a split or a column.
    """
    dataset = load_dataset(args.dataset_name, args.dataset_config)
    missing = {"train", "test"} - set(dataset)
    if missing:
        raise ValueError(f"{args.dataset_name!r} has the splits {sorted(dataset)}; {sorted(missing)} missing.")
    features = dataset["train"].features
    image_column = find_column("image_column", args.image_column, features, Image)
    label_column = find_column("label_column", args.label_column, features, ClassLabel)
    splits = dataset.map(
        read_pixels,
        batched=True,
        batch_size=500,
        remove_columns=dataset["train"].column_names,
        features=Features({"pixels": Value("binary"), "labels": Value("int64")}),
        fn_kwargs={
            "image_column": image_column,
            "label_column": label_column,
            "num_channels": args.num_channels,
            "image_size": args.image_size,
        },
        desc="Reading images",
    )
    if "validation" not in splits:
        if args.validation_fraction > 0:
            parts = splits["train"].train_test_split(args.validation_fraction, seed=args.split_seed)
            splits["train"], splits["validation"] = parts["train"], parts["test"]
        else:
            splits["validation"] = splits["test"]
    return splits, features[label_column].names


def find_column(option: str, name: str | None, features: Features, kind: type) -> str:
    """The column called `name`, or the only one of a kind."""
    allowed = [column for column, feature in features.items() if isinstance(feature, kind)]
    if name is None and len(allowed) == 1:
        return allowed[0]
    if name not in allowed:
        raise ValueError(f"{option} is {name!r}; allowed: one of the dataset's columns of this kind, {allowed}.")
    return name


def read_pixels(
    batch: dict[str, list], image_column: str, label_column: str, num_channels: int, image_size: int
) -> dict[str, Any]:
    """Resized pixels and labels of a batch of rows."""
    processor = EnnImageProcessor(num_channels=num_channels, size={"height": image_size, "width": image_size})
    pixels = processor(batch[image_column], do_rescale=False, do_normalize=False)["pixel_values"]
    return {
        "pixels": [np.asarray(image).round().astype(np.uint8).tobytes() for image in pixels],
        "labels": batch[label_column],
    }


def collate(examples: list[dict[str, Any]], processor: EnnImageProcessor) -> dict[str, Tensor]:
    """A batch: `pixel_values` `[B, C, S, S]` as `processor` would make them of the resized images, and `labels`."""
    shape = (len(examples), processor.num_channels, processor.size["height"], processor.size["width"])
    pixels = np.frombuffer(b"".join(example["pixels"] for example in examples), dtype=np.uint8).reshape(shape)
    values = torch.from_numpy(pixels.astype(np.float32)) * processor.rescale_factor
    if processor.do_normalize:
        mean, std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
        values = (values - mean) / std
    return {"pixel_values": values, "labels": torch.tensor([example["labels"] for example in examples])}
