"""Images: what is read step by step, and the tab in a real browser."""

import base64
import json
import re
import threading
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from replays import take_apart

from serve.live_memory.image_reading import like_mnist, read_image, step_boxes
from serve.live_memory.models import ModelChoice, load_model


@pytest.fixture
def digit():
    image = Image.new("L", (60, 80), 255)
    ImageDraw.Draw(image).line([(10, 10), (40, 10), (20, 60)], fill=0, width=6)
    return image


@pytest.mark.parametrize("pooling", ["last", "mean", "attention"])
def test_class_probabilities_are_those_of_the_image_read_so_far(make_image_model, digit, pooling):
    loaded = make_image_model(pooling=pooling)
    pixels, steps = read_image(loaded, digit)
    values = torch.from_numpy(pixels)[None]
    with torch.no_grad():
        whole = loaded.model(values, output_recall=True)
        half = loaded.model(inputs_embeds=values[0, :, :14])
    np.testing.assert_allclose(steps[-1].chances, whole.logits[0].softmax(-1), atol=1e-5)
    np.testing.assert_allclose(steps[13].chances, half.logits[0].softmax(-1), atol=1e-5)
    recall = [take_apart(loaded.model, step.memories)[0].recall for step in steps]
    np.testing.assert_allclose(recall, whole.recall[0][0], atol=1e-6)
    assert len(steps) == 28


def test_long_sequences_are_classified_now_and_then_and_at_the_end(make_image_model, digit):
    loaded = make_image_model(image_sequence="pixel", image_size=16)
    _, steps = read_image(loaded, digit)
    read_out = [index for index, step in enumerate(steps) if step.chances is not None]
    assert len(steps) == 256
    assert read_out[0] == 4
    assert read_out[-1] == 255
    assert len(read_out) <= 56


@pytest.mark.parametrize(
    ("kwargs", "first", "last"),
    [
        ({"image_sequence": "row"}, (0, 0, 28, 1), (0, 27, 28, 1)),
        ({"image_sequence": "pixel"}, (0, 0, 1, 1), (27, 27, 1, 1)),
        ({"image_sequence": "patch", "patch_size": 7, "num_channels": 3}, (0, 0, 7, 7), (21, 21, 7, 7)),
    ],
)
def test_every_step_knows_where_it_looks(make_image_model, kwargs, first, last):
    boxes = step_boxes(make_image_model(**kwargs).model.config)
    assert (boxes[0], boxes[-1]) == (first, last)
    assert sum(width * height for *_, width, height in boxes) == 28 * 28


def test_the_steps_of_a_permuted_image_are_where_its_pixels_are(make_image_model):
    boxes = step_boxes(make_image_model(image_sequence="pixel", pixel_permutation_seed=3).model.config)
    assert len(set(boxes)) == 28 * 28
    assert boxes != sorted(boxes, key=lambda box: (box[1], box[0]))


def test_digits_are_centred_and_scaled_as_in_mnist(digit):
    pixels = np.asarray(like_mnist(digit), np.float32)
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    side = len(pixels)
    assert max(rows[-1] - rows[0], columns[-1] - columns[0]) == pytest.approx(side * 20 / 28, abs=2)
    mass = [(pixels.sum(1 - axis) * np.arange(side)).sum() / pixels.sum() for axis in (0, 1)]
    np.testing.assert_allclose(mass, side / 2, atol=1)
    assert pixels[0, 0] == 0  # dark ink on paper became white on black
    assert not np.asarray(like_mnist(Image.new("L", (28, 28)))).any()


@pytest.fixture
def image_tab(visit):
    visitor = visit()
    visitor.page.get_by_role("tab", name="Image").click()
    visitor.wait_for_status("idle", view="image_memory")
    return visitor


def wait_until_read(visitor):
    visitor.wait_for_status("read", view="image_memory")
    visitor.page.wait_for_selector("#image_memory [data-current='27']")


