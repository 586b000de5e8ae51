"""Models on the stand-in Hub, pushed and opened by fresh processes, and what they answered."""

import pytest
from hub_scripts import ANSWER, MAKE, OPEN, WITHOUT_CHECK
from hub_stand_in import FreshPython


@pytest.fixture(scope="session")
def published(hub, installed_package, tmp_path_factory):
    """Repositories made with the package: what was pushed, and the answers of the models that were pushed."""
    fresh_python = FreshPython(hub, tmp_path_factory.mktemp("published"), installed_package)
    checked = """
    from huggingface_hub import HfApi

    model, wider, images = make_model(), make_model(seed=1, hidden_size=24), make_image_model()
    save_for_hub(model, "text", make_tokenizer())
    oid = push_to_hub("text", "user/tiny-text.v1").oid
    HfApi().create_tag("user/tiny-text.v1", tag="first", revision=oid)
    save_for_hub(images, "images", hf_engram.EnnImageProcessor(num_channels=3, size={"height": 8, "width": 8}))
    push_to_hub("images", "user/tiny-images", private=True)
    """
    unchecked = """
    save_for_hub(wider, "text", make_tokenizer())
    push_to_hub("text", "user/tiny-text.v1", revision="wider", commit_message="Wider")
    result = {
        "text": "user/tiny-text.v1",
        "commit": oid,
        "images": "user/tiny-images",
        "answers": {"text": answer(model), "wider": answer(wider), "images": answer(images)},
        "backbone": answer(model.model),
    }
    """
    return fresh_python(ANSWER, MAKE, checked, WITHOUT_CHECK, unchecked, package=True)


@pytest.fixture(scope="session")
def opened(hub, published, installed_package, tmp_path_factory):
    """What someone without the package, who trusts the code, gets from these repositories, and pushes on."""
    fresh_python = FreshPython(hub, tmp_path_factory.mktemp("opened"), installed_package)
    return fresh_python(ANSWER, OPEN, **published)
