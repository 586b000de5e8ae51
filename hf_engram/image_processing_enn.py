"""Images of any size and mode to the pixels an ENN reads."""

from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling


class EnnImageProcessor(PilBackend):
    r"""
    Resizes, rescales and normalises images for [`EnnForImageClassification`].

    The order in which the pixels are read belongs to the model's config, not to the processor.

    Args:
        num_channels (`int`, *optional*, defaults to 1):
            1 converts everything to grey levels, 3 to RGB.
        size (`dict`, *optional*, defaults to `{"height": 28, "width": 28}`):
            Size after resizing.
        do_normalize (`bool`, *optional*, defaults to `False`):
            Subtract `image_mean` and divide by `image_std`, one number per channel each.

    Accepts PIL images of any mode but "I" and "F", whose range nobody knows, and numpy arrays and torch tensors
    `[H, W]`, `[C, H, W]` or `[H, W, C]`; a list of these, or a batch with an axis for channels.

    Example:

    ```python
    >>> processor = EnnImageProcessor(num_channels=1, size={"height": 28, "width": 28})
    >>> pixel_values = processor(image, return_tensors="pt")["pixel_values"]  # [1, 1, 28, 28], in [0, 1]
    ```
    """

    resample = PILImageResampling.BILINEAR
    image_mean = [0.0]
    image_std = [1.0]
    size = {"height": 28, "width": 28}
    num_channels = 1
    do_resize = True
    do_rescale = True
    do_normalize = False
    model_input_names = ["pixel_values"]

    def __init__(self, num_channels: int | None = None, **kwargs: Any) -> None:
        if num_channels not in (None, 1, 3):
            raise ValueError(f"`num_channels` is {num_channels!r}; allowed: 1 (grey) and 3 (RGB).")
        super().__init__(**kwargs)
        if num_channels is not None:
            self.num_channels = num_channels

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> Any:
        return super()._prepare_images_structure(with_channels(images), expected_ndims)

    def process_image(self, image: Any, **kwargs: Any) -> np.ndarray:
        """One image as an array `[num_channels, H, W]`.

        Raises:
            ValueError: a PIL image of a mode whose range is not known.
        """
        if isinstance(image, Image.Image):
            if image.mode in ("I", "F"):
                raise ValueError(
                    f"The image has mode {image.mode!r}, whose range is not known; allowed: any other mode, or an "
                    "array scaled to 0 to 255."
                )
            if image.mode.startswith("I;16"):  # which `convert` would cut off at 255
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            image = image.convert("L" if self.num_channels == 1 else "RGB")
        channels = super().process_image(image, **kwargs)
        if len(channels) == self.num_channels:
            return channels
        # Drop alpha, then average to grey with the weights of ITU-R 601, as PIL does, or repeat grey to RGB.
        colour = channels[:3] if len(channels) >= 3 else channels[:1].repeat(3, axis=0)
        if self.num_channels == 3:
            return colour
        grey = np.tensordot(np.array([0.299, 0.587, 0.114]), colour, axes=1)[None]
        return (grey.round() if np.issubdtype(channels.dtype, np.integer) else grey).astype(channels.dtype)


def with_channels(images: Any) -> Any:
    """The same images, grey arrays `[H, W]` among them with the axis for channels that transformers wants."""
    if isinstance(images, (list, tuple)):
        return [with_channels(image) for image in images]
    return images[None] if getattr(images, "ndim", None) == 2 else images
