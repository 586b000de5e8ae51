"""Images of any kind become the pixels a model reads."""

import numpy as np
import pytest
import torch
from helpers import close, same, tiny_model
from PIL import Image
from transformers import AutoImageProcessor

from hf_engram import EnnForImageClassification, EnnImageProcessor

SIZE = {"height": 8, "width": 8}
RED_GREY = round(0.299 * 255) / 255


def processor(**kwargs):
    return EnnImageProcessor(**{"size": SIZE, **kwargs})


def pixels(image, **kwargs):
    return processor(**kwargs)(image, return_tensors="pt")["pixel_values"]


def red_image(mode):
    image = Image.new("RGB", (8, 8), (255, 0, 0))
    return image.quantize() if mode == "P" else image.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_colour_images(mode):
    grey, colour = pixels(red_image(mode)), pixels(red_image(mode), num_channels=3)
    assert (grey.shape, colour.shape) == ((1, 1, 8, 8), (1, 3, 8, 8))
    close(grey, torch.full_like(grey, RED_GREY), tolerance=1e-6)
    close(colour[0, :, 0, 0], torch.tensor([1.0, 0, 0]), tolerance=1e-6)


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images(mode, channels):
    image = Image.new("L", (8, 8), 255)
    image.paste(0, (0, 0, 4, 8))
    values = pixels(image.convert(mode), num_channels=channels)
    assert values.shape == (1, channels, 8, 8)
    assert not values[..., :4].any()
    same(values[..., 4:], torch.ones(1, channels, 8, 4))


ARRAYS = {
    "height_width": lambda array: array[..., 0],
    "height_width_1": lambda array: array[..., :1],
    "height_width_3": lambda array: array[..., :3],
    "height_width_4": lambda array: array,
    "1_height_width": lambda array: array[..., :1].transpose(2, 0, 1),
    "3_height_width": lambda array: array[..., :3].transpose(2, 0, 1),
    "4_height_width": lambda array: array.transpose(2, 0, 1),
}


@pytest.mark.parametrize("layout", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("size", [(8, 8), (5, 11)], ids=str)
def test_arrays_equal_their_pil_image(layout, channels, library, size):
    rgba = np.random.default_rng(0).integers(0, 256, (*size, 4), dtype=np.uint8)
    array = np.ascontiguousarray(layout(rgba))
    grey = 1 in array.shape or array.ndim == 2
    image = Image.fromarray(rgba[..., 0] if grey else rgba[..., :3])
    values = pixels(array if library == "numpy" else torch.from_numpy(array), num_channels=channels)
    assert values.shape == (1, channels, 8, 8)
    close(values, pixels(image, num_channels=channels), tolerance=1e-6 if size == (8, 8) else 0.011)  # resized


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (3, 50), (200, 70)], ids=str)
def test_any_size_is_resized(size):
    image = Image.new("L", size, 128)
    values = pixels(image)
    close(values, torch.full((1, 1, 8, 8), 128 / 255), tolerance=1e-6)


def test_size_of_the_model_without_resizing_is_kept_exactly():
    array = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    close(pixels(Image.fromarray(array))[0, 0], torch.from_numpy(array) / 255, tolerance=1e-7)


def test_several_images_make_a_batch():
    images = [Image.new("RGB", (5, 5), "white"), Image.new("L", (9, 9), 0), np.zeros((8, 8), np.uint8)]
    values = pixels(images)
    assert values.shape == (3, 1, 8, 8)
    assert values.mean((1, 2, 3)).tolist() == [1, 0, 0]


@pytest.mark.parametrize("channels", [1, 3])
def test_normalisation(channels):
    mean, std = [0.1, 0.2, 0.3][:channels], [0.5, 0.6, 0.7][:channels]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    plain = pixels(image, num_channels=channels)
    normalised = pixels(image, num_channels=channels, do_normalize=True, image_mean=mean, image_std=std)
    expected = (plain - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    close(normalised, expected, tolerance=1e-5)


def test_processor_is_the_same_after_a_trip_to_disk(tmp_path):
    saved = processor(num_channels=3, do_normalize=True, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.5, 0.5])
    saved.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is EnnImageProcessor
    assert loaded.to_dict() == saved.to_dict()
    image = Image.new("L", (20, 9), 77)
    same(loaded(image, return_tensors="pt")["pixel_values"], saved(image, return_tensors="pt")["pixel_values"])


def test_processor_beside_a_model_feeds_it(tmp_path):
    model = tiny_model(EnnForImageClassification, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    processor(num_channels=3).save_pretrained(tmp_path)
    inputs = AutoImageProcessor.from_pretrained(tmp_path)([Image.new("RGBA", (30, 20))] * 2, return_tensors="pt")
    assert EnnForImageClassification.from_pretrained(tmp_path)(**inputs).logits.shape == (2, 2)


@pytest.mark.parametrize("value", [0, 2, 4, "1"])
def test_wrong_number_of_channels_is_refused(value):
    with pytest.raises(ValueError, match=f"`num_channels` is {value!r}; allowed: 1"):
        EnnImageProcessor(num_channels=value)


def test_sixteen_bits_are_scaled_to_eight():
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    close(pixels(Image.fromarray(values))[0, 0], torch.tensor(values // 256 / 255).float(), tolerance=1e-6)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_of_unknown_range_are_refused(mode):
    with pytest.raises(ValueError, match=f"mode '{mode}', whose range is not known; allowed: any other mode"):
        pixels(Image.new(mode, (8, 8)))


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_list_of_grey_arrays_makes_a_batch(library):
    grey = [np.full((8, 8), value, dtype=np.uint8) for value in (51, 255)]
    images = grey if library == "numpy" else [torch.from_numpy(image) for image in grey]
    batch = pixels(images)
    assert batch.shape == (2, 1, 8, 8)
    close(batch[:, 0, 0, 0], torch.tensor([0.2, 1.0]), tolerance=1e-6)


def test_something_that_is_not_an_image_is_refused():
    with pytest.raises(ValueError, match="image"):
        processor()("a picture")
