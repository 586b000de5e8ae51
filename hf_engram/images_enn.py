"""Images as sequences: the order in which a model reads the pixels, and an embedding of where it reads."""

import torch
import torch.nn as nn
from torch import Tensor

from .configuration_enn import EnnConfig


class PositionEmbeddings(nn.Embedding):
    """A learned vector for every step's place in the image."""


def image_to_sequence(pixel_values: Tensor, config: EnnConfig) -> Tensor:
    """Images `[B, C, S, S]` as sequences `[B, T, pixels of a step * C]`, in the order `config.image_sequence` says.

    A step's features run over its pixels from left to right and top to bottom, the channels of a pixel together.

    Raises:
        ValueError: the images do not have the config's size and channels.
    """
    size, patch = config.image_size, {"row": None, "pixel": 1, "patch": config.patch_size}[config.image_sequence]
    if pixel_values.ndim != 4 or pixel_values.shape[1:] != (config.num_channels, size, size):
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}; expected [batch, {config.num_channels}, {size}, "
            f"{size}] (num_channels, image_size, image_size). EnnImageProcessor makes it."
        )
    height, width = (1, size) if patch is None else (patch, patch)
    tiles = pixel_values.unfold(2, height, height).unfold(3, width, width)  # [B, C, rows, columns, height, width]
    sequence = tiles.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    if config.pixel_permutation_seed is not None:
        generator = torch.Generator("cpu").manual_seed(config.pixel_permutation_seed)
        order = torch.randperm(sequence.shape[1], generator=generator, device="cpu")
        sequence = sequence[:, order.to(sequence.device)]
    return sequence
