"""An image as a sequence: what the model recalls, writes and believes after every step of it.

Letters in shapes: T steps, S image size.
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_engram import EnnConfig
from hf_engram.images_enn import image_to_sequence

from .controls import Settings
from .memories import replayable
from .models import LoadedModel

MOST_READOUTS = 56  # longer sequences are classified after every n-th step only
INK_BOX = 20 / 28  # the share of its image that a digit of MNIST fills


class ImageStep(NamedTuple):
    """One step of the sequence.

    Attributes:
        box: left, top, width and height of what is read, in pixels of the image.
        memories: float32 `[F]`, what it recalled from every memory and wrote there (`memories.replayable`).
        chances: float32 `[num_labels]`, the class probabilities if the sequence ended here; `None` if not asked.
    """

    box: tuple[int, int, int, int]
    memories: np.ndarray
    chances: np.ndarray | None


@torch.inference_mode()
def read_image(loaded: LoadedModel, image: Image.Image) -> tuple[np.ndarray, list[ImageStep]]:
    """Let the model read an image.

    Returns:
        the pixels it read, float32 `[C, S, S]`, and its steps.
    """
    model, config = loaded.model, loaded.model.config
    pixels = loaded.processor(image, return_tensors="pt")["pixel_values"]
    sequence = model.embed_images(pixels)  # [1, T, embedding_size]
    output = model(inputs_embeds=sequence, output_recall=True, output_encodings=True, output_reads=True)
    memories = replayable(model, output, Settings())
    steps = sequence.shape[1]
    every = -(-steps // MOST_READOUTS)
    chances = {
        # From the start each time, so that every kind of pooling sees what it would see if the image ended there.
        t: model(inputs_embeds=sequence[:, : t + 1]).logits[0].float().softmax(-1).numpy()
        for t in range(steps)
        if (t + 1) % every == 0 or t == steps - 1
    }
    boxes = step_boxes(config)
    return pixels[0].float().numpy(), [ImageStep(boxes[t], memories[t], chances.get(t)) for t in range(steps)]


def step_boxes(config: EnnConfig) -> list[tuple[int, int, int, int]]:
    """Where each step looks: left, top, width, height, found by reading an image that holds its own pixel indices."""
    size = config.image_size
    indices = torch.arange(size * size, dtype=torch.float64).reshape(1, 1, size, size)
    indices = indices.expand(1, config.num_channels, size, size)
    steps: Tensor = image_to_sequence(indices, config)[0].long()
    boxes = []
    for step in steps:
        rows, columns = step // size, step % size
        left, top = int(columns.min()), int(rows.min())
        boxes.append((left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1))
    return boxes


def like_mnist(image: Image.Image) -> Image.Image:
    """A digit in white on black, scaled to 20 of 28 pixels and centred by its mass, as the digits of MNIST are."""
    pixels = np.asarray(image.convert("L"), np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if border.mean() > 127:
        pixels = 255 - pixels  # dark ink on paper
    ink = pixels > 60
    if not ink.any():
        return Image.fromarray(np.zeros_like(pixels, np.uint8))
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    digit = Image.fromarray(pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8))
    size = max(pixels.shape)
    scale = INK_BOX * size / max(digit.size)
    digit = digit.resize([max(1, round(side * scale)) for side in digit.size], Image.Resampling.BILINEAR)
    mass = np.asarray(digit, np.float32)
    middle = [float((mass.sum(1 - axis) * np.arange(mass.shape[axis])).sum() / mass.sum()) for axis in (0, 1)]
    centred = Image.new("L", (size, size))
    centred.paste(digit, (round(size / 2 - middle[1]), round(size / 2 - middle[0])))
    return centred
