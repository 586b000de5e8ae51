"""Tiny models with random weights, a tokenizer that has seen some markup, and a page that is served for all tests."""

import os
import shutil
import socket
import time

import pytest
import torch
from helpers import free_port
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_engram import EnnConfig, EnnForCausalLM, EnnForImageClassification, EnnImageProcessor

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

from serve.live_memory.models import LoadedModel, ModelChoice, ModelShelf
from serve.live_memory.page import open_page

SECONDS_PER_STEP = 0.01  # slow enough to be watched and stopped
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

MARKUP = '<img src="x" onerror="window.ran = 1">'  # one token, so that it is whole wherever tokens are shown
TEXT = [
    "the memory of a recurrent network is written one token at a time",
    "it is read back by attention over its slots, and <b>what</b> was written long ago fades",
    "a page shows <script>window.ran = 1</script> as it is",
]


@pytest.fixture(scope="session")
def tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ"]
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=240, initial_alphabet=alphabet))
    tokenizer.add_tokens([MARKUP])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="session")
def make_model(tokenizer):
    def make(**kwargs):
        torch.manual_seed(0)
        tiny = {"vocab_size": len(tokenizer), "hidden_size": 24, "num_hidden_layers": 2, "memory_size": 16}
        return EnnForCausalLM(EnnConfig(**{**tiny, "residual": True, **kwargs})).eval()

    return make


@pytest.fixture(scope="session")
def model(make_model):
    return make_model()


@pytest.fixture(scope="session")
def loaded(model, tokenizer):
    return LoadedModel(ModelChoice("tiny"), model, tokenizer, "text")


@pytest.fixture(scope="session")
def make_image_model():
    def make(**kwargs):
        torch.manual_seed(0)
        tiny = {"image_sequence": "row", "image_size": 28, "num_labels": 10, "hidden_size": 24, "memory_size": 16}
        model = EnnForImageClassification(EnnConfig(**{**tiny, "initializer_range": 0.5, **kwargs})).eval()
        size = {"height": model.config.image_size, "width": model.config.image_size}
        processor = EnnImageProcessor(num_channels=model.config.num_channels, size=size)
        return LoadedModel(ModelChoice("tiny-image"), model, processor, "image")

    return make


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory, model, tokenizer):
    """The checkpoint of a language model, in a folder that visitors may load from."""
    folder = tmp_path_factory.mktemp("checkpoints") / "other"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(text_folder, make_image_model):
    folder = text_folder.parent / "images"
    loaded = make_image_model()
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hosts():
    """Names of the hosts that this process looks up."""
    seen = set()
    look_up = socket.getaddrinfo

    def recording(host, *args, **kwargs):
        seen.add(host)
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", recording)
        yield seen


@pytest.fixture(scope="session")
def serve(hosts, text_folder):
    """Serve a page on models; its address, and its `Blocks`."""
    pages = []

    def serve(*own, limits=None, **launch_options):
        shelf = ModelShelf(own, capacity=2, folders=[text_folder.parent], allow_remote_code=True)
        page = open_page(
            shelf,
            limits,
            server_name="127.0.0.1",
            server_port=free_port(),
            prevent_thread_lock=True,
            quiet=True,
            **launch_options,
        )
        pages.append(page)
        return page

    yield serve
    for page in pages:
        page.close()
    assert hosts <= {"127.0.0.1", "localhost", None}


@pytest.fixture(scope="session")
def slow_model(make_model):
    model = make_model()
    model.register_forward_pre_hook(lambda *_: time.sleep(SECONDS_PER_STEP))
    return model


@pytest.fixture(scope="session")
def url(serve, slow_model, tokenizer, make_image_model):
    """A page on a slow language model and an image classifier."""
    return serve(LoadedModel(ModelChoice("tiny"), slow_model, tokenizer, "text"), make_image_model()).local_url


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
        if chromium is None:
            pytest.skip("Chromium is not installed")
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, request):
    """Open a page in a browser that knows nothing of others; every visitor must leave without complaints."""
    from visitor import Visitor

    visitors = []

    def visit(url=None, **context):
        visitors.append(Visitor(browser, url or request.getfixturevalue("url"), **context))
        return visitors[-1]

    yield visit
    for visitor in visitors:
        visitor.leave()


@pytest.fixture
def visitor(visit):
    return visit()
