"""Episodes of images: classes that were never trained on, learnt from a few examples within a sequence."""

import math
from functools import partial

import torch
from torch import Generator, Tensor

from train.images import ImageArguments, collate, load_images, make_processor

from .recall_tasks import IGNORED, Questions, Task

WAYS = 3  # classes of an episode, and classes that are held out
SHOTS = (1, 2, 3, 4, 5)  # labelled images of every class
QUERIES = 5  # images of every class that are asked for
IMAGE_SIZE = 14


def few_shot_task(dataset_name: str) -> Task:
    """Episodes of the images in a dataset, in grey levels; its last `WAYS` classes are held out from training.

    Args:
        dataset_name: on the Hub, or a local folder; with splits "train" and "test".

    Raises:
        ValueError: it has too few classes, or too few images of one.
    """
    args = ImageArguments(dataset_name=dataset_name, image_size=IMAGE_SIZE, validation_fraction=0.0)
    splits, names = load_images(args)
    if len(names) < 2 * WAYS:
        raise ValueError(f"dataset_name is {dataset_name!r}, with {len(names)} classes; allowed: at least {2 * WAYS}.")
    processor = make_processor(args)
    by_class = {}
    for split in ("train", "test"):
        batch = collate(splits[split].to_list(), processor)
        pixels = batch["pixel_values"].flatten(1)
        by_class[split] = [pixels[batch["labels"] == label] for label in range(len(names))]
        fewest = min(map(len, by_class[split]))
        if fewest < SHOTS[-1] + QUERIES:
            raise ValueError(
                f"dataset_name is {dataset_name!r}: a class has {fewest} images in the split {split!r}; allowed: at "
                f"least {SHOTS[-1] + QUERIES}."
            )
    # Around 0: what all images have in common would otherwise make up most of any comparison of two.
    known = torch.cat(by_class["train"][:-WAYS])
    mean, std = known.mean(), known.std()
    train, test = ([(images - mean) / std for images in by_class[split]] for split in ("train", "test"))
    exams = {"shots, novel classes": test[-WAYS:], "shots, new images of classes in training": test[:-WAYS]}
    return Task(
        f"Few-shot images: {WAYS} classes an episode; {', '.join(names[-WAYS:])} never trained on",
        {"vocab_size": WAYS, "embedding_size": IMAGE_SIZE**2 + WAYS, "tie_word_embeddings": False},
        tuple(partial(episode, images=train[:-WAYS], shots=shots) for shots in SHOTS),
        {
            name: {shots: partial(episode, images=images, shots=shots) for shots in SHOTS}
            for name, images in exams.items()
        },
        WAYS,
    )


def episode(rows: int, generator: Generator, images: list[Tensor], shots: int) -> Questions:
    """Labelled images of `WAYS` classes in random order, then `QUERIES` other images of each, in random order, too.

    Which label a class has is drawn for every row, so that nothing but the row itself can tell. A step reads an image
    beside its label: `WAYS` numbers, 0 but in its place, where the number is as large as an image is long on average. A
    question has zeros there.

    Args:
        rows: episodes B, of WAYS * (shots + QUERIES) steps.
        images: for every class that may come up, its images `[count, pixels]`, of mean 0 and standard deviation 1.
        shots: labelled images of every class.
    """
    classes = torch.rand(rows, len(images), generator=generator).argsort(1)[:, :WAYS]
    drawn = torch.stack(
        [torch.stack([_some(images[label], shots + QUERIES, generator) for label in row]) for row in classes.tolist()]
    )  # [B, WAYS, shots + QUERIES, pixels]
    labels = torch.arange(WAYS)[:, None].expand(rows, WAYS, shots + QUERIES)
    support, support_labels = _shuffled(drawn[:, :, :shots], labels[:, :, :shots], generator)
    queries, answers = _shuffled(drawn[:, :, shots:], labels[:, :, shots:], generator)
    shown = math.sqrt(support.shape[-1]) * torch.nn.functional.one_hot(support_labels, WAYS).to(support.dtype)
    hidden = queries.new_zeros(*answers.shape, WAYS)
    return Questions(
        torch.cat([torch.cat([support, shown], 2), torch.cat([queries, hidden], 2)], 1),
        torch.cat([torch.full_like(support_labels, IGNORED), answers], 1),
        WAYS * shots,
    )


def _some(images: Tensor, count: int, generator: Generator) -> Tensor:
    return images[torch.randperm(len(images), generator=generator)[:count]]


def _shuffled(images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Images `[B, WAYS, count, pixels]` as `[B, WAYS * count, pixels]`, and their labels, in one random order a row."""
    images, labels = images.flatten(1, 2), labels.flatten(1, 2)
    order = torch.rand(labels.shape, generator=generator).argsort(1)
    return images.gather(1, order[..., None].expand_as(images)), labels.gather(1, order)
