"""A model on the Hub opens with every Auto class, with hf_engram and without it, to the very same numbers."""

import json

import pytest
from hub_scripts import ANSWER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_code_comes_from_the_repository(opened):
    assert opened["packages"] == ["transformers_modules"]


def test_text_model_answers_as_the_one_that_was_pushed(opened, published):
    assert opened["text"] == published["answers"]["text"]
    assert opened["backbone"] == opened["classifier_backbone"] == published["backbone"]


def test_text_model_generates_and_returns_its_memory(opened):
    assert opened["use_cache"] is True
    assert opened["generated"] == 5
    assert opened["trace"] == [2, 8, 16]
    assert opened["written"].startswith("long ago")


def test_image_model_and_processor_answer_as_those_that_were_pushed(opened, published):
    assert opened["images"] == published["answers"]["images"]
    assert opened["pixels"] == [1, 3, 8, 8]
    assert "AutoModelForImageClassification" in opened["image_classes"]
    assert "AutoModelForCausalLM" not in opened["image_classes"]


def test_revision_pins_weights_and_code(opened, published):
    revisions = opened["revisions"]
    assert revisions["main"] == revisions["first"] == revisions[published["commit"]] == published["answers"]["text"]
    assert revisions["wider"] == published["answers"]["wider"] != published["answers"]["text"]


def test_code_runs_only_with_consent(opened):
    assert "trust_remote_code=True" in opened["refusal"]


def test_repository_that_is_not_there_is_named(opened):
    assert "user/not-there" in opened["missing"]


def test_models_open_with_the_package_and_without_the_flag(fresh_python, published):
    opened = fresh_python(
        ANSWER,
        """
        import hf_engram
        from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

        models = [
            AutoModelForCausalLM.from_pretrained(given["text"]),
            AutoModelForCausalLM.from_pretrained(given["text"], trust_remote_code=True),
            hf_engram.EnnForCausalLM.from_pretrained(given["text"]),
        ]
        images = AutoModelForImageClassification.from_pretrained(given["images"])
        result = {
            "modules": sorted({type(model).__module__ for model in (*models, images)}),
            "text": [answer(model) for model in models],
            "images": answer(images),
            "tokens": len(AutoTokenizer.from_pretrained(given["text"])),
        }
        """,
        package=True,
        **published,
    )
    assert opened["modules"] == ["hf_engram.modeling_enn"]
    assert opened["text"] == [published["answers"]["text"]] * 3
    assert opened["images"] == published["answers"]["images"]
    assert opened["tokens"] > 256


def test_weights_travel_as_large_files_and_everything_else_as_text(hub, published):
    commit = hub.repository(published["text"]).commit(published["commit"])
    large = {path for path, file in commit.files.items() if file.large}
    assert large == {"model.safetensors"}
    assert {"README.md", "config.json", "tokenizer.json", "modeling_enn.py"} <= commit.files.keys()
    assert hub.commits(published["text"]) == ["Upload model"]
    assert hub.repository(published["images"]).private


def test_card_on_the_hub_loads_its_own_repository(hub, published):
    card = hub.files(published["text"])["README.md"].decode()
    assert card.count(f'from_pretrained("{published["text"]}"') == 2


def test_copy_pushed_by_someone_without_the_package_opens_alike(fresh_python, hub, opened, published):
    entries = json.loads(hub.files("someone-else/copy")["config.json"])["auto_map"]
    assert entries == json.loads(hub.files(published["text"])["config.json"])["auto_map"]
    copy = fresh_python(
        ANSWER,
        """
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

        trust = {"trust_remote_code": True}
        result = {
            "text": answer(AutoModelForCausalLM.from_pretrained("someone-else/copy", **trust)),
            "backbone": answer(AutoModel.from_pretrained("someone-else/copy", **trust)),
            "tokens": AutoTokenizer.from_pretrained("someone-else/copy", **trust)("long ago")["input_ids"],
        }
        """,
    )
    assert copy["text"] == published["answers"]["text"]
    assert copy["backbone"] == published["backbone"]
    assert copy["tokens"]
