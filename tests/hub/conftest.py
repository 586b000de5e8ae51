"""Models on the stand-in Hub, pushed by a fresh process, and what they answered there."""

import pytest
from hub_scripts import MAKE
from hub_stand_in import FreshPython


@pytest.fixture(scope="session")
def text_model(hub, installed_package, tmp_path_factory):
    """A repository with a language model and its tokenizer: id, commit, and the model's logits for ids 0 to 39."""
    fresh_python = FreshPython(hub, tmp_path_factory.mktemp("text_model"), installed_package)
    code = """
    model = make_model()
    save_for_hub(model, "model", make_tokenizer())
    commit = push_to_hub("model", "user/tiny-text.v1")
    backbone = model.model(torch.arange(40)[None]).last_hidden_state[0, -1].tolist()
    result = {"repo": "user/tiny-text.v1", "commit": commit.oid, "logits": answer(model), "backbone": backbone}
    """
    return fresh_python(MAKE, code, package=True)


@pytest.fixture(scope="session")
def image_model(hub, installed_package, tmp_path_factory):
    """A repository with an image classifier and its processor: id, and the logits for one image."""
    fresh_python = FreshPython(hub, tmp_path_factory.mktemp("image_model"), installed_package)
    code = """
    model = make_image_model()
    processor = hf_engram.EnnImageProcessor(num_channels=3, size={"height": 8, "width": 8})
    save_for_hub(model, "model", processor)
    push_to_hub("model", "user/tiny-images")
    image = torch.arange(3 * 10 * 10, dtype=torch.uint8).reshape(3, 10, 10) % 251
    logits = model(**processor(image, return_tensors="pt")).logits[0].tolist()
    result = {"repo": "user/tiny-images", "logits": logits}
    """
    return fresh_python(MAKE, code, package=True)
