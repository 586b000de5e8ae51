"""Which checkpoints a visitor may choose, and what is said about the others."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from serve.live_memory.models import LoadedModel, ModelChoice, ModelShelf, load_model


@pytest.fixture
def shelf(loaded, text_folder):
    return ModelShelf([loaded], capacity=1, folders=[text_folder.parent])


def test_checkpoints_below_the_allowed_folders_can_be_chosen(shelf, text_folder, image_folder):
    text = shelf.get(shelf.check(str(text_folder), "", False))
    image = shelf.get(shelf.check(f"{image_folder}/", "", False))
    assert (text.reads, image.reads) == ("text", "image")
    assert shelf.get(image.choice) is image
    assert shelf.get(text.choice) is not text  # there is room for one


@pytest.mark.parametrize(
    "name", ["/etc", "/no/such/folder", "../..", "~/models", "{folder}/../../etc", "{folder}/link"]
)
def test_folders_outside_are_refused_whether_they_exist_or_not(shelf, text_folder, tmp_path, name):
    link = text_folder.parent / "link"
    if not link.exists():
        link.symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is outside the folders that this page may read checkpoints from"):
        shelf.check(name.format(folder=text_folder.parent), "", False)


@pytest.mark.parametrize(
    ("name", "trust", "sentence"),
    [
        ("", False, "Write the id of a model"),
        ("a/b/c", False, "neither a model id"),
        ("user/model", True, "does not run code that comes with a model"),
    ],
)
def test_what_cannot_be_chosen_is_refused_with_a_sentence(shelf, name, trust, sentence):
    with pytest.raises(ValueError, match=sentence):
        shelf.check(name, "", trust)


def test_a_model_that_is_being_loaded_keeps_nobody_waiting_who_watches_another(
    shelf, text_folder, image_folder, monkeypatch
):
    text, image = shelf.check(str(text_folder), "", False), shelf.check(str(image_folder), "", False)
    loaded_before = shelf.get(text)
    loading, go_on, loads = threading.Event(), threading.Event(), []

    def load_slowly(choice):
        loads.append(choice)
        loading.set()
        assert go_on.wait(30)
        return load_model(choice)

    monkeypatch.setattr("serve.live_memory.models.load_model", load_slowly)
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(shelf.get, image)
        assert loading.wait(30)
        try:
            assert pool.submit(shelf.get, text).result(timeout=30) is loaded_before
            again = pool.submit(shelf.get, image)
        finally:
            go_on.set()
        assert slow.result() is again.result()
    assert loads == [image]


def test_a_folder_without_an_engram_model_is_refused_with_a_sentence(shelf, text_folder):
    folder = text_folder.parent / "bert"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(ValueError, match="was not loaded: it is a 'bert' model"):
        shelf.get(ModelChoice(str(folder)))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="was not loaded: "):
        shelf.get(ModelChoice(str(folder)))


def test_a_model_without_a_memory_is_refused_with_a_sentence(shelf, text_folder, make_model):
    folder = text_folder.parent / "attention"
    make_model(layer_types=["full_attention", "full_attention"]).save_pretrained(folder)
    with pytest.raises(ValueError, match="was not loaded: all of its layers are attention: it has no memory"):
        shelf.get(ModelChoice(str(folder)))


def test_a_hybrid_says_what_of_it_is_shown(make_model, tokenizer):
    model = make_model(layer_types=["engram_mixer", "full_attention"], num_attention_heads=2)
    line = LoadedModel(ModelChoice("hybrid"), model, tokenizer, "text").describe()
    assert line.endswith(
        "2 layers, 16 slots of 12 features in each of 2 heads, 1 of them attention, which is not shown"
    )


def test_code_that_comes_with_a_checkpoint_is_not_run_without_the_tick(shelf, text_folder, tmp_path):
    folder = text_folder.parent / "with-code"
    folder.mkdir()
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}, "architectures": ["EnnForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="run only if you tick that you trust its author"):
        shelf.get(ModelChoice(str(folder)))
    assert not ran.exists()