@pytest.mark.browser
def test_a_drawn_digit_is_read_step_by_step(image_tab):
    page = image_tab.page
    expect = pytest.importorskip("playwright.sync_api").expect
    box = page.locator("#pad canvas").bounding_box()
    at = lambda x, y: (box["x"] + box["width"] * x, box["y"] + box["height"] * y)  # noqa: E731
    page.mouse.move(*at(0.5, 0.2))
    page.mouse.down()
    page.mouse.move(*at(0.5, 0.8), steps=8)
    page.mouse.up()
    wait_until_read(image_tab)
    status = page.locator("#image_memory [role=status]")
    expect(status).to_have_text(re.compile(r"Read as “LABEL_\d” \(\d+%\) after 28 steps."))
    label = re.search("LABEL_[0-9]", status.text_content())[0]
    expect(page.locator("#image_memory .likeliest")).to_contain_text(label)
    picture = page.locator("#image_memory .picture canvas")
    pixels = picture.evaluate("c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)")
    assert max(np.reshape(pixels, (28, 28, 4))[:, :, 0].ravel()) > 200

    # Back to row 10: half of the picture is dimmed, the mark is on the row, the memory is that of then.
    scrubber = page.locator("#image_memory .scrubber")
    trace = page.locator("#image_memory").get_by_role("img", name="Hebbian trace")
    bits = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.join()"
    before = trace.evaluate(bits)
    scrubber.fill("9")
    page.wait_for_selector("#image_memory [data-current='9']")
    assert trace.evaluate(bits) != before
    mark = page.locator("#image_memory .picture .row-mark")
    assert float(mark.evaluate("m => parseFloat(m.style.top)")) == pytest.approx(100 * 9 / 28, abs=0.01)
    image_tab.screenshot("image")


@pytest.mark.browser
def test_examples_and_uploads_are_read_and_other_files_refused(image_tab, digit, tmp_path):
    page = image_tab.page
    page.get_by_role("button", name="Example 3").click()
    wait_until_read(image_tab)
    context = "document.querySelector('#image_memory .picture canvas').getContext('2d')"
    text = f"{context}.getImageData(0, 0, 28, 28).data.join()"
    example = page.evaluate(text)

    digit.save(tmp_path / "digit.png")
    page.get_by_label("Upload an image").set_input_files(tmp_path / "digit.png")
    page.wait_for_function(f"before => {text} !== before", arg=example)
    wait_until_read(image_tab)

    (tmp_path / "digit.txt").write_text("3")
    page.get_by_label("Upload an image").set_input_files(tmp_path / "digit.txt")
    image_tab.message("'digit.txt' is not an image that this browser can open.")


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def completions(url):
    """Id and output of every event of a session that completes, as it does."""
    with urllib.request.urlopen(url) as stream:
        for line in stream:
            message = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: ") else {}
            if message.get("msg") == "process_completed":
                yield message["event_id"], message["output"]["data"][0]


@pytest.mark.parametrize("meanwhile", ["another drawing", "another model"])
def test_a_reading_that_has_been_overtaken_is_not_shown(serve, loaded, make_image_model, image_folder, meanwhile):
    """The older of two drawings is read until the newer one has been."""
    image = make_image_model()
    reading, overtaken, readers = threading.Event(), threading.Event(), []

    def hold(*_):
        readers.append(threading.get_ident())
        reading.set()
        if readers[0] == threading.get_ident():
            assert overtaken.wait(30)

    image.model.register_forward_pre_hook(hold)
    page = serve(loaded, image)
    pad = next(part["id"] for part in page.config["components"] if part["props"].get("elem_id") == "pad")
    events = {event["id"]: event["targets"] for event in page.config["dependencies"]}
    drawn = next(index for index, targets in events.items() if (pad, "drawn") in map(tuple, targets))

    def draw(count):
        pixels = base64.b64encode(bytes(3 * 8 * 8)).decode()
        drawing = {"count": count, "side": 8, "pixels": pixels}
        body = {"data": [True], "event_data": drawing, "fn_index": drawn, "session_hash": "s"}
        return post(f"{page.local_url}gradio_api/queue/join", body)["event_id"]

    older = draw(1)
    assert reading.wait(30)
    completed = completions(f"{page.local_url}gradio_api/queue/data?session_hash=s")
    if meanwhile == "another drawing":
        newer = draw(2)
        event, packet = next(completed)
        assert event == newer
        assert json.loads(packet)["kind"] == "run"
    else:
        (session,) = page.visitors.sessions()
        session.choose(load_model(ModelChoice(str(image_folder))))
    overtaken.set()
    ((event, update),) = completed
    assert event == older
    assert isinstance(update, dict), update
    assert "value" not in update


@pytest.mark.browser
def test_a_page_without_an_image_model_gets_its_tab_when_one_is_chosen(serve, visit, loaded, image_folder):
    visitor = visit(serve(loaded).local_url)
    tab = visitor.page.get_by_role("tab", name="Image")
    assert not tab.is_visible()
    visitor.page.get_by_role("button", name="Choose another model").click()
    visitor.page.get_by_role("textbox", name="Model").fill(str(image_folder))
    visitor.press("Load this model")
    visitor.page.get_by_role("button", name="Example 7").click()
    wait_until_read(visitor)
